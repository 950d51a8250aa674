"""Records of what the published code computed, and the distance to them."""

import json
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import safe_open

from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.videovae import VideoVAE, VideoVAEConfig

GOLDEN = Path(__file__).parents[1] / "golden"


def load_record(name: str) -> tuple[DiT, dict[str, torch.Tensor]]:
    """The model with a DiT record's weights, and the record's tensors."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        sizes = {key: int(value) for key, value in file.metadata().items()}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    model = DiT(DiTConfig(**sizes))
    model.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("param.")}, strict=True)
    return model, tensors


def run(model: DiT, r: dict[str, torch.Tensor], **kwargs) -> torch.Tensor:
    """The model's output for a DiT record's inputs."""
    return model(
        r["in.x"], r["in.timestep"], r["in.text"][:, 0], r["in.text_mask"], r["in.x_mask"], r["in.fps"],
        r["in.frame_index"], **kwargs,
    )  # fmt: skip


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    """‖value − reference‖ / ‖reference‖, in fp64."""
    value = value.detach()
    difference, scale = (value.double() - reference.double()).norm(), reference.double().norm()
    return float(difference / scale) if scale > 0 else float(difference)


def load_vae_record(name: str) -> tuple[VideoVAE, dict[str, torch.Tensor], dict[str, str]]:
    """The VideoVAE of a record's weights, the record's tensors and its metadata."""
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    sizes = {field.name: json.loads(metadata[field.name]) for field in fields(VideoVAEConfig)}
    vae = VideoVAE(VideoVAEConfig(**sizes))
    vae.load_state_dict({key[6:]: value for key, value in tensors.items() if key.startswith("param.")}, strict=True)
    return vae, tensors, metadata
