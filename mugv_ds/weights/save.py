"""Writes weights in the published format: one .pt, or shards of .bin or .safetensors with their index."""

import json
import mmap
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.text_encoder import write_text_encoder
from mugv_ds.weights.base import UNUSED, Weights

Layout = Literal["pt", "bin", "safetensors", "diffusers"]

CONFIG_NAME = "config.json"
PT_NAME = "dit.pt"
CARD_NAME = "README.md"
MODEL_INDEX_NAME, TRANSFORMER_NAME = "model_index.json", "transformer"  # of a folder as diffusers has it
_SHARDS = {"bin": "pytorch_model{suffix}.bin", "safetensors": "model{suffix}.safetensors"}
_SHARDS["diffusers"] = "diffusion_pytorch_model{suffix}.safetensors"
SINGLE_NAMES = (PT_NAME, *(pattern.format(suffix="") for pattern in _SHARDS.values()))
INDEX_NAMES = {layout: pattern.format(suffix="") + ".index.json" for layout, pattern in _SHARDS.items()}
SHARD_SIZE = "5GB"


def save_weights(
    weights: Weights,
    config: DiTConfig,
    out: Path,
    layout: Layout,
    *,
    dtype: torch.dtype | None = None,
    metadata: dict[str, str] | None = None,
    shard_size: str = SHARD_SIZE,
    card: str | None = None,
) -> Path:
    """Writes weights, their sizes (`config.json`) and, if they say, what encoded the text that they were trained on
    (`text_encoder.json`) to a folder, which appears only when it is complete.

    A shard is held in memory while it is written, unless its tensors are mapped from files; a .pt is written a tensor
    at a time.

    Args:
        weights: those of a whole DiT (`check_weights`). They are read in their own order.
        config: their sizes.
        out: folder to make; it may exist if it is empty.
        layout: "pt" for one file; "bin" or "safetensors" for shards with an index, or one file if one shard will do;
            "diffusers" for safetensors in the folder `transformer`, with `model_index.json` beside it.
        dtype: of the tensors that are written; None keeps each tensor's.
        metadata: written into the head of every .safetensors file.
        shard_size: size of the largest shard, such as "5GB".
        card: text of `README.md`, see `weights.card`; None writes none.
    Returns:
        What to open: the .pt, or the folder.
    Raises:
        CheckpointError: `out` exists and is not an empty folder, the disk is too small, or a tensor holds NaN or Inf.
    """
    planned = {name: weights.meta(name).to(dtype or weights.meta(name).dtype) for name in weights if name != UNUSED}
    with new_folder(out, sum(value.nbytes for value in planned.values())) as partial:
        folder, named = partial, {}
        if layout == "diffusers":
            folder, named = partial / TRANSFORMER_NAME, {"_class_name": "DiT"}
            folder.mkdir()
            index = {"_class_name": "DiffusionPipeline", TRANSFORMER_NAME: ["mugv_ds.models.dit", "DiT"]}
            (partial / MODEL_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        if layout == "pt":
            _save_pt(weights, planned, folder / PT_NAME)
        else:
            _save_shards(weights, planned, folder, layout, metadata or {}, shard_size)
        (folder / CONFIG_NAME).write_text(json.dumps(named | asdict(config), indent=2) + "\n")
        if weights.text_encoder is not None:
            write_text_encoder(folder, weights.text_encoder)
        if card is not None:
            (partial / CARD_NAME).write_text(card)
    out = out.absolute()
    return out / PT_NAME if layout == "pt" else out


@contextmanager
def new_folder(out: Path, needed: int) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `out` when that has succeeded and is removed otherwise.

    Args:
        out: folder to make; it may exist if it is empty. needed: bytes that will be written.

    Raises:
        CheckpointError: `out` exists and is not an empty folder, or the disk is too small.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CheckpointError(f"{out}: exists already; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if needed > free:
        raise CheckpointError(f"{out}: needs {needed:,} bytes, and {free:,} are free on that disk")
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    partial.chmod(0o755)  # mkdtemp lets only its maker in
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _save_pt(weights: Weights, planned: dict[str, Tensor], file: Path) -> None:
    """Writes one file: first without its data, which is then filled in through a memory mapping."""
    with torch.serialization.skip_data():
        torch.save({name: torch.empty_like(like, device="cpu") for name, like in planned.items()}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    for name, value in mapped.items():
        value.copy_(_read_one(weights, name, value.dtype))


def _save_shards(
    weights: Weights, planned: dict[str, Tensor], out: Path, layout: Layout, metadata: dict[str, str], shard_size: str
) -> None:
    """Writes shards with their index, or one file where one shard is enough."""
    plan = split_torch_state_dict_into_shards(planned, filename_pattern=_SHARDS[layout], max_shard_size=shard_size)
    for file, names in plan.filename_to_tensors.items():
        shard = _read(weights, {name: planned[name] for name in names})
        if file.endswith(".safetensors"):
            save_file(shard, out / file, metadata={"format": "pt"} | metadata)
        else:
            torch.save(shard, out / file)
        del shard  # so that it is not in memory beside the next one
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / INDEX_NAMES[layout]).write_text(json.dumps(index, indent=2) + "\n")


def _read(weights: Weights, planned: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reads the planned tensors in the planned dtypes, each alone in its storage, as files store them."""
    read = {name: _read_one(weights, name, like.dtype) for name, like in planned.items()}
    return {name: x if x.untyped_storage().nbytes() == x.nbytes else x.clone() for name, x in read.items()}


def _read_one(weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    """Reads one tensor, and raises CheckpointError if it holds NaN or Inf."""
    value = weights[name].to(dtype).contiguous()
    if not value.isfinite().all():
        raise CheckpointError(f"{weights.path}: {name} holds NaN or Inf; these weights cannot be used")
    return value
