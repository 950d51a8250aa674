"""A small data set in the published format, of random numbers: enough to train on, nothing to learn."""

import csv
import json
from collections.abc import Container
from pathlib import Path

import torch

from mugv_ds.data.shards import write_shard

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


def shard_dataset(manifest: Path, rows: Container[int], size: int = 3, name: str = "sharded") -> Path:
    """Writes the tensors of `rows` of a data set into shards of `size` samples, and a manifest of the same samples.

    Their files are removed; the other rows keep theirs.
    """
    root, sharded = manifest.parent, manifest.with_name(f"{name}.csv")
    with manifest.open(newline="") as file:
        records = list(csv.DictReader(file))
    moved = [record for i, record in enumerate(records) if i in rows]
    for unit in range(0, len(moved), size):
        members = moved[unit : unit + size]
        for column, folder in (("latent_path", "latents"), ("text_feat_path", "text_features")):
            shard, tensors = f"{folder}/{name}{unit // size:06}.safetensors", {}
            for record in members:
                content = torch.load(root / record[column], weights_only=True)
                tensors[record["sample_id"]] = content if column == "latent_path" else content["y"][0, 0]
                (root / record[column]).unlink()
                record[column] = f"{shard}#{record['sample_id']}"
            write_shard(root / shard, tensors)
    with sharded.open("w", newline="") as file:
        writer = csv.DictWriter(file, records[0])
        writer.writeheader()
        writer.writerows(records)
    return sharded
