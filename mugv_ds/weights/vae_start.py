"""The weights that a run of the VideoVAE starts from, and those that are made of its checkpoints."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import StartWeights
from mugv_ds.checkpoint.places import newest_manifest
from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.schema import CheckpointSection
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.files.atomic import write_atomically
from mugv_ds.models.videovae.training import load_image_vae
from mugv_ds.models.videovae.vae import VideoVAE
from mugv_ds.weights.base import Weights, check_state
from mugv_ds.weights.located import located
from mugv_ds.weights.published import PublishedWeights, TrainedWeights
from mugv_ds.weights.start import find_start

First = Callable[[Callable[[], Any]], Any]  # calls a function on rank 0 and gives its result to all
BUFFERS = ("shift", "scale")


def find_vae_weights(config: VaeTrainConfig, first: First) -> tuple[StartWeights, bool]:
    """Returns the weights that a run starts from, or has started from, and whether it starts afresh.

    Args:
        first: called for what reads files, so that one rank does.

    Raises:
        CheckpointError: there are no sound weights.
    """
    saved = first(lambda: _saved_start(config.checkpoint))
    if saved is not None:
        return StartWeights(**saved), False
    init = config.checkpoint.init_from
    path = first(lambda: str(find_start(init))) if init else config.model.image_vae
    return StartWeights(path=path, digest=None), True


def _saved_start(section: CheckpointSection) -> dict[str, Any] | None:
    manifest = newest_manifest(section)
    return None if manifest is None else manifest.start.model_dump()


def put_in(config: VaeTrainConfig, start: StartWeights, vae: VideoVAE) -> None:
    """Puts the weights of `find_vae_weights` into a VideoVAE: an image VAE's into its spatial half, others into all.

    `shift` and `scale` take no part in training and stay as they are.

    Raises:
        CheckpointError: they cannot be read, or are those of other sizes.
    """
    if config.checkpoint.init_from is None:
        load_image_vae(vae, start.path)
        return
    load_vae_parameters(located(start.path), vae)


def load_vae_parameters(path: Path, vae: VideoVAE) -> None:
    """Copies the parameters in a file or a checkpoint into a VideoVAE, whose shift and scale stay.

    Args:
        path: see `weights.start.find_start`.

    Raises:
        CheckpointError: they cannot be read, or are those of other sizes.
    """
    wanted = dict(vae.named_parameters())
    if (path / files.MANIFEST_NAME).exists():
        weights: Weights = _Parameters(CheckpointReader(path, files.read_manifest(path)), wanted)
        check_state(weights, wanted, "VideoVAE of these sizes")
    else:
        weights = PublishedWeights(path)
        check_state(weights, wanted, "VideoVAE of these sizes", extra=BUFFERS)
    vae.load_state_dict({name: weights[name] for name in wanted}, strict=False)


class _Parameters(TrainedWeights):
    """The parameters of the VideoVAE in a training checkpoint, which may hold a discriminator too.

    `logvar` has a dimension there that it has not as published.
    """

    def __init__(self, saved: CheckpointReader, wanted: Mapping[str, Tensor]) -> None:
        super().__init__(saved, torch.float32)
        self._names = [name for name in saved.names() if name in wanted]

    def __getitem__(self, name: str) -> Tensor:
        return self._published(name, super().__getitem__(name))

    def meta(self, name: str) -> Tensor:
        return self._published(name, super().meta(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @staticmethod
    def _published(name: str, value: Tensor) -> Tensor:
        return value.view(()) if name == "logvar" else value


def save_video_vae(
    state: Mapping[str, Tensor], config: VideoVAEConfig, out: Path, layout: Literal["pt", "safetensors"]
) -> Path:
    """Writes a VideoVAE's whole state dict as `vae.pt` or `vae.safetensors`, with its sizes in `vae.json` beside it.

    `weights.videovae.load_video_vae` reads it, and so does what reads the published vae.pt.

    Args:
        state: see `VideoVAE.state_dict`. out: folder, which is made.

    Returns:
        The path of the weights.

    Raises:
        CheckpointError: a tensor holds NaN or Inf, or the folder has such a file already.
    """
    path = out / f"vae.{layout}"
    if path.exists():
        raise CheckpointError(f"{path}: exists already; name another folder")
    for name, value in state.items():
        if not value.isfinite().all():
            raise CheckpointError(f"{name} holds NaN or Inf; these weights cannot be used")
    out.mkdir(parents=True, exist_ok=True)
    whole = {name: value.contiguous() for name, value in state.items()}
    (out / "vae.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
    if layout == "pt":
        with write_atomically(path) as stream:
            torch.save(whole, stream)
    else:
        save_file(whole, path, metadata={"format": "pt"})
    return path
