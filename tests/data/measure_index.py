"""Measures the index of a manifest: building it, and what it costs a training process.

python tools/make_random_data.py --out /tmp/measure --manifest-only --samples 1000000
python -m tests.data.measure_index /tmp/measure/train.csv

The index is built anew in a scratch folder. Then a fresh process opens it, makes the order of the steps, enters an
epoch and reads rows at random. Memory is what this adds to the process (private, and with the mapped pages of the
index, which the processes of a host share and the system takes back when it needs them).
"""

import argparse
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from mugv_ds.data.buckets import Order, group_by_shape
from mugv_ds.data.manifest import build_index, open_index


def resident() -> tuple[float, float]:
    """MiB of this process: private, and with mapped files and shared memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, mapped, shared = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return private, private + mapped + shared


def build(csv: Path, folder: Path) -> None:
    begin = time.perf_counter()
    path = build_index(csv, folder)
    seconds = time.perf_counter() - begin
    print(f"{csv}: index of {path.stat().st_size / 2**20:.0f} MiB built in {seconds:.1f} s")


def use(csv: Path, folder: Path, reads: int) -> None:
    before = resident()
    begin = time.perf_counter()
    index = open_index(csv, folder)
    opened = time.perf_counter()
    shapes = index.shapes()
    order = Order(shapes, dict.fromkeys(group_by_shape(shapes)[0], 64), seed=0)
    order.step(0)
    ordered = time.perf_counter()
    rows = np.random.default_rng(0).integers(len(index), size=reads).tolist()
    reading = time.perf_counter()
    for i in rows:
        index.row(i)
    microseconds = 1e6 * (time.perf_counter() - reading) / reads
    private, whole = (after - earlier for after, earlier in zip(resident(), before, strict=True))
    print(f"{len(index)} rows opened in {opened - begin:.2f} s, the CSV hashed; order {ordered - opened:.2f} s")
    print(f"{reads} random rows: {microseconds:.0f} µs each")
    print(f"memory added: {private:.0f} MiB private, {whole:.0f} MiB with mapped pages")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("--reads", type=int, default=100_000)
    args = parser.parse_args()
    processes = get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        for work, more in ((build, ()), (use, (args.reads,))):
            process = processes.Process(target=work, args=(args.csv, Path(folder), *more))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
