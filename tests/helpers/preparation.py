"""Small preparations: videos, weights and a config, and runs of the real command on them."""

import contextlib
import hashlib
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from mugv_ds.models.codec import LinearCodec
from tests.helpers.film import draw_film, write_film

ROOT = Path(__file__).parents[2]
FRAMES, FPS = 40, 20
CONFIG = {
    "scan": {"unit": 2},
    "split": {"min_seconds": 0.8},
    "select": {"sharp": {"low": None, "high": None}, "duration": {"low": None}},
    "encode": {
        "buckets": [{"height": 64, "width": 80, "frames": 16, "fps": 20.0}],
        "dtype": "float32",
        "shard_mb": 1,
    },
    "embed": {"text_encoder": "hash", "channels": 64, "max_tokens": 40, "shard_mb": 1},
    "validation": {"share": 0.3},
    "verify": {"decode": 2, "psnr": 15.0},
}


class Prepared:
    """A folder with videos, the demo's codec and a config; `run` is the command on them."""

    def __init__(self, root: Path, count: int = 5) -> None:
        self.root = root
        self.videos, self.work, self.out = root / "videos", root / "work", root / "out"
        self.videos.mkdir(parents=True)
        films = [draw_film(f"film {number}", FRAMES, (96, 112), 1.0) for number in range(count)]
        for number, film in enumerate(films):
            write_film(self.videos / f"{number}.mp4", film, [frame / FPS for frame in range(FRAMES)])
            (self.videos / f"{number}.txt").write_text(f"clouds of kind {number} drift to the left")
        pixels = torch.from_numpy(np.stack(films)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        LinearCodec.fit(pixels).save(root / "codec.safetensors")
        self.configure()

    def configure(self, **sections: dict) -> None:
        """Writes the config, with some sections' values replaced."""
        config = json.loads(json.dumps(CONFIG))
        config["encode"]["vae"] = str(self.root / "codec.safetensors")
        for name, values in sections.items():
            config.setdefault(name, {}).update(values)
        (self.root / "config.json").write_text(json.dumps(config))

    def command(self, do: str = "run", *options: str) -> list[str]:
        """Returns the command line."""
        folders = ["--videos", self.videos, "--work", self.work, "--out", self.out]
        return [
            sys.executable,
            "tools/prepare.py",
            do,
            *map(str, folders),
            "--config",
            str(self.root / "config.json"),
            *options,
        ]

    def run(self, do: str = "run", *options: str, status: int = 0, here: bool = True) -> str:
        """Runs the command; returns what it printed. here: in this process, which has imported all of it already.

        Raises:
            AssertionError: its exit status is another.
        """
        command = self.command(do, *options)
        if here:
            found, said = _run_here(command[2:])
        else:
            done = subprocess.run(
                command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
            )
            found, said = done.returncode, done.stdout
        assert found == status, said
        return said

    def start(self) -> subprocess.Popen:
        """Starts the command in a group of its own."""
        return subprocess.Popen(
            self.command(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )

    def kill_when(self, files: int, patience: float = 120.0) -> bool:
        """Starts the command and kills all of its processes when so many files are there; returns whether it did."""
        process, deadline = self.start(), time.monotonic() + patience
        while process.poll() is None and len(self.files()) < files:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        killed = process.poll() is None
        if killed:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return killed

    def files(self) -> list[Path]:
        """Returns what there is in the working folder and the set, half-written files too."""
        return [path for folder in (self.work, self.out) for path in folder.rglob("*") if path.is_file()]

    def hashes(self) -> dict[str, str]:
        """Returns path → SHA-256 of all outputs; logs and the lock are none, nor what a killed process left half."""
        kept = [
            path for path in self.files() if path.suffix not in (".jsonl", ".tmp", "") and "verify-" not in str(path)
        ]
        return {str(path.relative_to(self.root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in kept}


def _run_here(arguments: list[str]) -> tuple[int, str]:
    """Runs the command's main; returns its status and what it printed. Signals are handled as before afterwards."""
    main = runpy.run_path(str(ROOT / "tools" / "prepare.py"))["main"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            status = main(arguments)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, said.getvalue()
