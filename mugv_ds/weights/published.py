"""Weights in the published format: read from any of its files, written from a training checkpoint.

The format is `DiT.state_dict()`, as one file or as a folder of shards with an index. Tensors are memory-mapped and
handled one at a time; docs/performance.md says how much memory that takes.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mugv_ds.checkpoint.reader import CheckpointReader, open_checkpoint
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.text_encoder import TextEncoderInfo, read_text_encoder
from mugv_ds.models.dit import DiT
from mugv_ds.weights.base import Weights, check_weights, is_stored, read_state
from mugv_ds.weights.save import (
    CONFIG_NAME,
    INDEX_NAMES,
    MODEL_INDEX_NAME,
    SINGLE_NAMES,
    TRANSFORMER_NAME,
    Layout,
    save_weights,
)

_MAX_CONFIG_BYTES = 1 << 20
_MAX_INDEX_BYTES = 1 << 24  # 100,000 tensors
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class PublishedWeights(Weights):
    """The tensors of published-format weights.

    Args:
        path: a `.pt`/`.bin`/`.safetensors` file, or a folder that holds one of them or shards with their index.

    Raises:
        CheckpointError: there are no weights at `path`, a file is not what its name says, or the index does not say
            what the shards hold.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = _transformer(Path(path))
        self._mapped: tuple[Path | None, dict[str, Tensor]] = (None, {})
        self._file_of = self._placed()

    def __getitem__(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                return tensors.get_tensor(name)
        return self._map(file)[name]

    def meta(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file.suffix != ".safetensors":
            return self._map(file)[name].to("meta")
        with safe_open(file, "pt") as tensors:
            found = tensors.get_slice(name)
            if found.get_dtype() not in _DTYPES:
                raise CheckpointError(f"{file}: {name} is {found.get_dtype()}, and must be one of {', '.join(_DTYPES)}")
            return torch.empty(found.get_shape(), dtype=_DTYPES[found.get_dtype()], device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    @property
    def text_encoder(self) -> TextEncoderInfo | None:
        """What the file beside them says.

        Raises:
            InputError: it cannot be read.
        """
        return read_text_encoder(self.path if self.path.is_dir() else self.path.parent)

    @property
    def files(self) -> list[Path]:
        """Those that hold the tensors, by name."""
        return sorted(set(self._file_of.values()))

    def _placed(self) -> dict[str, Path]:
        """The file of each tensor."""
        if self.path.is_file():
            return dict.fromkeys(_names(self.path), self.path)
        for name in INDEX_NAMES.values():
            if (self.path / name).is_file():
                return self._sharded(_read_index(self.path / name))
        for name in SINGLE_NAMES:
            if (self.path / name).is_file():
                return dict.fromkeys(_names(self.path / name), self.path / name)
        raise CheckpointError(f"{self.path}: holds no weights ({', '.join(SINGLE_NAMES)}, or shards with an index)")

    def _sharded(self, shard_of: dict[str, str]) -> dict[str, Path]:
        files = {shard: self._inside(shard) for shard in sorted(set(shard_of.values()))}
        for shard, file in files.items():
            differing = set(_names(file)) ^ {name for name, its in shard_of.items() if its == shard}
            if differing:
                raise CheckpointError(
                    f"{file}: {min(differing)} is only in one of this file and the index; one of the two is not whole"
                )
        return {name: files[shard] for name, shard in shard_of.items()}

    def _inside(self, shard: str) -> Path:
        file = self.path / shard
        if Path(shard).name != shard or not file.is_file():
            raise CheckpointError(f"{self.path}: its index names {shard!r}, which is not a file in this folder")
        return file

    def _map(self, file: Path) -> dict[str, Tensor]:
        """The mapped tensors of a file; the last file is kept open, because the next tensor is mostly from it too."""
        if self._mapped[0] != file:
            self._mapped = (file, _load_pt(file))
        return self._mapped[1]


def _transformer(path: Path) -> Path:
    """The folder of the weights in one that is laid out as diffusers has it; any other path as it is."""
    return path / TRANSFORMER_NAME if (path / MODEL_INDEX_NAME).is_file() else path


def load_dit(path: str | Path) -> DiT:
    """The model of published-format weights with their `config.json` beside them; tensors keep their dtype.

    Raises:
        CheckpointError: weights or sizes are missing or do not fit.
    """
    config = read_dit_config(path)
    with torch.device("meta"):
        model = DiT(config)
    weights = PublishedWeights(path)
    check_weights(weights, config)
    model.load_state_dict(dict(weights), strict=True, assign=True)
    return model


def read_dit_config(path: str | Path) -> DiTConfig:
    """The sizes of published-format weights, from the `config.json` beside them.

    Raises:
        CheckpointError: it is missing, or does not hold the sizes of a DiT.
    """
    path = _transformer(Path(path))
    if not path.exists():
        raise CheckpointError(f"{path}: there is no such file or folder of weights")
    file = (path if path.is_dir() else path.parent) / CONFIG_NAME
    try:
        given = json.loads(read_text_file(file, _MAX_CONFIG_BYTES))
        return DiTConfig(**{name: value for name, value in given.items() if name != "_class_name"})
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file}: must hold the model's sizes, as the converter writes them: {_one_line(error)}"
        ) from None


class TrainedWeights(Weights):
    """The weights of a training checkpoint by published name, each read and rounded when it is asked for.

    Args:
        saved: the checkpoint. dtype: of the tensors.
    """

    def __init__(self, saved: CheckpointReader, dtype: torch.dtype) -> None:
        self.path, self._saved, self._dtype = saved.folder, saved, dtype
        self.text_encoder = saved.manifest.text_encoder

    def __getitem__(self, name: str) -> Tensor:
        return self._saved.read(name).to(self._dtype)

    def meta(self, name: str) -> Tensor:
        return torch.empty(self._saved.shape(name), dtype=self._dtype, device="meta")

    def __iter__(self) -> Iterator[str]:
        return iter(self._saved.names())

    def __len__(self) -> int:
        return len(self._saved.names())


def export(
    checkpoint: Path, out: Path, *, layout: Layout, licence: str = "other", evaluation: Path | None = None
) -> Path:
    """Writes a training checkpoint in the published format, see `save_weights`; returns the weights' path.

    The weights are in the precision that the run computed with, and are what it computed with, bit for bit. Adapters
    are merged into their base first, see `weights.lora.MergedWeights`.

    Args:
        checkpoint: a run's folder (its newest sound checkpoint is taken) or a `step-<n>` folder in it.
        out: folder to make. layout: see `save_weights`. licence, evaluation: for the card, see `weights.card`.

    Raises:
        InputError: the evaluation cannot be read.
        CheckpointError: the checkpoint cannot be used, or is not a whole DiT; or the base of its adapters cannot.
    """
    from mugv_ds.weights.card import model_card
    from mugv_ds.weights.lora import check_base, whole_weights  # which read published weights, the base

    with open_checkpoint(checkpoint) as saved:
        config = saved.run_config().model.dit()
        check_base(saved.manifest)
        weights = whole_weights(saved)
        check_weights(weights, config)
        card = model_card(saved, layout, licence=licence, evaluation=evaluation)
        return save_weights(weights, config, out, layout, card=card)


def _read_index(file: Path) -> dict[str, str]:
    """Which shard each tensor is in."""
    try:
        placed = json.loads(read_text_file(file, _MAX_INDEX_BYTES))["weight_map"]
        if all(isinstance(shard, str) for shard in placed.values()):
            return placed
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
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
    state = read_state(file)
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise CheckpointError(f"{file}: must hold a dict of tensors")
    for name, value in state.items():
        if not is_stored(value):
            raise CheckpointError(f"{file}: {name} claims elements that the file does not store")
    return state
