"""Measures time and peak memory of converting a checkpoint of a published size; needs 10 bytes a parameter on the disk.

python -m tests.checkpoint.measure_export --preset mugdit_10b --format safetensors --folder /tmp/measure
"""

import argparse
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mugv_ds.models import PRESETS, DiT, DiTConfig
from tests.checkpoint.saved import write_checkpoint


def random_weights(config: DiTConfig, scratch: Path) -> dict[str, torch.Tensor]:
    """Random fp32 tensors of a whole DiT, in a mapped file, so that they need no memory."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in DiT(config).named_parameters()}
    flat = torch.from_file(str(scratch), shared=True, size=sum(shape.numel() for shape in shapes.values()))
    parts = flat.uniform_().split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--format", choices=["pt", "safetensors"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and removed")
    args = parser.parse_args()
    scratch, out = args.folder / "scratch", args.folder / "out"
    args.folder.mkdir(parents=True)
    try:
        weights = random_weights(PRESETS[args.preset], scratch)
        model = {"preset": args.preset, "hidden_size": None, "num_heads": None, "caption_channels": None}
        model["precision"] = "bf16"
        checkpoint = write_checkpoint(args.folder / "run", 1, weights.items(), ranks=4, model=model)
        size = sum(value.nbytes for value in weights.values())
        begin = time.perf_counter()
        command = ["tools/convert_hf.py", "--ckpt", str(checkpoint), "--out", str(out), "--format", args.format]
        subprocess.run([sys.executable, *command], check=True)
        seconds = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"{args.preset} to {args.format}: fp32 masters {size / 2**30:.1f} GiB, written {written / 2**30:.1f} GiB, "
        f"{seconds:.0f} s, peak resident {peak / 2**30:.1f} GiB (mapped pages of the checkpoint included)"
    )


if __name__ == "__main__":
    main()
