"""What a run depends on beside its checkpoint: said, compared and kept. Faults found once."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.places import newest_manifest
from mugv_ds.config import ConfigError, PeerError, load_config
from mugv_ds.config.schema import CheckpointSection
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.process import check_same, start_process
from mugv_ds.models.flops import SampleCost
from tests.engine.test_preference import annotate, policy
from tests.faults.runs import run
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.launcher import finish, launch

pytestmark = pytest.mark.regression

SHAPES = [(2, 4, 4), (1, 4, 4)]


def read(path: Path, overrides=()) -> RunData:
    config = load_config(path, overrides)
    return RunData(config, SampleCost.of(config), 1)


def rewrite(manifest: Path, change) -> None:
    """Changes the CSV's rows."""
    with manifest.open(newline="") as file:
        header, *rows = list(csv.reader(file))
    with manifest.open("w", newline="") as file:
        csv.writer(file).writerows([header, *change(rows)])


def compare_content(paths: list[Path]) -> None:
    config = load_config(paths[0])
    process = start_process(config)
    content = read(paths[process.rank]).content()
    with pytest.raises(
        ConfigError if process.rank else PeerError, match=r"data\.manifest = .* on rank 1" if process.rank else "rank 1"
    ):
        check_same(content, process.host, "copy the files anew")
    check_same(read(paths[0]).content(), process.host, "copy the files anew")


def test_ranks_that_read_different_manifests_do_not_start(tmp_path):
    """The same rows in another order: a pipeline trained one sample's noise against another's target."""
    paths = []
    for host in ("a", "b"):
        manifest = write_dataset(tmp_path / host, SHAPES * 3)
        if host == "b":
            rewrite(manifest, lambda rows: rows[::-1])
        paths.append(write_config(tmp_path / host, manifest, parallel={"data": 2}))
    run_ranks(2, compare_content, paths)


