"""Compares the loss curves of one run in bf16 and in fp8, on one GPU: same weights, samples, noise and timesteps.

It needs Transformer Engine, and the demo data (`make demo-data`) for the default config.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import report
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PRECISIONS = ("bf16", "fp8")


def train(config: str, precision: str, steps: int, folder: Path) -> None:
    """Trains with one process, as the README says, which writes the scalars of every tenth step into `folder`."""
    hostfile = folder / "hostfile"
    folder.mkdir()
    hostfile.write_text("localhost slots=1\n")
    settings = {
        "model.precision": precision,
        "parallel.data": 1,
        "parallel.sequence": 1,
        "parallel.pipeline": 1,
        "schedule.steps": steps,
        "checkpoint.dir": folder / "checkpoints",
        "checkpoint.save_every": 0,
        "logging.dir": folder,
        "logging.every": 10,
        "logging.eval_every": 0,
        "logging.progress": "false",
    }
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", hostfile, "--no_ssh"]
    command += ["--node_rank", "0", "--master_addr", "127.0.0.1", "mugv_ds/train.py", "--config", config]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    subprocess.run(list(map(str, command)), check=True)


def curve(folder: Path, tag: str) -> dict[int, float]:
    """Reads a scalar of a run by step."""
    events = EventAccumulator(str(folder))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def main() -> None:
    """Trains in both precisions, and reports their losses and times side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="ds_configs/debug.json")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        folders = {precision: Path(root) / precision for precision in PRECISIONS}
        for precision, folder in folders.items():
            train(args.config, precision, args.steps, folder)
        for tag in ("train/loss", "validation/loss", "speed/seconds_per_step"):
            bf16, fp8 = (curve(folder, tag) for folder in folders.values())
            rows = [
                {"step": step, "bf16": bf16[step], "fp8": fp8[step], "difference %": 100 * (fp8[step] / bf16[step] - 1)}
                for step in bf16
            ]
            report(f"{tag} of {args.config}, {args.steps} steps", rows)


if __name__ == "__main__":
    main()
