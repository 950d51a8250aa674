"""The published Megatron training checkpoints as weights of a DiT. Megatron is not needed.

Two forms: one file a tensor-parallel rank ("legacy"), and torch.distributed.checkpoint with the layers stacked
("torch_dist"). Only weights are read, and only as data: see `files.tensor_archive` and `files.pickle_stream`.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.weights.base import UNUSED, Weights, is_stored, read_state
from mugv_ds.weights.megatron_names import STACKED, is_weight, published_name, published_rows, split_dimension
from mugv_ds.weights.torch_dist import METADATA_NAME, StackReader, StoredTensor, read_metadata

_LATEST = "latest_checkpointed_iteration.txt"
# Where the classes come from whose objects Megatron saves beside the weights.
_PASSED_OVER = (
    *("_io.", "argparse.", "collections.", "functools.", "pathlib.", "signal.", "types."),
    *("megatron.", "numpy.", "torch.", "transformer_engine."),
    *("_codecs.encode", "builtins.bytearray", "builtins.set", "builtins.complex"),  # bytes, sets and numbers
    *("__builtin__.bytearray", "__builtin__.set", "__builtin__.complex"),  # as protocol 2 calls them
)
_MAX_LATEST_BYTES = 1 << 10


def find_megatron(path: Path) -> Path | None:
    """The folder of a Megatron checkpoint's files: `path` itself, or the newest iteration in it. None: it is neither.

    Raises:
        CheckpointError: the file that names the newest iteration does not name one.
    """
    if (path / METADATA_NAME).is_file() or any(path.glob("mp_rank_*")):
        return path
    latest = path / _LATEST
    if not latest.is_file():
        return None
    text = read_text_file(latest, _MAX_LATEST_BYTES, CheckpointError).strip()
    name = f"iter_{int(text):07d}" if re.fullmatch(r"[0-9]{1,9}", text) else text
    if not re.fullmatch(r"iter_[0-9]+|release", name) or not (path / name).is_dir():
        raise CheckpointError(f"{latest}: names {text!r}, which is no iteration in this folder")
    return path / name


def open_megatron(folder: Path) -> "MegatronWeights":
    """The weights in a folder that `find_megatron` found.

    Raises:
        CheckpointError: its files cannot be read or are not those of a DiT.
    """
    is_stacked = (folder / METADATA_NAME).is_file()
    return MegatronWeights(MegatronStacked(folder) if is_stacked else MegatronLegacy(folder))


class MegatronWeights(Weights):
    """Weights by published name, from tensors by Megatron name (a layer's index in it); q, k and v rows reordered.

    Raises:
        CheckpointError: there is a tensor that a DiT has not.
    """

    def __init__(self, source: Weights) -> None:
        self.path = source.path
        self._source = source
        self._theirs: dict[str, str] = {}
        for theirs in source:
            name = published_name(theirs)
            if name is None:
                raise CheckpointError(f"{self.path}: has {theirs}, which a DiT has not")
            if name != UNUSED:
                self._theirs[name] = theirs

    def __getitem__(self, name: str) -> Tensor:
        return published_rows(name, self._source[self._theirs[name]])

    def meta(self, name: str) -> Tensor:
        return self._source.meta(self._theirs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._theirs)

    def __len__(self) -> int:
        return len(self._theirs)


class MegatronLegacy(Weights):
    """Tensors by Megatron name from `mp_rank_YY/model_optim_rng.pt`, mapped, the ranks' parts joined when asked for.

    What Megatron saves beside the weights (arguments, random state) is passed over: no class or function that a file
    names is looked up. A file that names one from elsewhere than `_PASSED_OVER` is refused, and so are
    files of pipeline parallelism.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = sorted(folder.name for folder in path.glob("mp_rank_*"))
        if found != [f"mp_rank_{rank:02d}" for rank in range(len(found))]:
            raise CheckpointError(
                f"{path}: holds {', '.join(found)}; wanted are mp_rank_00, mp_rank_01, … of tensor parallelism alone"
            )
        self._ranks = [_load_rank(path / rank / "model_optim_rng.pt") for rank in found]
        first, *others = self._ranks
        for rank, other in enumerate(others, start=1):
            for name in sorted(first.keys() ^ other.keys()):
                raise CheckpointError(f"{path}: {name} is in only one of mp_rank_00 and mp_rank_{rank:02d}")
            for name, value in other.items():
                if value.shape != first[name].shape or value.dtype != first[name].dtype:
                    raise CheckpointError(f"{path}: {name} differs in shape or dtype between mp_rank_00 and {rank:02d}")

    def __getitem__(self, name: str) -> Tensor:
        parts = [rank[name] for rank in self._ranks]
        dimension = split_dimension(name)
        if dimension is not None:
            return torch.cat(parts, dimension)
        if any(not torch.equal(parts[0], part) for part in parts[1:]):
            raise CheckpointError(
                f"{self.path}: {name} is not split over the ranks, and yet they hold different values"
            )
        return parts[0]

    def meta(self, name: str) -> Tensor:
        value, dimension = self._ranks[0][name], split_dimension(name)
        shape = list(value.shape)
        if dimension is not None and dimension < len(shape):
            shape[dimension] *= len(self._ranks)
        return torch.empty(shape, dtype=value.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranks[0])

    def __len__(self) -> int:
        return len(self._ranks[0])


class MegatronStacked(Weights):
    """Tensors by Megatron name from a torch_dist folder, the stacked ones layer by layer, one stack after the other."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = StackReader()
        self._place: dict[str, tuple[StoredTensor, int]] = {}
        for name, stored in read_metadata(path, is_weight).items():
            if not (name.startswith(STACKED) and stored.shape):
                self._place[name] = (stored.stacked(), 0)
                continue
            for layer in range(stored.shape[0]):
                self._place[f"{STACKED}{layer}.{name.removeprefix(STACKED)}"] = (stored, layer)

    def __getitem__(self, name: str) -> Tensor:
        return self._reader.read(*self._place[name])

    def meta(self, name: str) -> Tensor:
        stored, _ = self._place[name]
        return torch.empty(stored.shape[1:], dtype=stored.dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def _load_rank(file: Path) -> dict[str, Tensor]:
    """The weights in a rank's file, mapped.

    Raises:
        CheckpointError: the file is missing, broken, or names classes from elsewhere.
    """
    state = read_state(file, _PASSED_OVER)
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{file}: has no model (virtual pipeline stages cannot be read)")
    weights = {name: value for name, value in state["model"].items() if is_weight(str(name))}
    for name, value in weights.items():
        if not (isinstance(name, str) and isinstance(value, Tensor) and is_stored(value)):
            raise CheckpointError(f"{file}: {name} is not a plain tensor")
    return weights
