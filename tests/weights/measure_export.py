"""Measures time and peak memory of exporting a checkpoint of a published size, of which it writes the weights.

python -m tests.weights.measure_export --preset mugdit_10b --format safetensors --folder /tmp/measure

The checkpoint is fp32, what is written bf16: together 1.5 times the fp32 weights on disk.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mugv_ds.models import PRESETS
from mugv_ds.weights.base import meta_state
from tests.helpers.saved import write_checkpoint


def write_run(run: Path, preset: str) -> int:
    """A checkpoint of the fp32 masters of a bf16 run, saved by eight ranks; returns the weights' bytes.

    Their random values are those of one buffer, to be made in little memory.
    """
    shapes = {name: value.shape for name, value in meta_state(PRESETS[preset]).items()}
    buffer = torch.empty(max(shape.numel() for shape in shapes.values())).uniform_(-0.02, 0.02)
    model = {"preset": preset, "precision": "bf16"} | dict.fromkeys(("hidden_size", "num_heads", "caption_channels"))
    tensors = ((name, buffer[: shape.numel()].view(shape)) for name, shape in shapes.items())
    write_checkpoint(run, 1, tensors, ranks=8, model=model)
    return sum(4 * shape.numel() for shape in shapes.values())


def run_measured(command: list[str]) -> int:
    """Runs a command to its end; returns the most anonymous memory that it held, in bytes, seen every 50 ms."""
    peak = 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            for line in status.read_text().splitlines():
                if line.startswith("RssAnon:"):
                    peak = max(peak, 1024 * int(line.split()[1]))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(process.returncode)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--format", choices=["pt", "safetensors"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and removed")
    args = parser.parse_args()
    run, out = args.folder / "run", args.folder / "out"
    try:
        size = write_run(run, args.preset)
        begin = time.perf_counter()
        command = ["tools/convert_hf.py", "--ckpt", str(run), "--out", str(out), "--format", args.format]
        peak = run_measured([sys.executable, *command])
        seconds = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(
        f"{args.preset} to {args.format}: weights {size / 2**30:.1f} GiB of fp32, written {written / 2**30:.1f} GiB of "
        f"bf16, {seconds:.0f} s, peak of memory of its own {peak / 2**30:.2f} GiB (pages of mapped files not counted)"
    )


if __name__ == "__main__":
    main()
