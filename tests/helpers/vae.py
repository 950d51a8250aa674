"""Small sets of videos, configs that train a tiny VideoVAE on them, and runs of these in real processes."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mugv_ds.data.noise import generator
from mugv_ds.data.video import write_mp4
from tests.helpers.distributed import free_port, set_environment

SIZE = 24  # the smallest that the discriminator takes
FRAMES = 18
TINY = {
    "block_out_channels": [8, 8, 8, 8],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "temporal_filters": 8,
    "temporal_res_blocks": 1,
    "temporal_norm_groups": 4,
    "precision": "fp32",
}
_PATIENCE = 150.0

_context = multiprocessing.get_context("forkserver")


def draw_video(key: str, frames: int = FRAMES, size: tuple[int, int] = (SIZE, SIZE)) -> np.ndarray:
    """A square that moves over a colour, uint8 [F, H, W, 3]."""
    draw = generator("test video", key)
    video = np.empty((frames, *size, 3), np.uint8)
    video[:] = draw.integers(30, 226, 3)
    colour, row = draw.integers(0, 256, 3), int(draw.integers(size[0] // 2))
    for frame in range(frames):
        column = frame % (size[1] // 2)
        video[frame, row : row + 8, column : column + 8] = colour
    return video


def write_videos(root: Path, name: str = "train", count: int = 6, image: bool = True) -> Path:
    """Writes mp4 files of FRAMES frames and, with `image`, a png; returns their CSV."""
    root.mkdir(parents=True, exist_ok=True)
    lines = ["sample_id,video_path,num_frames"]
    for number in range(count):
        write_mp4(root / f"{name}-{number}.mp4", draw_video(f"{name} {number}"), 8.0)
        lines.append(f"{name}-{number},{name}-{number}.mp4,{FRAMES}")
    if image:
        Image.fromarray(draw_video(f"{name} image", frames=1)[0]).save(root / f"{name}.png")
        lines.append(f"{name}-image,{name}.png,1")
    (root / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return root / f"{name}.csv"


def write_vae_config(folder: Path, manifest: Path, **sections: dict) -> Path:
    """A config that trains a tiny VideoVAE on a CSV, with `sections` on top; everything goes into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "model": TINY,
        "data": {
            "manifest": str(manifest),
            "size": [SIZE, SIZE],
            "lengths": [{"frames": 1, "share": 1.0}, {"frames": 9, "share": 1.0}, {"frames": 16, "share": 1.0}],
            "global_batch_size": 2,
            "num_workers": 0,
        },
        "loss": {"perceptual": 0.0, "windows": [1, 2]},
        "optimizer": {"lr": 1e-3, "eps": 1e-8},
        "schedule": {"kind": "constant", "steps": 6, "warmup_steps": 1},
        "checkpoint": {"dir": str(folder / "checkpoints"), "save_every": 2, "keep_last": 9},
        "logging": {"dir": str(folder / "tensorboard"), "every": 1, "progress": False},
    }
    for name, section in sections.items():
        config[name] = config.get(name, {}) | section
    path = folder / "config.json"
    path.write_text(json.dumps(config))
    return path


class VaeRun:
    """A run of `world` ranks, which are forked from a server that has imported everything.

    Args:
        before: called in each rank before it trains.
    """

    def __init__(self, config: Path, world: int, *overrides: str, before: Callable[[], None] | None = None) -> None:
        self._log = config.parent / f"output-{time.time_ns()}"
        self._log.touch()
        arguments = ["--config", str(config), *(a for override in overrides for a in ("--set", override))]
        port = free_port()
        self.ranks = [
            _context.Process(target=_rank, args=(rank, world, port, self._log, arguments, before))
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def wait_for(self, reached: Callable[[], bool]) -> None:
        """Until something holds; fails when the run is over first."""
        deadline = time.monotonic() + _PATIENCE
        while not reached():
            assert time.monotonic() < deadline and any(rank.is_alive() for rank in self.ranks), self._log.read_text()
            time.sleep(0.01)

    def finish(self) -> tuple[list[int], str]:
        """Waits for the end; returns the exit status of each rank and what they printed."""
        for rank in self.ranks:
            rank.join(_PATIENCE)
        late = [rank for rank in self.ranks if rank.is_alive()]
        for rank in late:
            rank.kill()
        assert not late, self._log.read_text()
        return [rank.exitcode for rank in self.ranks], self._log.read_text()


def train_vae(config: Path, world: int, *overrides: str, before: Callable[[], None] | None = None) -> str:
    """A run from start to end, which must succeed; returns what it printed."""
    statuses, output = VaeRun(config, world, *overrides, before=before).finish()
    assert statuses == [0] * world, output
    return output


def without_onednn() -> None:
    """Has convolutions computed by PyTorch itself: in bf16 oneDNN's gradients are wrong."""
    torch.backends.mkldnn.set_flags(False)


def _rank(rank: int, world: int, port: int, log: Path, arguments: list[str], before: Callable[[], None] | None) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    set_environment(rank, world, port)
    from mugv_ds import train_vae
    from mugv_ds.config.command import leave

    if before is not None:
        before()
    leave(train_vae.main(arguments))