def differing(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_the_order_is_known_by_what_it_is_a_function_of(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES * 4)
    budget = {"shape": [2, 4, 4], "multiple": 2, "device_tokens": 64}
    group = {"name": "all", "share": [[0, 1.0]]}
    data = {"global_batch_size": 8, "micro_batch_size": 4, "budget": budget, "mixture": [group]}
    path = write_config(tmp_path, manifest, data=data)
    order = read(path).order()

    same = {
        "what one lowers when memory runs out": [
            'data.budget={"shape": [2, 4, 4], "multiple": 2, "device_tokens": 32}'
        ],
        "the name of a group": ['data.mixture=[{"name": "other", "share": [[0, 1.0]]}]'],
        "samples held at once": ["data.micro_batch_size=2"],
    }
    for what, overrides in same.items():
        assert differing(order, read(path, overrides).order()) == set(), what
    other = {
        "data.seed=5": {"data.seed"},
        "data.global_batch_size=16": {"the batch sizes"},
        "data.max_text_tokens=3000": {"the batch sizes"},  # through the FLOPs that the budget compares
    }
    for override, parts in other.items():
        assert differing(order, read(path, [override]).order()) == parts, override


def test_latents_of_other_shapes_and_other_ids_are_another_order(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES * 4)
    path = write_config(tmp_path, manifest)
    order = read(path).order()
    torch.save(torch.randn(24, 1, 4, 4), tmp_path / "latents/train-0.pt")
    shutil.rmtree(tmp_path / ".index")  # as who repairs a latent is told to
    assert differing(order, read(path).order()) == {"the latents' shapes"}
    torch.save(torch.randn(24, 2, 4, 4), tmp_path / "latents/train-0.pt")
    shutil.rmtree(tmp_path / ".index")
    rewrite(manifest, lambda rows: [["renamed", *rows[0][1:]], *rows[1:]])
    assert differing(order, read(path).order()) == {"the sample ids"}
    rewrite(manifest, lambda rows: [["train-0", *rows[0][1:]], *rows[1:]])
    with manifest.open("a") as file:
        file.write("\n")  # another file, the same rows
    assert differing(order, read(path).order()) == set()


@pytest.fixture(scope="module")
def preferred(tmp_path_factory) -> Path:
    """Pairs, and weights to start from."""
    root = tmp_path_factory.mktemp("preferred")
    manifest = write_dataset(root, [(1, 4, 6), (2, 4, 4)] * 12)
    for objective in ("dpo", "kto"):
        annotate(manifest, objective)
    save_file(policy().state_dict(), root / "policy.safetensors")
    return root


def configure(folder: Path, root: Path, *, steps: int, init: Path, **source) -> Path:
    return write_config(
        folder,
        root / "train.csv",
        data={"global_batch_size": 8, "micro_batch_size": 2},
        parallel={"data": 1},
        schedule={"kind": "constant", "steps": steps, "warmup_steps": 0},
        checkpoint={"init_from": str(init), "dir": str(folder / "checkpoints"), "save_every": 2},
        logging={"dir": str(folder / "tensorboard"), "every": 1, "progress": False},
        preference={
            "objective": "dpo",
            "beta": 10.0,
            "sft_weight": 0.1,
            "max_better_ratio": 1000.0,
            "sources": [{"name": "a", "manifest": str(root / "dpo.csv"), **source}],
        },
    )


def train(path: Path, *overrides: str) -> tuple[int, str]:
    """Runs one rank; returns its status and what it said."""
    done = run(path, 1, *overrides)
    return done.codes[0], done.output


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def test_a_run_goes_on_though_its_start_weights_are_gone(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES * 4)
    weights = tmp_path / "policy.safetensors"
    save_file(policy().state_dict(), weights)
    steps = {"kind": "constant", "steps": 2, "warmup_steps": 0}
    path = write_config(
        tmp_path / "run", manifest, schedule=steps, checkpoint={"init_from": str(weights), "save_every": 1}
    )
    status, output = train(path)
    assert status == 0, output
    weights.unlink()
    status, output = train(path, "schedule.steps=3", "optimizer.lr=0.0005")
    assert status == 0 and "going on after step 2" in output, output
    assert "changed since step-00000002: optimizer.lr = 0.001 → 0.0005" in output
    assert "changed since step-00000002: schedule.steps = 2 → 3" in output
    saved = newest_manifest(CheckpointSection(dir=str(tmp_path / "run/checkpoints")))
    assert saved.step == 3 and saved.start.path == str(weights)
    status, output = train(path, "schedule.steps=1")
    assert status == 2 and "has taken 3 steps, and schedule.steps = 1" in output, output


@pytest.mark.long
def test_a_preference_run_keeps_the_reference_that_it_began_with(tmp_path, preferred):
    """Its start is a run's folder, which holds a newer checkpoint by the time that the run goes on."""
    base = tmp_path / "base"
    steps = {"kind": "constant", "steps": 1, "warmup_steps": 0}
    first = {"init_from": str(preferred / "policy.safetensors"), "save_every": 1}
    trained = write_config(base, preferred / "train.csv", schedule=steps, checkpoint=first)
    assert train(trained)[0] == 0
    margins = {}
    for name, stops in (("straight", (4,)), ("resumed", (2, 4))):
        path = configure(tmp_path / name, preferred, steps=4, init=base / "checkpoints")
        for number, stop in enumerate(stops):
            if number:
                assert train(trained, "schedule.steps=2")[0] == 0  # a newer checkpoint
            status, output = train(path, f"schedule.steps={stop}")
            assert status == 0, output
        margins[name] = scalars(tmp_path / name, "preference/a/margin")
    assert margins["straight"][1] == pytest.approx(0, abs=1e-5)
    assert margins["resumed"] == pytest.approx(margins["straight"], rel=1e-4, abs=1e-6)
    shutil.rmtree(base / "checkpoints/step-00000001")
    status, output = train(path, "schedule.steps=6")
    assert status == 2 and "the weights that the run started from are gone" in output, output


@pytest.mark.long
def test_a_reference_is_of_the_files_that_it_was_measured_on_and_lacking_visits_are_made(tmp_path, preferred):
    root = tmp_path / "data"
    shutil.copytree(preferred, root, ignore=shutil.ignore_patterns(".index"))
    cache = tmp_path / "reference.parquet"
    path = configure(tmp_path / "run", root, steps=2, init=root / "policy.safetensors", reference=str(cache))
    status, output = finish(launch(path, 1, script="tools/reference.py"))
    assert status == 0, output

    longer = configure(tmp_path / "longer", root, steps=9, init=root / "policy.safetensors", reference=str(cache))
    status, output = train(longer)  # the file knows two steps
    assert status == 0 and "does not hold visits" in output, output
    assert scalars(tmp_path / "longer", "preference/a/margin")[1] == pytest.approx(0, abs=1e-5)

    for latent in (root / "latents").iterdir():  # written anew, of the same shapes
        torch.save(torch.load(latent, weights_only=True) + 0.5, latent)
    anew = configure(tmp_path / "anew", root, steps=2, init=root / "policy.safetensors", reference=str(cache))
    status, output = train(anew)
    assert status == 2 and "its files are not what the reference was measured on" in output, output
    assert len([line for line in output.splitlines() if line.startswith("error: ")]) == 1


@pytest.mark.long
def test_averages_switched_on_later_are_marked_in_every_checkpoint_after(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES * 4)
    steps = {"kind": "constant", "steps": 1, "warmup_steps": 0}
    path = write_config(tmp_path / "run", manifest, schedule=steps, checkpoint={"save_every": 1}, ema={"sigma_rel": []})
    assert train(path)[0] == 0
    for stop in (2, 3):
        assert train(path, "ema.sigma_rel=[0.1]", f"schedule.steps={stop}")[0] == 0
    saved = newest_manifest(CheckpointSection(dir=str(tmp_path / "run/checkpoints")))
    assert saved.step == 3 and saved.began == {"ema_0.100": 1}


def test_the_start_is_saved_so_that_there_is_a_step_to_go_back_to(tmp_path):
    manifest = write_dataset(tmp_path, SHAPES * 4)
    steps = {"kind": "constant", "steps": 1, "warmup_steps": 0}
    path = write_config(tmp_path / "run", manifest, schedule=steps, checkpoint={"save_every": 50})
    assert train(path)[0] == 0
    run = tmp_path / "run/checkpoints"
    assert files.saved_steps(run) == [1, 0]
    assert files.expired([8, 6, 4, 2, 0], 8, 2, 4) == [2, 0], "the start is not kept for ever"
    assert json.loads((run / "step-00000000/MANIFEST.json").read_text())["step"] == 0
    assert np.isfinite(scalars(tmp_path / "run", "train/loss")[1])
