"""Measures the index of a manifest: building it, and what it costs a training process.

python -m tests.data.measure_index --rows 1000000 --headers 100000 --shards 1000000

Three manifests are drawn in a scratch folder: one of `--rows` rows that say their shapes, as tools/make_random_data.py
draws them; one of `--headers` rows that do not, each with a file of its own of a small latent; and one of `--shards`
rows with small latents, 100 to a shard, and text features, 250 to a shard. Each is indexed:

- anew;
- without sizes, again after a build that was killed when its first part was kept;
- again after one in a hundred rows more were appended (but for shards).

Then a fresh process opens the index, makes the order of the steps, enters an epoch, reads rows at random and looks for
a replacement. Memory is what this adds to the process (private, and with the mapped pages of the index, which the
processes of a host share and the system takes back when it needs them).
"""

import argparse
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from mugv_ds.data.buckets import Order
from mugv_ds.data.manifest import build_index, open_index
from mugv_ds.data.quarantine import replacement
from mugv_ds.data.shards import write_shard

TOOL = Path(__file__).parents[2] / "tools/make_random_data.py"
HEADER = "sample_id,source,latent_path,text_feat_path\n"
BUILDER = "import sys; from mugv_ds.data.manifest import build_index; build_index(sys.argv[1])"


def resident() -> tuple[float, float]:
    """MiB of this process: private, and with mapped files and shared memory."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    private, mapped, shared = (int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile", "RssShmem"))
    return private, private + mapped + shared


def unsized_row(i: int) -> str:
    """A row without sizes, whose latent is one of a thousand to a folder."""
    return f"{i:09},generated,latents/{i // 1000:06}/{i:09}.pt,t.pt\n"


def write_latents(folder: Path, first: int, last: int) -> None:
    """Writes the small latents of rows [first, last); their shapes alternate."""
    contents = []
    for frames in (1, 2, 3):
        torch.save(torch.zeros(24, frames, 2, 2, dtype=torch.bfloat16), folder / "latent.pt")
        contents.append((folder / "latent.pt").read_bytes())
    for i in range(first, last):
        path = folder / f"latents/{i // 1000:06}/{i:09}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[i % 3])


def write_sharded(folder: Path, rows: int) -> Path:
    """Writes a manifest with the columns that tools/prepare.py writes, and its shards; returns the CSV."""
    names = [f"{i * 0x9E3779B97F4A7C15 % (1 << 64):016x}{i:016x}" for i in range(rows)]  # ids of 128 bits
    paths = []
    for place, size, shape in (("latents/720p5s", 100, (24, 1, 2, 2)), ("text_features", 250, (2, 4))):
        (folder / place).mkdir(parents=True, exist_ok=True)
        paths.append([f"{place}/u{i // size:06}.safetensors#{name}" for i, name in enumerate(names)])
        for start in range(0, rows, size):
            tensors = {name: torch.zeros(shape, dtype=torch.bfloat16) for name in names[start : start + size]}
            write_shard(folder / f"{place}/u{start // size:06}.safetensors", tensors)
    with (folder / "train.csv").open("w") as file:
        file.write(f"{HEADER.strip()},fps,height,width,num_frames,caption,kind,weight,label,pair_id,rank\n")
        file.writelines(
            f"{name},generated,{latent},{text},24,16,16,8,,video,{1 + i % 40 / 10},,,\n"
            for i, (name, latent, text) in enumerate(zip(names, *paths, strict=True))
        )
    return folder / "train.csv"


def timed(what: str, function: Callable[[], object]) -> None:
    """Prints how long a function took."""
    begin = time.perf_counter()
    function()
    print(f"  {what}: {time.perf_counter() - begin:.1f} s", flush=True)


def measure_sized(folder: Path, rows: int) -> Path:
    """Builds the index of a manifest that says its shapes, and again with more rows; returns the CSV."""
    csv = folder / "train.csv"
    drawn = [sys.executable, TOOL, "--out", folder, "--manifest-only", "--samples", str(rows)]
    subprocess.run(drawn, check=True, stdout=subprocess.DEVNULL)
    timed("built", lambda: build_index(csv))
    print(f"  {csv.stat().st_size / 2**20:.0f} MiB of CSV, {index_bytes(csv) / 2**20:.0f} MiB of index")
    with csv.open("a") as file:
        for row in runpy.run_path(str(TOOL))["drawn_rows"](rows // 100, 1):
            file.write(",".join(map(str, (f"more-{row[0]}", *row[1:]))) + "\n")
    timed(f"built after {rows // 100} more rows", lambda: build_index(csv))
    return csv


def measure_unsized(folder: Path, rows: int) -> Path:
    """Builds the index of a manifest without sizes: anew, after a killed build and with more rows; returns the CSV."""
    csv = folder / "train.csv"
    folder.mkdir()
    write_latents(folder, 0, rows + rows // 100)
    csv.write_text(HEADER + "".join(map(unsized_row, range(rows))))
    timed("built", lambda: build_index(csv, folder / "whole"))
    killed = subprocess.Popen([sys.executable, "-c", BUILDER, csv])
    while not list(csv.parent.glob(".index/*.parts/*.npy")):
        time.sleep(0.01)
        if killed.poll() is not None:
            raise SystemExit("too few rows: the build was over before it could be killed")
    killed.kill()
    killed.wait()
    timed("built after one that was killed with its first 50,000 rows kept", lambda: build_index(csv))
    with csv.open("a") as file:
        file.writelines(map(unsized_row, range(rows, rows + rows // 100)))
    timed(f"built after {rows // 100} more rows", lambda: build_index(csv))
    return csv


def measure_sharded(folder: Path, rows: int) -> Path:
    """Builds the index of a manifest of shards; returns the CSV."""
    csv = write_sharded(folder, rows)
    timed("built", lambda: build_index(csv))
    print(f"  {csv.stat().st_size / 2**20:.0f} MiB of CSV, {index_bytes(csv) / 2**20:.0f} MiB of index")
    return csv


def index_bytes(csv: Path) -> int:
    """Bytes of the files of a manifest's index."""
    return sum(file.stat().st_size for file in build_index(csv).parent.iterdir())


