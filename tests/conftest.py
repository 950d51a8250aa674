"""What must hold before any test module is imported."""

import os

import pytest
import torch

# Triton reads it while it is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture
def formula(monkeypatch) -> None:
    """The formula in the place of FlashAttention-4."""
    from mugv_kernels import flash4
    from tests.helpers.formula import Formula

    monkeypatch.setattr(flash4, "_interface", lambda: Formula)
