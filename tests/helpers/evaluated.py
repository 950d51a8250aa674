"""A small evaluation, as `make eval` leaves it: of each of the weights a video, latent and text features a prompt."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mugv_ds.data.video import video_name, write_mp4
from mugv_ds.evaluation.results import (
    ListedJob,
    Listing,
    first_frame_path,
    latent_path,
    text_features_path,
    weights_folder,
    write_listing,
)
from tests.helpers.dataset import write_text

MADE = {"settings": {"fps": 8.0, "output_fps": 8.0, "frames": 16}}


def write_evaluation(
    folder: Path,
    weights: Sequence[str],
    prompts: Sequence[str],
    *,
    size: tuple[int, int] = (48, 48),
    frames: int = 8,
    images: bool = False,
    keep: bool = True,
    latent: Callable[[str, int], torch.Tensor] | None = None,
) -> Path:
    """Writes it; returns the folder.

    Args:
        size: height and width. images: whether every second prompt has a first frame. keep: latents and features.
        latent: makes that of the weights' video of a prompt; random ones by default.
    """
    generator = torch.Generator().manual_seed(0)
    jobs = []
    for number, prompt in enumerate(prompts):
        name = video_name(number, prompt)
        image = name if images and number % 2 == 0 else None
        jobs.append(ListedJob(name=name, made={"prompt": prompt, "seed": 0, "draw": 0}, image=image, text=name))
        if image:
            first_frame_path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(moving_square(number, 0, size)).save(first_frame_path(folder, name))
        if keep:
            text_features_path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            write_text(text_features_path(folder, name), 2 + number % 3, generator)
    made = {name: MADE | {"weights": name} for name in weights}
    folder.mkdir(parents=True, exist_ok=True)
    write_listing(folder, Listing(weights=made, jobs=tuple(jobs)))
    for place, name in enumerate(weights):
        weights_folder(folder, name).mkdir(exist_ok=True)
        for number, job in enumerate(jobs):
            video = weights_folder(folder, name) / f"{job.name}.mp4"
            moved = [moving_square(number + 7 * place, t * (place + 1), size) for t in range(frames)]
            write_mp4(video, np.stack(moved), 8.0)
            video.with_suffix(".json").write_text(json.dumps(made[name] | job.made))
            if keep:
                latent_path(folder, name, job.name).parent.mkdir(exist_ok=True)
                made_latent = latent(name, number) if latent else torch.randn(24, 2, 6, 6, generator=generator)
                torch.save(made_latent, latent_path(folder, name, job.name))
    return folder


def moving_square(number: int, t: int, size: tuple[int, int]) -> np.ndarray:
    """Returns a frame [H, W, 3] of a square that moves right, in colours of its number."""
    height, width = size
    colours = np.random.default_rng(number).integers(0, 256, (2, 3))
    frame = np.broadcast_to(colours[0], (height, width, 3)).astype(np.uint8)
    side = min(size) // 4
    left = (number * 5 + t * max(1, width // 24)) % (width - side)
    frame[height // 3 : height // 3 + side, left : left + side] = colours[1]
    return frame