def measure_use(csv: Path, reads: int) -> None:
    """Opens an index and uses it as a training process does."""
    before = resident()
    begin = time.perf_counter()
    index = open_index(csv)
    opened = time.perf_counter()
    order = Order(index.buckets(), dict.fromkeys(index.buckets().by_shape, 64), seed=0)
    first = order.step(0)
    ordered = time.perf_counter()
    steps = int(len(index) / order.samples_per_step)
    for i in range(min(steps, 2000)):
        order.step(i)
    rows = np.random.default_rng(0).integers(len(index), size=reads).tolist()
    reading = time.perf_counter()
    for i in rows:
        index.row(i)
    microseconds = 1e6 * (time.perf_counter() - reading) / reads
    private, whole = (after - earlier for after, earlier in zip(resident(), before, strict=True))
    replacing = time.perf_counter()
    for attempt in range(10):
        replacement(
            index.buckets().rows_of_shape(first.shape), first.rows[0], seed=0, name="a", visit=0, attempt=attempt
        )
    scanned = time.perf_counter()
    for _ in range(10):
        len(index.buckets().rows_of_shape(first.shape))
    looked_up = time.perf_counter()
    print(
        f"  {len(index)} rows opened in {opened - begin:.2f} s, CSV and index checked; order {ordered - opened:.2f} s"
    )
    print(f"  {reads} random rows: {microseconds:.0f} µs each")
    print(f"  memory added: {private:.0f} MiB private, {whole:.0f} MiB with mapped pages")
    print(f"  a replacement: {100 * (scanned - replacing):.2f} ms")
    print(f"  the rows of its shape: {1e5 * (looked_up - scanned):.1f} µs")


def main() -> None:
    """Parses the command line and measures, each manifest in processes of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows that say their shapes")
    parser.add_argument("--headers", type=int, default=100_000, help="rows that do not")
    parser.add_argument("--shards", type=int, default=1_000_000, help="rows whose tensors lie in shards")
    parser.add_argument("--reads", type=int, default=100_000)
    args = parser.parse_args()
    processes = get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name, measure, rows in (
            ("sized", measure_sized, args.rows),
            ("unsized", measure_unsized, args.headers),
            ("sharded", measure_sharded, args.shards),
        ):
            if not rows:
                continue
            print(f"{rows} rows, {name}", flush=True)
            for work, arguments in (
                (measure, (folder / name, rows)),
                (measure_use, (folder / name / "train.csv", args.reads)),
            ):
                process = processes.Process(target=work, args=arguments)
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(process.exitcode)


if __name__ == "__main__":
    main()
