"""Measures time and peak memory of importing or widening weights of a published size, which are made on the fly.

python -m tests.weights.measure_import --preset mugdit_10b --source torch_dist --folder /tmp/measure
python -m tests.weights.measure_import --preset mugdit_2b --source safetensors --widen --folder /tmp/measure

The source is fp32, what is written bf16: together 1.5 times the fp32 weights on disk, or 3 times with --widen.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor

from mugv_ds.models import PRESETS, DiTConfig
from mugv_ds.weights.base import Weights, meta_state
from mugv_ds.weights.save import save_weights
from tests.helpers.megatron import stack_layers, write_stacked


class RandomWeights(Weights):
    """Random fp32 tensors of a DiT, each made when it is asked for."""

    def __init__(self, config: DiTConfig) -> None:
        self.path = Path("random")
        self._meta = meta_state(config)

    def __getitem__(self, name: str) -> Tensor:
        return torch.empty(self._meta[name].shape).uniform_(-0.02, 0.02)

    def meta(self, name: str) -> Tensor:
        return self._meta[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._meta)

    def __len__(self) -> int:
        return len(self._meta)


def write_source(folder: Path, form: str, config: DiTConfig) -> None:
    """Random fp32 weights; the tensors of the Megatron forms share one buffer, to be made in little memory."""
    if form == "safetensors":
        save_weights(RandomWeights(config), config, folder, "safetensors")
        return
    shapes = {name: value.shape for name, value in stack_layers(meta_state(config)).items()}
    buffer = torch.empty(max(shape.numel() for shape in shapes.values())).uniform_(-0.02, 0.02)
    stacked = {name: buffer[: shape.numel()].view(shape) for name, shape in shapes.items()}
    boxes = {"layers": 1, "ranks": 4} if form == "torch_dist" else {"layers": config.depth, "ranks": 1}
    write_stacked(folder, stacked, **boxes)


def size(folder: Path) -> float:
    """GiB of the files in a folder."""
    return sum(file.stat().st_size for file in folder.iterdir()) / 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=list(PRESETS), required=True, help="of the source")
    parser.add_argument(
        "--source",
        choices=["torch_dist", "torch_dist_whole", "safetensors"],
        required=True,
        help="Megatron's, one layer of a quarter of the rows a chunk, or a whole stack a chunk; or published shards",
    )
    parser.add_argument("--widen", action="store_true", help="twice as wide, with paired noise")
    parser.add_argument("--folder", type=Path, required=True, help="scratch folder, made and removed")
    args = parser.parse_args()
    source, out = args.folder / "source", args.folder / "out"
    try:
        args.folder.mkdir(parents=True)
        # In a process of its own: Linux counts what this one held when it starts the tool as the tool's peak.
        writer = get_context("spawn").Process(target=write_source, args=(source, args.source, PRESETS[args.preset]))
        writer.start()
        writer.join()
        if writer.exitcode:
            sys.exit("the source could not be written")
        begin = time.perf_counter()
        tool = "tools/widen.py" if args.widen else "tools/import_hf.py"
        command = [sys.executable, tool, "--weights", str(source), "--out", str(out), "--dtype", "bf16"]
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"{tool} failed")
        seconds = time.perf_counter() - begin
        read, written = size(source), size(out)
    finally:
        shutil.rmtree(args.folder, ignore_errors=True)
    print(
        f"{args.preset} from {args.source}{', widened' if args.widen else ''}: {read:.1f} GiB of fp32 to {written:.1f} "
        f"GiB of bf16, {seconds:.0f} s, peak resident {usage.ru_maxrss / 2**20:.1f} GiB (mapped pages included)"
    )


if __name__ == "__main__":
    main()
