"""Weights in the published format: read from any of its files, written from a training checkpoint.

The format is `DiT.state_dict()`, as one `.pt`, as one `.safetensors`, or as a folder of shards with an index. Tensors
are memory-mapped and handled a layer at a time; docs/performance.md says how much memory that takes.
"""

import json
import mmap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.models.dit import DiT

CONFIG_NAME = "config.json"
PT_NAME = "dit.pt"
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SHARD_SIZE = "5GB"


class PublishedWeights(Mapping[str, Tensor]):
    """The tensors of published-format weights by name, each read when it is asked for.

    Args:
        path: a `.pt`/`.bin`/`.safetensors` file, or a folder that holds one of them or shards with their index.

    Raises:
        CheckpointError: there are no weights at `path`, or a file is not what its name says.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._file_of = {name: file for file in self._files() for name in _names(file)}

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(name)
        return _load_pt(file)[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _files(self) -> list[Path]:
        if self.path.is_file():
            return [self.path]
        for name in _INDEX_NAMES:
            if (self.path / name).is_file():
                return [self._inside(shard) for shard in sorted(set(_read_index(self.path / name).values()))]
        found = [file for file in (self.path / PT_NAME, self.path / "model.safetensors") if file.is_file()]
        if not found:
            raise CheckpointError(
                f"{self.path}: holds no weights ({PT_NAME}, model.safetensors, or shards with an index)"
            )
        return found[:1]

    def _inside(self, shard: str) -> Path:
        file = self.path / shard
        if Path(shard).name != shard or not file.is_file():
            raise CheckpointError(f"{self.path}: its index names {shard!r}, which is not a file in this folder")
        return file


def load_into(path: str | Path, layers: Iterable[tuple[str, nn.Module]]) -> None:
    """Copies published-format weights into parts of a DiT, each with the prefix of its names.

    Raises:
        CheckpointError: a tensor is missing or has another shape.
    """
    weights = PublishedWeights(path)
    for prefix, layer in layers:
        state = {}
        for name, parameter in layer.state_dict().items():
            if prefix + name not in weights:
                raise CheckpointError(f"{path}: has no {prefix + name}; it is not a DiT of this depth")
            state[name] = weights[prefix + name]
            if state[name].shape != parameter.shape:
                raise CheckpointError(
                    f"{path}: {prefix + name} is {list(state[name].shape)}, the model wants {list(parameter.shape)}"
                )
        layer.load_state_dict(state, strict=True)


def load_dit(path: str | Path) -> DiT:
    """The model of published-format weights with their `config.json` beside them; tensors keep their dtype.

    Raises:
        CheckpointError: weights or sizes are missing or do not fit.
    """
    path = Path(path)
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    try:
        config = DiTConfig(**json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: must hold the model's sizes, as the converter writes them: {error}") from None
    with torch.device("meta"):
        model = DiT(config)
    weights = PublishedWeights(path)
    try:
        model.load_state_dict(dict(weights), strict=True, assign=True)
    except RuntimeError as error:
        raise CheckpointError(f"{path}: not the weights of the sizes in {file}: {_one_line(error)}") from None
    return model


class TrainedWeights(Mapping[str, Tensor]):
    """The weights of a training checkpoint by published name, each read and rounded when it is asked for.

    Args:
        saved: the checkpoint. dtype: of the tensors.
    """

    def __init__(self, saved: CheckpointReader, dtype: torch.dtype) -> None:
        self._saved, self._dtype = saved, dtype

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.read(name).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.names())

    def __len__(self) -> int:
        return len(self._saved.names())


def export(checkpoint: Path, out: Path, *, layout: str) -> Path:
    """Writes a training checkpoint in the published format, with `config.json`; returns the weights' path.

    The weights are in the precision that the run computed with, and are what it computed with, bit for bit.

    Args:
        checkpoint: a run's folder (its newest sound checkpoint is taken) or a `step-<n>` folder in it.
        out: folder to write. layout: "pt" for one file, "safetensors" for shards of 5 GB with an index.

    Raises:
        CheckpointError: the checkpoint cannot be used, or is not a whole DiT.
    """
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; name a folder")
    with open_checkpoint(checkpoint) as saved:
        run = saved.run_config()
        config, dtype = run.model.dit(), torch.bfloat16 if run.model.precision == "bf16" else torch.float32
        with torch.device("meta"):
            empty = {name: value.to(dtype) for name, value in DiT(config).state_dict().items()}
        _check_complete(saved, empty)
        out.mkdir(parents=True, exist_ok=True)
        (out / CONFIG_NAME).write_text(json.dumps(asdict(config), indent=2) + "\n")
        weights = TrainedWeights(saved, dtype)
        if layout == "pt":
            _save_pt(weights, empty, out / PT_NAME)
            return out / PT_NAME
        _save_shards(weights, empty, out)
    return out


def _check_complete(saved: CheckpointReader, empty: Mapping[str, Tensor]) -> None:
    here = {name: tuple(value.shape) for name, value in empty.items()}
    there = {name: saved.shape(name) for name in saved.names()}
    odd = sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))
    if odd:
        raise CheckpointError(
            f"{saved.folder}: not a DiT of the sizes in its config; {len(odd)} tensors differ, the first is {odd[0]}"
        )


def _save_pt(weights: Mapping[str, Tensor], empty: Mapping[str, Tensor], file: Path) -> None:
    """One file, made without its data and then filled a tensor at a time through a mapping."""
    with torch.serialization.skip_data():
        torch.save({name: torch.empty_like(value, device="cpu") for name, value in empty.items()}, file)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        mapped = _load_pt(file)
    for name, value in mapped.items():
        value.copy_(weights[name])


def _save_shards(weights: Mapping[str, Tensor], empty: dict[str, Tensor], out: Path) -> None:
    plan = split_torch_state_dict_into_shards(empty, max_shard_size=_SHARD_SIZE)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: weights[name] for name in names}, out / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (out / _INDEX_NAMES[0]).write_text(json.dumps(index, indent=2) + "\n")


def _read_index(file: Path) -> dict[str, str]:
    """Which shard each tensor is in."""
    try:
        placed = json.loads(file.read_text())["weight_map"]
        if all(isinstance(shard, str) for shard in placed.values()):
            return placed
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: must hold a weight_map of tensors to shards: {_one_line(error)}") from None
    raise CheckpointError(f"{file}: its weight_map must give a file name for each tensor")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _names(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(_load_pt(file))
    try:
        with safe_open(file, "pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file: {_one_line(error)}") from None


def _load_pt(file: Path) -> dict[str, Tensor]:
    """The state dict in a file; its tensors are mapped, not read."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read as plain tensors: {_one_line(error)}") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    return state
