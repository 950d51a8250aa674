"""Measures time and peak memory of converting a checkpoint of a published size; needs twice the weights' disk space.

python -m tests.checkpoint.measure_export --preset mugdit_10b --format safetensors --folder /tmp/measure
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from mugv_ds.checkpoint.store import CONFIG_NAME
from mugv_ds.models import PRESETS, DiTConfig
from mugv_ds.models.dit import Embedders
from mugv_ds.models.layers import Block, FinalLayer
from tests.dataset import write_config


def write_checkpoint(folder: Path, preset: str, config: DiTConfig) -> int:
    """A pipeline checkpoint's layer files with random bf16 weights; returns their bytes."""
    folder.mkdir(parents=True)
    run = json.loads(write_config(folder, Path("unused")).read_text())
    run["model"] = {"preset": preset}
    (folder / CONFIG_NAME).write_text(json.dumps(run))
    written = 0
    for layer, part in enumerate([Embedders, *[Block] * config.depth, FinalLayer]):
        with torch.device("meta"):
            shapes = {name: value.shape for name, value in part(config).state_dict().items()}
        state = {name: torch.empty(shape, dtype=torch.bfloat16).uniform_() for name, shape in shapes.items()}
        torch.save(state, folder / f"layer_{layer:02d}-model_states.pt")
        written += sum(2 * value.numel() for value in state.values())
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True)
    parser.add_argument("--format", choices=["pt", "safetensors"], required=True)
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and removed")
    args = parser.parse_args()
    checkpoint, out = args.folder / "global_step1", args.folder / "out"
    try:
        size = write_checkpoint(checkpoint, args.preset, PRESETS[args.preset])
        begin = time.perf_counter()
        command = ["tools/convert_hf.py", "--ckpt", str(checkpoint), "--out", str(out), "--format", args.format]
        subprocess.run([sys.executable, *command], check=True)
        seconds = time.perf_counter() - begin
        written = sum(file.stat().st_size for file in out.iterdir())
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(
        f"{args.preset} to {args.format}: weights {size / 2**30:.1f} GiB, written {written / 2**30:.1f} GiB, "
        f"{seconds:.0f} s, peak resident {peak / 2**30:.1f} GiB (mapped pages of the checkpoint included)"
    )


if __name__ == "__main__":
    main()
