"""The interface of every source of weights, and the check that its tensors are those of a model."""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mugv_ds.config import ConfigError
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import HEAD_DIM, PRESETS, DiTConfig
from mugv_ds.config.text_encoder import TextEncoderInfo
from mugv_ds.files.tensor_archive import PARAMETER, ArchiveError, read_archive
from mugv_ds.models.dit import DiT

# A null caption that some training checkpoints carry and the published weights do not.
UNUSED = "y_embedder.y_embedding"


class Weights(Mapping[str, Tensor]):
    """Maps published names to the tensors of a model, each of which is read when it is asked for.

    Attributes:
        path: what errors name as the source.
        text_encoder: what made the text features that they were trained on; None where that is not known.
    """

    path: Path
    text_encoder: TextEncoderInfo | None = None

    def __contains__(self, name: object) -> bool:
        return any(name == own for own in self)  # Mapping's own method would read the tensor to find out

    @abstractmethod
    def meta(self, name: str) -> Tensor:
        """Returns a tensor on the meta device, for its shape and dtype; the data is not read."""


def meta_state(config: DiTConfig) -> dict[str, Tensor]:
    """Returns the state dict of a DiT of these sizes on the meta device, in the model's order."""
    with torch.device("meta"):
        return DiT(config).state_dict()


def check_weights(weights: Weights, config: DiTConfig) -> None:
    """Checks that the weights' names and shapes are those of a DiT. A null caption (`UNUSED`) may be among them.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or holds no floating-point numbers.
    """
    check_state(weights, meta_state(config), f"DiT of depth {config.depth}", extra=(UNUSED,))


def check_state(weights: Weights, wanted: Mapping[str, Tensor], model: str, extra: tuple[str, ...] = ()) -> None:
    """Checks that the weights' names and shapes are those of a state dict.

    Args:
        wanted: the state dict. model: what errors call it. extra: names that may be there too.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of another shape, or holds no floating-point numbers.
    """
    given = set(weights)
    for name, like in wanted.items():
        if name not in given:
            raise CheckpointError(f"{weights.path}: has no {name}; it is not a whole {model}")
        found = weights.meta(name)
        if found.shape != like.shape:
            raise CheckpointError(f"{weights.path}: {name} is {list(found.shape)}, the model wants {list(like.shape)}")
        if not found.is_floating_point():
            raise CheckpointError(f"{weights.path}: {name} is {found.dtype}, and must be floating-point")
    if unexpected := given - wanted.keys() - {*extra}:
        raise CheckpointError(f"{weights.path}: has {min(unexpected)}, which a {model} has not")


def infer_sizes(weights: Weights) -> DiTConfig:
    """Infers a DiT's sizes from names and shapes of a few weights; `check_weights` then checks every tensor.

    Raises:
        CheckpointError: the names and shapes are not those of a DiT.
    """
    try:
        (width,) = weights.meta("start_token").shape
        _, in_channels, *_ = weights.meta("x_embedder.proj.weight").shape
        _, caption_channels = weights.meta("y_embedder.y_proj.fc1.weight").shape
        mlp_width, _ = weights.meta("blocks.0.mlp.fc1.weight").shape
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        return DiTConfig(width, width // HEAD_DIM, depth, caption_channels, in_channels, mlp_width // width)
    except CheckpointError:
        raise
    except KeyError as error:
        raise CheckpointError(f"{weights.path}: has no {error.args[0]}; it is not a DiT") from None
    except (ConfigError, ValueError, ZeroDivisionError) as error:
        raise CheckpointError(f"{weights.path}: has not the shapes of a DiT: {error}") from None


def preset_of(config: DiTConfig) -> str | None:
    """Returns the name of the preset of these sizes, None if there is none."""
    return next((name for name, preset in PRESETS.items() if preset == config), None)


def read_state(file: Path, beside: tuple[str, ...] = ()) -> Any:
    """What torch.save put into a file of weights, its tensors mapped, not read.

    Args:
        file: the file. beside: see `read_archive`; parameters may be there too.

    Raises:
        CheckpointError: it is missing, or no file of plain tensors.
    """
    try:
        return read_archive(file, beside=(PARAMETER, *beside))
    except ArchiveError as error:
        raise CheckpointError(f"{file}: cannot be read as plain tensors: {error}") from None
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None


def is_stored(value: Tensor) -> bool:
    """Tells whether every element of a loaded tensor was in its file: strides of 0 let a small file claim any size."""
    return (
        value.device.type == "cpu"
        and value.layout == torch.strided
        and value.nbytes <= value.untyped_storage().nbytes()
    )
