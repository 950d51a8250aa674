"""Whole runs through the launcher: what they write, and what is left of them after a kill."""

import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.cli import convert_hf
from mugv_ds.config import load_config
from mugv_ds.data.manifest import open_index
from mugv_ds.data.readers import FlowSamples, stack
from mugv_ds.models import DiT
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.weights.published import load_dit
from tests.helpers.command import answer
from tests.helpers.dataset import CHANNELS, write_config, write_dataset
from tests.helpers.distributed import free_port
from tests.helpers.launcher import ROOT, finish, launch

SHAPES = [(2, 4, 6), (1, 4, 4)] * 5 + [(2, 4, 6)]
FOUR_RANKS = {"data": 1, "sequence": 2, "pipeline": 2}


def scalars(folder: Path, tag: str) -> dict[int, float]:
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def state_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint: fp32 masters and moments."""
    with open_checkpoint(checkpoint) as saved:
        return {f"{name}/{kind}": saved.read(name, kind) for name in saved.names() for kind in saved.manifest.kinds}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("data")
    return write_dataset(root, SHAPES), write_dataset(root, SHAPES[:5], "val")


def configure(folder: Path, dataset: tuple[Path, Path], parallel: dict = FOUR_RANKS, **sections: dict) -> Path:
    manifest, held_out = dataset
    data = {"val_manifest": str(held_out), "micro_batch_size": 2}
    return write_config(folder, manifest, data=data, parallel=parallel, **sections)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, dataset) -> Path:
    """The folder of a run of ten steps on four ranks."""
    folder = tmp_path_factory.mktemp("straight")
    status, output = finish(launch(configure(folder, dataset, logging={"profile_step": 8}), 4))
    assert status == 0, output
    return folder


def test_a_run_writes_its_scalars(straight):
    loss = scalars(straight, "train/loss")
    assert list(loss) == [2, 4, 6, 8, 10] and all(1 < value < 3 for value in loss.values())
    assert list(scalars(straight, "validation/loss")) == [0, 10]
    assert scalars(straight, "train/lr")[2] == pytest.approx(1e-3 * 2 / 3)  # the second of three warm-up steps
    assert scalars(straight, "train/lr")[10] == pytest.approx(1e-3 * 0.0495, rel=1e-3)  # ½(1 + cos(6π/7))
    for tag in ("train/grad_norm", "train/param_norm", "speed/tokens_per_second", "speed/model_tflops_per_device"):
        assert all(value > 0 for value in scalars(straight, tag).values()), tag
    # Only the unused half of the final layer's output channels has no gradient: 96 · (144 + 1) of all parameters.
    parameters = sum(p.numel() for p in load_exported(straight).parameters())
    zeros = scalars(straight, "train/grad_zero_share")[10]
    assert zeros == pytest.approx(96 * 145 / parameters, rel=1e-3)


def test_a_run_profiles_a_step(straight):
    profiles = sorted((straight / "tensorboard").glob("profile_*"))
    assert [path.name for path in profiles] == ["profile_step_8.json.gz", "profile_step_8.txt"]
    table = profiles[1].read_text()
    assert "Optimizer.step#" in table and "gloo:" in table, "a whole step, not a part of it"


def load_exported(folder: Path, name: str = "dit") -> DiT:
    out = folder / name
    if not out.exists():
        convert(folder / "checkpoints", out)
    return load_dit(out)


def convert(checkpoint: Path, out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/convert_hf.py", "--ckpt", str(checkpoint), "--out", str(out), *arguments]
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)


def test_converted_weights_load_strictly_and_are_the_trained_ones(straight):
    trained = load_exported(straight)
    done = convert(straight / "checkpoints", straight / "shards", "--format", "safetensors")
    assert done.returncode == 0, done.stderr
    sharded = load_file(straight / "shards" / "model.safetensors")
    DiT(trained.config).load_state_dict(sharded, strict=True)
    whole = torch.load(straight / "dit" / "dit.pt", weights_only=True)
    assert whole.keys() == sharded.keys()
    trained_state = state_of(straight / "checkpoints/step-00000010")
    for name, value in whole.items():
        assert torch.equal(value, sharded[name]), name
        assert torch.equal(value, trained_state[f"{name}/weight"]), name
    assert whole["final_layer.linear.weight"].any(), "the last layer starts at zero: nothing was trained"


@pytest.mark.parametrize(
    ("checkpoint", "complaint"),
    [("nowhere", "no such folder"), ("checkpoints/step-00000003", "no such folder"), ("tensorboard", "no checkpoint")],
)
def test_conversion_says_what_is_wrong(straight, checkpoint, complaint):
    found = answer(convert_hf.main, ["--ckpt", str(straight / checkpoint), "--out", str(straight / "unused")])
    assert found.status == 2 and complaint in found.errors
    assert len(found.errors.strip().splitlines()) == 1, found.errors


def test_validation_is_the_mean_flow_loss_of_every_held_out_sample_once(straight, dataset):
    """Against the plain model, one sample at a time; three of one shape and two of another leave a filler.

    The samples of one shape take turns in the four quarters of the timesteps.
    """
    config = load_config(straight / "config.json")
    index, model = open_index(dataset[1]), load_exported(straight)
    samples = FlowSamples(index, config.data, config.flow, CHANNELS, held_out=True)
    losses, turns = [], Counter()
    for row in range(len(index)):
        batch = stack(samples.read(row, 0))
        shape = tuple(samples.shapes[row])
        quarter = turns[shape] % 4
        turns[shape] += 1
        assert quarter * 250 <= batch.timestep.item() < (quarter + 1) * 250 and batch.x_mask.all()
        with torch.no_grad():
            out = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        losses.append(flow_loss(out, batch.target, batch.x_mask).item())
    assert scalars(straight, "validation/loss")[10] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_another_layout_trains_on_the_same_stream(tmp_path, dataset, straight):
    """Two data ranks against sequence × pipeline: same samples, noise, timesteps, drops and first frames."""
    status, output = finish(launch(configure(tmp_path, dataset, parallel={"data": 2}), 2))
    assert status == 0, output
    for tag in ("train/loss", "validation/loss", "train/grad_norm", "train/param_norm", "train/grad_zero_share"):
        assert scalars(tmp_path, tag) == pytest.approx(scalars(straight, tag), rel=1e-4), tag


@pytest.mark.long
def test_another_layout_goes_on_by_itself(tmp_path, dataset, straight):
    """From step 6 of four ranks to step 10 on two, on the same stream."""
    (tmp_path / "checkpoints").mkdir()
    shutil.copytree(straight / "checkpoints/step-00000006", tmp_path / "checkpoints/step-00000006")
    status, output = finish(launch(configure(tmp_path, dataset, parallel={"data": 2}), 2))
    assert status == 0, output
    assert "latest: missing; the folder is scanned" in output and "going on after step 6" in output
    for tag in ("train/loss", "validation/loss"):
        expected = {step: value for step, value in scalars(straight, tag).items() if step >= 8}
        assert {s: v for s, v in scalars(tmp_path, tag).items() if s >= 8} == pytest.approx(expected, rel=1e-5), tag


@pytest.mark.long
def test_a_killed_run_goes_on_bitwise(tmp_path, dataset, straight):
    """kill -9 of one rank after step 6: the launcher ends the rest, and a restart reaches the same state at step 10."""
    config = configure(tmp_path, dataset)
    run = launch(config, 4)
    latest = tmp_path / "checkpoints" / "latest"
    deadline = time.monotonic() + 120
    while not (latest.exists() and latest.read_text().strip() != "step-00000000") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert latest.read_text().strip() == "step-00000006"
    ranks = [p for p in psutil.Process(run.pid).children(recursive=True) if "mugv_ds/train.py" in p.cmdline()]
    ranks[-1].kill()
    status, output = finish(run)
    assert status != 0, output
    assert latest.read_text().strip() == "step-00000006", "the run was over before it was killed"

    status, output = finish(launch(config, 4))
    assert status == 0, output
    assert "going on after step 6" in output
    resumed, expected = (state_of(folder / "checkpoints" / "step-00000010") for folder in (tmp_path, straight))
    assert resumed.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(resumed[name], value), name
    for tag in ("train/loss", "validation/loss"):
        assert scalars(tmp_path, tag)[10] == scalars(straight, tag)[10]


def test_a_missing_hostfile_is_refused(tmp_path, dataset):
    """DeepSpeed only warns, and runs one process."""
    config = write_config(tmp_path / "run", dataset[0])
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(tmp_path / "nowhere"), "--no_ssh"]
    command += ["--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(free_port())]
    done = subprocess.run(
        [*command, "mugv_ds/train.py", "--config", str(config)], cwd=ROOT, text=True, capture_output=True, check=False
    )
    assert done.returncode != 0
    assert f"error: {tmp_path / 'nowhere'}: no such file" in done.stderr
    assert not (tmp_path / "run/checkpoints").exists()


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")
def test_bf16_on_four_gpus_follows_one_gpu(tmp_path, dataset):
    """Ten bf16 steps with NCCL at (1, 2, 2) and (2, 2, 1), against one device: equal up to bf16 rounding."""
    losses = {}
    for layout in ((1, 1, 1), (1, 2, 2), (2, 2, 1)):
        folder = tmp_path / "-".join(map(str, layout))
        parallel = dict(zip(("data", "sequence", "pipeline"), layout, strict=True))
        sections = {"parallel": parallel, "model": {"precision": "bf16", "attention": "sdpa"}}
        config = write_config(folder, dataset[0], data={"val_manifest": str(dataset[1])}, **sections)
        status, output = finish(launch(config, layout[0] * layout[1] * layout[2]))
        assert status == 0, output
        losses[layout] = scalars(folder, "train/loss") | scalars(folder, "validation/loss")
        assert load_exported(folder).start_token.dtype == torch.bfloat16
    one = losses.pop((1, 1, 1))
    for layout, curve in losses.items():
        assert curve == pytest.approx(one, rel=5e-3), layout
