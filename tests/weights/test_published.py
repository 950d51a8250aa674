"""Published-format weights in all their files, good and bad."""

import json
import os
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file

from mugv_ds.config import CheckpointError
from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.layers import Block
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.weights.convert import import_weights, widen_weights
from mugv_ds.weights.published import PublishedWeights, export, load_dit
from mugv_ds.weights.save import save_weights
from mugv_ds.weights.start import check_start_features, load_into
from mugv_ds.weights.widen import Noise
from tests.helpers.saved import write_checkpoint

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


@pytest.mark.parametrize("source", ["pt", "sharded bin", "sharded safetensors"])
@pytest.mark.parametrize("layout", ["pt", "bin", "safetensors"])
@pytest.mark.parametrize("shard_size", ["1MB", "5GB"])
def test_every_form_is_written_bit_for_bit(tmp_path, state, source, layout, shard_size):
    (tmp_path / "in").mkdir()
    state = {name: value.bfloat16() for name, value in state.items()} | {"y_embedder.y_embedding": torch.ones(4, 16)}
    weights = PublishedWeights(write(tmp_path / "in", state, source))
    written = save_weights(weights, CONFIG, tmp_path / "out", layout, shard_size=shard_size)
    again = PublishedWeights(written)
    assert set(again) == set(state) - {"y_embedder.y_embedding"}
    assert all(torch.equal(value, state[name]) and value.dtype == torch.bfloat16 for name, value in again.items())
    files = [file for file in (tmp_path / "out").iterdir() if file.suffix != ".json"]
    assert (len(files) > 2) == (layout != "pt" and shard_size == "1MB")
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(CheckpointError, match="exists already"):
        save_weights(weights, CONFIG, tmp_path / "out", layout)


def test_a_view_does_not_drag_its_storage_along(tmp_path, state):
    class Views(PublishedWeights):
        def __getitem__(self, name: str) -> torch.Tensor:
            value = super().__getitem__(name)
            return torch.cat([value.flatten(), torch.zeros(1_000_000)])[: value.numel()].view(value.shape)

    path = write(tmp_path, state, "pt")
    written = save_weights(Views(path), CONFIG, tmp_path / "out", "pt")
    assert written.stat().st_size < 1.1 * path.joinpath("dit.pt").stat().st_size


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_not_written(tmp_path, state, value):
    state = dict(state) | {"end_token": torch.full((144,), value)}
    weights = PublishedWeights(write(tmp_path, state, "pt"))
    with pytest.raises(CheckpointError, match="end_token holds NaN or Inf"):
        save_weights(weights, CONFIG, tmp_path / "out", "safetensors")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_full_disk_is_found_before_writing(tmp_path, state, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 are free"):
        save_weights(PublishedWeights(write(tmp_path, state, "pt")), CONFIG, tmp_path / "out", "pt")
    assert not (tmp_path / "out.partial").exists()


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
        (lambda s: s.update({"blocks.2.attn.qkv.weight": torch.zeros(3, 3)}), "has blocks.2.attn.qkv.weight"),
        (lambda s: s.update({"end_token": torch.zeros(144, dtype=torch.int8)}), "end_token is torch.int8"),
        (lambda s: s.update({"end_token": torch.zeros(1).expand(144)}), "end_token claims elements"),
    ],
    ids=["missing", "other shape", "unexpected", "integers", "stride 0"],
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


def edit_index(folder: Path, change) -> None:
    file = next(folder.glob("*.index.json"))
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("form", ["sharded bin", "sharded safetensors"])
@pytest.mark.parametrize(
    "change",
    [
        lambda placed: placed.pop("end_token"),
        lambda placed: placed.update({"end_token": placed["final_layer.linear.bias"]}),
        lambda placed: placed.update({"another": placed["end_token"]}),
    ],
    ids=["not in the index", "in another shard", "in no shard"],
)
def test_an_index_that_the_shards_contradict_is_refused(tmp_path, state, form, change):
    write(tmp_path, state, form)
    edit_index(tmp_path, change)
    with pytest.raises(CheckpointError, match=r"model-00001-of-\d+\.\w+: (end_token|another) is only in one"):
        PublishedWeights(tmp_path)


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


def test_what_encoded_the_text_goes_along(tmp_path, state):
    info = HashTextEncoder(16, 6).info
    write_checkpoint(tmp_path / "run", 2, state.items(), text_encoder=info)
    export(tmp_path / "run", tmp_path / "exported", layout="pt")
    assert read_text_encoder(tmp_path / "exported") == info
    import_weights(tmp_path / "exported", tmp_path / "imported")
    widen_weights(tmp_path / "imported", tmp_path / "wide", factor=2, noise=Noise("none"), layout="pt")
    assert read_text_encoder(tmp_path / "imported") == read_text_encoder(tmp_path / "wide") == info
    check_start_features(tmp_path / "run/step-00000002", info)
    other = HashTextEncoder(16, 7).info
    with pytest.raises(CheckpointError, match=r"checkpoint.init_from = .*wide/dit.pt: text .* 6 tok.*data: .* 7 tok"):
        check_start_features(tmp_path / "wide/dit.pt", other)


def test_a_checkpoint_of_a_bf16_run_is_rounded(tmp_path, state):
    write_checkpoint(tmp_path / "run", 2, state.items(), model={"precision": "bf16"})
    weights = torch.load(export(tmp_path / "run", tmp_path / "out", layout="pt"), weights_only=True)
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in state.items())


def test_a_broken_checkpoint_is_passed_over_or_refused(run, tmp_path, state, capsys):
    shard = run / "step-00000004/rank-1.weight.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    export(run, tmp_path / "out", layout="pt")
    assert torch.equal(load_dit(tmp_path / "out").start_token, state["start_token"])
    assert f"passed over: {shard}" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"rank-1\.weight\.safetensors: .* bytes, the manifest says"):
        export(run / "step-00000004", tmp_path / "other", layout="pt")
    assert not (tmp_path / "other").exists()


def test_a_checkpoint_of_other_sizes_than_its_config_is_refused(tmp_path, state):
    write_checkpoint(tmp_path / "run", 2, ((name, value) for name, value in state.items() if name != "start_token"))
    with pytest.raises(CheckpointError, match="has no start_token"):
        export(tmp_path / "run", tmp_path / "out", layout="pt")


@pytest.mark.parametrize("latest", ["../elsewhere", "/etc", "global_step2", "step-00000002/../../elsewhere"])
def test_a_latest_that_leads_out_is_refused(run, tmp_path, latest):
    (run / "latest").write_text(latest)
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export(run, tmp_path / "out", layout="pt")
    assert not (tmp_path / "out").exists()
