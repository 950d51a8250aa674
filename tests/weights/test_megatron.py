"""Megatron training checkpoints in both forms, good and bad."""

import os
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from mugv_ds.cli import import_hf
from mugv_ds.config.errors import CheckpointError
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.weights import torch_dist
from mugv_ds.weights.convert import import_weights, open_weights
from mugv_ds.weights.published import load_dit
from mugv_ds.weights.start import load_into
from tests.helpers.megatron import stack_layers, write_legacy, write_stacked

CONFIG = DiTConfig(288, 4, 3, caption_channels=16)


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in DiT(CONFIG).state_dict().items()}


FORMS = {
    "legacy, 1 rank": lambda folder, state: write_legacy(folder, state, 1),
    "legacy, 2 ranks": lambda folder, state: write_legacy(folder, state, 2),
    "legacy, 4 ranks": lambda folder, state: write_legacy(folder, state, 4),
    "torch_dist, whole stacks": lambda folder, state: write_stacked(folder, stack_layers(state), layers=3),
    "torch_dist, layer by layer, 4 ranks": lambda folder, state: write_stacked(
        folder, stack_layers(state), layers=1, ranks=4
    ),
    "torch_dist, two layers, 2 ranks": lambda folder, state: write_stacked(
        folder, stack_layers(state), layers=2, ranks=2
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_comes_out_bit_for_bit(tmp_path, state, form):
    weights, config = open_weights(FORMS[form](tmp_path / "megatron", state))
    assert config == CONFIG and weights.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(weights[name], value), name


def test_each_chunk_is_read_once(tmp_path, state, monkeypatch):
    read, load_chunk = [], torch_dist.load_chunk
    monkeypatch.setattr(torch_dist, "load_chunk", lambda chunk, dtype: read.append(chunk) or load_chunk(chunk, dtype))
    folder = write_stacked(tmp_path / "megatron", stack_layers(state), layers=3)
    import_weights(folder, tmp_path / "out")
    assert len(read) == len(set(read)) == len(stack_layers(state))


@pytest.mark.parametrize("form", ["legacy, 2 ranks", "torch_dist, whole stacks"])
def test_a_run_starts_from_what_is_imported(tmp_path, state, form, capsys):
    source, out = FORMS[form](tmp_path / "megatron", state), tmp_path / "out"
    assert import_hf.main(["--weights", str(source), "--out", str(out)]) == 0
    assert str(CONFIG) in capsys.readouterr().out
    model = DiT(CONFIG)
    load_into(out, CONFIG, [("", model)])
    for loaded in (model, load_dit(out)):
        assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())


def test_another_preset_is_refused(tmp_path, state, capsys):
    source = write_stacked(tmp_path / "megatron", stack_layers(state))
    command = ["--weights", str(source), "--out", str(tmp_path / "out"), "--preset", "mugdit_debug"]
    assert import_hf.main(command) == 2
    assert "not mugdit_debug" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@dataclass
class MCoreMetadata(Metadata):
    """As Megatron extends the description, in a module that is not there when the checkpoint is read."""

    mcore_data: dict | None = None


MCoreMetadata.__module__ = "megatron"


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_description_with_classes_of_megatron_is_read(tmp_path, state, monkeypatch, protocol):
    folder = write_stacked(tmp_path / "megatron", stack_layers(state))
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "megatron", SimpleNamespace(MCoreMetadata=MCoreMetadata))
        extended = MCoreMetadata(**vars(metadata), mcore_data={"a": {"b": (1, 2.5, b"", None, {3})}})
        (folder / ".metadata").write_bytes(pickle.dumps(extended, protocol=protocol))
    weights, _ = open_weights(folder)
    assert torch.equal(weights["blocks.2.attn.qkv.weight"], state["blocks.2.attn.qkv.weight"])


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def edit_metadata(folder: Path, change) -> None:
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def set_places(metadata: Metadata, **values) -> None:
    for place in metadata.storage_data.values():
        vars(place).update(values)


def plant_chunk(folder: Path, value: object) -> None:
    """Puts something else where start_token is looked for."""
    torch.save(value, folder / "evil.distcp")

    def change(metadata: Metadata) -> None:
        (place,) = (place for index, place in metadata.storage_data.items() if index.fqn == "start_token")
        size = (folder / "evil.distcp").stat().st_size
        place.relative_path, place.offset, place.length = "evil.distcp", 0, size

    edit_metadata(folder, change)


def drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks.pop()


