"""What must hold before any test module is imported."""

import os
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch

# Triton reads it while it is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# Ranks and loader workers of all tests are forked from one server that has imported what they need: importing takes a
# process of its own several seconds. It is started before a test starts one that knows less.
_IMPORTED = (
    "s3fs",
    "tests.faults.observe",
    "tests.helpers.trainer",
    "mugv_ds.parallel.codec",
    "tests.helpers.preloaded",
    "mugv_ds.train_vae",
    "mugv_ds.engine.vae.loop",
    "mugv_ds.weights.vae_start",
    "torchmetrics.functional.image",
    "diffusers.models.autoencoders.vae",
)


def pytest_sessionstart(session):
    hands_out = getattr(session.config.option, "dist", "no") != "no"  # xdist's workers run the tests then
    if session.config.option.collectonly or hands_out:
        return
    forkserver.set_forkserver_preload([*_IMPORTED])
    kept = [os.dup(number) for number in (1, 2)]
    with Path(os.devnull).open("w") as nowhere:  # what a process has to say is in the exception that it ends with
        for number in (1, 2):
            os.dup2(nowhere.fileno(), number)
        forkserver.ensure_running()
    for number, stream in zip((1, 2), kept, strict=True):
        os.dup2(stream, number)
        os.close(stream)


@pytest.fixture
def formula(monkeypatch) -> None:
    """The formula in the place of FlashAttention-4."""
    from mugv_kernels import flash4
    from tests.helpers.formula import Formula

    monkeypatch.setattr(flash4, "_interface", lambda: Formula)
