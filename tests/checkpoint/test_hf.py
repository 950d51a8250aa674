"""Published-format weights in all their files, good and bad."""

import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from mugv_ds.checkpoint.hf import PublishedWeights, export, load_dit, load_into
from mugv_ds.config import CheckpointError
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.layers import Block
from tests.checkpoint.saved import write_checkpoint

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    model = DiT(CONFIG)
    init_weights(model, "", seed=0)
    return model.state_dict()


def write(folder: Path, state: dict[str, torch.Tensor], form: str) -> Path:
    """Writes weights in one of the published forms, with config.json; returns what to open."""
    (folder / "config.json").write_text(json.dumps(asdict(CONFIG)))
    if form == "pt":
        torch.save(state, folder / "dit.pt")
    elif form == "pt file":
        torch.save(state, folder / "any_name.pt")
        return folder / "any_name.pt"
    elif form == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        pattern = "pytorch_model{suffix}.bin" if form == "sharded bin" else "model{suffix}.safetensors"
        plan = split_torch_state_dict_into_shards(state, filename_pattern=pattern, max_shard_size="1MB")
        assert len(plan.filename_to_tensors) > 2
        for name, tensors in plan.filename_to_tensors.items():
            part = {tensor: state[tensor] for tensor in tensors}
            torch.save(part, folder / name) if form == "sharded bin" else save_file(part, folder / name)
        index = "pytorch_model.bin.index.json" if form == "sharded bin" else "model.safetensors.index.json"
        (folder / index).write_text(json.dumps({"weight_map": plan.tensor_to_filename}))
    return folder


@pytest.mark.parametrize("form", ["pt", "pt file", "safetensors", "sharded bin", "sharded safetensors"])
def test_every_form_gives_every_tensor(tmp_path, state, form):
    path = write(tmp_path, state, form)
    weights = PublishedWeights(path)
    assert weights.keys() == state.keys() and len(weights) == len(state)
    for name, value in state.items():
        assert torch.equal(weights[name], value), name
    assert all(torch.equal(a, b) for a, b in zip(load_dit(path).state_dict().values(), state.values(), strict=True))


def test_a_part_of_the_model_takes_its_own(tmp_path, state):
    block = Block(CONFIG)
    load_into(write(tmp_path, state, "safetensors"), [("blocks.1.", block)])
    assert torch.equal(block.mlp.fc1.weight, state["blocks.1.mlp.fc1.weight"])


def test_loading_keeps_the_dtype(tmp_path, state):
    path = write(tmp_path, {name: value.bfloat16() for name, value in state.items()}, "pt")
    assert {p.dtype for p in load_dit(path).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda s: s.pop("blocks.1.attn.qkv.weight"), "blocks.1.attn.qkv.weight"),
        (lambda s: s.update({"blocks.1.attn.qkv.weight": torch.zeros(3, 3)}), "blocks.1.attn.qkv.weight"),
    ],
    ids=["missing", "other shape"],
)
def test_weights_that_do_not_fit_are_named(tmp_path, state, change, complaint):
    state = dict(state)
    change(state)
    path = write(tmp_path, state, "pt")
    with pytest.raises(CheckpointError, match=complaint):
        load_into(path, [("", DiT(CONFIG))])
    with pytest.raises(CheckpointError, match=complaint) as error:
        load_dit(path)
    assert "\n" not in str(error.value)


def escape_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"start_token": "../secret"}}))


def break_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weights": []}')


def break_file(folder: Path) -> None:
    (folder / "dit.pt").write_bytes((folder / "dit.pt").read_bytes()[:1000])


class Payload:
    def __reduce__(self):
        return os.system, ("touch " + self.sentinel,)


def plant_pickle(folder: Path) -> None:
    payload = Payload()
    payload.sentinel = str(folder / "sentinel")
    torch.save({"start_token": payload}, folder / "dit.pt")


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda folder: (folder / "dit.pt").unlink(), "holds no weights"),
        (lambda folder: (folder / "config.json").unlink(), "config.json"),
        (lambda folder: (folder / "config.json").write_text('{"hidden_size": 100, "num_heads": 2}'), "config.json"),
        (lambda folder: torch.save([1, 2], folder / "dit.pt"), "dict of tensors"),
        (escape_index, "is not a file in this folder"),
        (break_index, "weight_map"),
        (break_file, "cannot be read as plain tensors"),
        (plant_pickle, "cannot be read as plain tensors"),
    ],
    ids=["no weights", "no sizes", "wrong sizes", "no dict", "index leads out", "no index", "truncated", "pickle"],
)
def test_bad_weights_are_refused(tmp_path, state, damage, complaint):
    write(tmp_path, state, "pt")
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=complaint) as error:
        load_dit(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "sentinel").exists()


@pytest.fixture
def run(tmp_path, state) -> Path:
    """A run's folder with checkpoints after steps 2 and 4; the weights of the second are twice those of the first."""
    write_checkpoint(tmp_path / "run", 2, state.items())
    write_checkpoint(tmp_path / "run", 4, ((name, 2 * value) for name, value in state.items()), ranks=3)
    return tmp_path / "run"


@pytest.mark.parametrize("form", ["pt", "safetensors"])
def test_a_checkpoint_becomes_a_model(run, tmp_path, state, form):
    export(run, tmp_path / "newest", layout=form)
    export(run / "step-00000002", tmp_path / "named", layout=form)
    newest, named = (load_dit(tmp_path / name).state_dict() for name in ("newest", "named"))
    for name, value in state.items():
        assert torch.equal(newest[name], 2 * value) and torch.equal(named[name], value), name


def test_a_checkpoint_of_a_bf16_run_is_rounded(tmp_path, state):
    write_checkpoint(tmp_path / "run", 2, state.items(), model={"precision": "bf16"})
    weights = torch.load(export(tmp_path / "run", tmp_path / "out", layout="pt"), weights_only=True)
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in state.items())


def test_a_broken_checkpoint_is_passed_over_or_refused(run, tmp_path, state, capsys):
    shard = run / "step-00000004/rank-1.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    export(run, tmp_path / "out", layout="pt")
    assert torch.equal(load_dit(tmp_path / "out").start_token, state["start_token"])
    assert f"passed over: {shard}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"rank-1\.safetensors: .* bytes, the manifest says"):
        export(run / "step-00000004", tmp_path / "other", layout="pt")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_other_sizes_than_its_config_is_refused(tmp_path, state):
    write_checkpoint(tmp_path / "run", 2, ((name, value) for name, value in state.items() if name != "start_token"))
    with pytest.raises(CheckpointError, match="1 tensors differ, the first is start_token"):
        export(tmp_path / "run", tmp_path / "out", layout="pt")


@pytest.mark.parametrize("latest", ["../elsewhere", "/etc", "global_step2", "step-00000002/../../elsewhere"])
def test_a_latest_that_leads_out_is_refused(run, tmp_path, latest):
    (run / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export(run, tmp_path / "out", layout="pt")
    assert not (tmp_path / "out").exists()
