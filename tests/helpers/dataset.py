"""A small data set in the published format, of random numbers: enough to train on, nothing to learn."""

import csv
import json
from pathlib import Path

import torch

CHANNELS, TEXT_TOKENS = 16, 6


def write_dataset(root: Path, shapes: list[tuple[int, int, int]], name: str = "train") -> Path:
    """Writes one sample for each latent shape (T, H, W), and null-text features; returns the manifest."""
    (root / "latents").mkdir(parents=True, exist_ok=True)
    (root / "text_features").mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(sum(name.encode()))
    manifest = root / f"{name}.csv"
    with manifest.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sample_id", "source", "latent_path", "text_feat_path"])
        for i, shape in enumerate(shapes):
            sample = f"{name}-{i}"
            torch.save(torch.randn(24, *shape, generator=generator), root / f"latents/{sample}.pt")
            write_text(root / f"text_features/{sample}_text.pt", 1 + i % TEXT_TOKENS, generator)
            rows.writerow([sample, "generated", f"latents/{sample}.pt", f"text_features/{sample}_text.pt"])
    write_text(root / "text_features/negative.pt", TEXT_TOKENS, generator)
    return manifest


def write_text(path: Path, tokens: int, generator: torch.Generator) -> None:
    y = torch.randn(1, 1, tokens, CHANNELS, generator=generator)
    torch.save({"y": y, "mask": torch.ones(1, tokens, dtype=torch.int64)}, path)


def write_config(folder: Path, manifest: Path, **sections: dict) -> Path:
    """A config that trains a tiny fp32 model on the manifest, with `sections` on top; everything goes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": {
            "preset": "mugdit_debug",
            "hidden_size": 144,
            "num_heads": 2,
            "caption_channels": CHANNELS,
            "precision": "fp32",
        },
        "data": {
            "manifest": str(manifest),
            "null_text_path": "text_features/negative.pt",
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "max_text_tokens": TEXT_TOKENS,
            "num_workers": 0,
        },
        "flow": {"first_frame_share": 0.5},
        "optimizer": {"lr": 1e-3},
        "schedule": {"kind": "cosine", "steps": 10, "warmup_steps": 3},
        "checkpoint": {"dir": str(folder / "checkpoints"), "save_every": 6},
        "logging": {"dir": str(folder / "tensorboard"), "every": 2, "progress": False},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path
