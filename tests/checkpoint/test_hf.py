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
from mugv_ds.checkpoint.store import CheckpointError
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.layers import Block

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
    load_into(write(tmp_path, state, "safetensors"), CONFIG, [("blocks.1.", block)])
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
        load_into(path, CONFIG, [("", DiT(CONFIG))])
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


def test_a_checkpoint_whose_config_cannot_be_read_is_named(tmp_path):
    run = tmp_path / "global_step2"
    run.mkdir()
    with pytest.raises(CheckpointError, match=r"run_config\.json: missing"):
        export(run, tmp_path / "out", layout="pt")
    (run / "run_config.json").write_text('{"model": {"preset": "mugdit_9b"}}')
    with pytest.raises(CheckpointError, match=r"run_config\.json: model\.preset"):
        export(run, tmp_path / "out", layout="pt")


@pytest.mark.parametrize(
    ("latest", "complaint"),
    [
        (None, "latest: missing"),
        ("", "names ''"),
        ("../elsewhere", "names '../elsewhere'"),
        ("global_step9", "names 'global_step9'"),
    ],
)
def test_latest_must_name_a_checkpoint_of_the_run(tmp_path, latest, complaint):
    (tmp_path / "run/global_step2").mkdir(parents=True)
    if latest is not None:
        (tmp_path / "run/latest").write_text(latest)
    with pytest.raises(CheckpointError, match=complaint):
        export(tmp_path / "run", tmp_path / "out", layout="pt")
    assert not (tmp_path / "out").exists()
