"""Weights in files as they are published, of the sizes of a record or of a toy."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.videovae import VideoVAEConfig
from tests.helpers.records import GOLDEN


def read_i2v(name: str) -> tuple[dict[str, Tensor], dict]:
    """An image-to-video record: its tensors, and its metadata with the values parsed."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = {key: value if key == "prompt" else json.loads(value) for key, value in file.metadata().items()}
    return tensors, metadata


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def dit_config(metadata: dict) -> DiTConfig:
    return DiTConfig(**{field.name: metadata[field.name] for field in fields(DiTConfig) if field.name in metadata})


def write_vae(folder: Path, tensors: dict[str, Tensor], metadata: dict) -> Path:
    """Writes the VideoVAE of an image-to-video record as `vae.pt`, with its sizes beside it."""
    torch.save(part(tensors, "vae."), folder / "vae.pt")
    sizes = {field.name: metadata[field.name] for field in fields(VideoVAEConfig)}
    (folder / "vae.json").write_text(json.dumps(sizes))
    return folder / "vae.pt"


def write_dit(folder: Path, state: dict[str, Tensor], config: DiTConfig) -> Path:
    """Writes a DiT as `dit.pt`, with its sizes beside it."""
    torch.save(state, folder / "dit.pt")
    (folder / "config.json").write_text(json.dumps(asdict(config)))
    return folder / "dit.pt"


def toy_dit(config: DiTConfig) -> DiT:
    """Initial weights, but for the projections that start at zero: with those at zero no prompt would matter."""
    model = DiT(config)
    init_weights(model, "", seed=0)
    generator = torch.Generator().manual_seed(0)
    for projection in (model.final_layer.linear, *(block.cross_attn.proj for block in model.blocks)):
        torch.nn.init.normal_(projection.weight, std=0.2, generator=generator)
    return model