def repeat_chunk(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc1.weight"].chunks
    chunks[1] = chunks[0]


def claim_more(metadata: Metadata) -> None:
    stored = metadata.state_dict_metadata["start_token"]
    stored.size = stored.chunks[0].sizes = torch.Size([10**12])


BAD_STACKED = {
    "truncated": (lambda f: (f / ".metadata").write_bytes((f / ".metadata").read_bytes()[:200]), "does not describe"),
    "empty": (lambda f: (f / ".metadata").write_bytes(b""), "does not describe"),
    "payload": (
        lambda f: (f / ".metadata").write_bytes(pickle.dumps(Payload(f / "sentinel"))),
        "does not describe",
    ),
    "payload among the tensors": (
        lambda f: edit_metadata(f, lambda m: setattr(m, "planner_data", Payload(f / "sentinel"))),
        None,
    ),
    "leads out": (lambda f: edit_metadata(f, lambda m: set_places(m, relative_path="../x")), "'../x', which is not"),
    "no such file": (lambda f: (f / "__0_0.distcp").unlink(), "which is not a file in this folder"),
    "short file": (lambda f: os.truncate(f / "__0_0.distcp", 1000), "has not the bytes"),
    "payload in a chunk": (lambda f: plant_chunk(f, Payload(f / "sentinel")), "cannot be read as a tensor"),
    "other shape in a chunk": (lambda f: plant_chunk(f, torch.ones(2)), "not the tensor that is announced"),
    "stride 0 in a chunk": (lambda f: plant_chunk(f, torch.ones(1).expand(288)), "elements that are not stored"),
    "garbage in a chunk": (lambda f: overwrite(f / "__0_0.distcp", bytes(5000)), "cannot be read as a tensor"),
    "compressed": (lambda f: edit_metadata(f, lambda m: set_places(m, transform_descriptors=["zstd"])), "transformed"),
    "missing chunk": (lambda f: edit_metadata(f, drop_chunk), r"mlp\.linear_fc1\.weight do not make it up"),
    "chunk twice": (lambda f: edit_metadata(f, repeat_chunk), r"mlp\.linear_fc1\.weight do not make it up"),
    "shape bomb": (lambda f: edit_metadata(f, claim_more), "has not the bytes"),
    "missing tensor": (
        lambda f: edit_metadata(f, lambda m: m.state_dict_metadata.pop("decoder.layers.mlp.linear_fc1.weight")),
        r"blocks\.0\.mlp\.fc1\.weight",
    ),
    "unknown tensor": (
        lambda f: edit_metadata(f, lambda m: m.state_dict_metadata.update(x=m.state_dict_metadata["start_token"])),
        "has x|'x'",
    ),
}


def overwrite(file: Path, data: bytes) -> None:
    with file.open("r+b") as target:
        target.write(data)


@pytest.mark.parametrize("damage", BAD_STACKED)
def test_bad_torch_dist_folders_are_refused_by_name(tmp_path, state, damage):
    folder = write_stacked(tmp_path / "megatron", stack_layers(state), layers=1, ranks=2)
    do, complaint = BAD_STACKED[damage]
    do(folder)
    if complaint is None:
        open_weights(folder)
    else:
        with pytest.raises(CheckpointError, match=complaint) as error:
            import_weights(folder, tmp_path / "out")
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "out").exists() and not (folder / "sentinel").exists()


def edit_rank(folder: Path, change, rank: int = 1) -> None:
    file = folder / f"iter_0000100/mp_rank_{rank:02d}/model_optim_rng.pt"
    state = torch.load(file, weights_only=False)
    change(state)
    torch.save(state, file)


BAD_LEGACY = {
    "payload": (lambda f: edit_rank(f, lambda s: s.update(args=Payload(f / "sentinel"))), "posix.system"),
    "pipeline": (
        lambda f: (f / "iter_0000100/mp_rank_01").rename(f / "iter_0000100/mp_rank_00_001"),
        "tensor parallelism alone",
    ),
    "missing rank file": (lambda f: (f / "iter_0000100/mp_rank_01/model_optim_rng.pt").unlink(), "mp_rank_01"),
    "truncated": (lambda f: os.truncate(f / "iter_0000100/mp_rank_01/model_optim_rng.pt", 5000), "cannot be read"),
    "no model": (lambda f: edit_rank(f, lambda s: s.pop("model")), "has no model"),
    "no tensor": (lambda f: edit_rank(f, lambda s: s["model"].update(start_token=[1])), "start_token is not a plain"),
    "stride 0": (
        lambda f: edit_rank(f, lambda s: s["model"].update(start_token=torch.zeros(1).expand(288))),
        "start_token is not a plain",
    ),
    "missing on a rank": (lambda f: edit_rank(f, lambda s: s["model"].pop("start_token")), "start_token is in only"),
    "shape differs": (
        lambda f: edit_rank(f, lambda s: s["model"].update(start_token=torch.ones(2))),
        "differs in shape",
    ),
    "value differs": (lambda f: edit_rank(f, lambda s: s["model"]["start_token"].add_(1)), "different values"),
    "latest leads out": (
        lambda f: (f / "latest_checkpointed_iteration.txt").write_text("../iter_0000100"),
        "no iteration in this folder",
    ),
    "not finite": (
        lambda f: [edit_rank(f, lambda s: s["model"]["start_token"].fill_(torch.nan), rank) for rank in (0, 1)],
        "start_token (holds NaN|is not split)",
    ),
}


@pytest.mark.parametrize("damage", BAD_LEGACY)
def test_bad_legacy_folders_are_refused_by_name(tmp_path, state, damage):
    folder = write_legacy(tmp_path / "megatron", state, 2)
    do, complaint = BAD_LEGACY[damage]
    do(folder)
    with pytest.raises(CheckpointError, match=complaint) as error:
        import_weights(folder, tmp_path / "out")
    assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not (tmp_path / "out").exists() and not (folder / "sentinel").exists()
