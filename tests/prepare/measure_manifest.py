"""Measures writing the manifest of generated clips: time, and the memory of the process.

tests/prepare/measure_manifest.py --clips 1000000
"""

import argparse
import hashlib
import resource
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from mugv_ds.config.prepare_schema import BucketSection, EncodeSection, PrepareConfig
from mugv_ds.prepare.embed import extend_text_plan
from mugv_ds.prepare.encode import extend_plan, units_in
from mugv_ds.prepare.manifest import Parts, write_manifest
from mugv_ds.prepare.rows import CAPTION, CLIP, EMBED, EMBED_PLAN, ENCODE, ENCODE_PLAN, FIT, SELECT, SIDES
from mugv_ds.prepare.units import Fragments, read_table

CLIPS_OF_A_PART = 640  # 32 videos of 20 clips
BUCKETS = tuple(
    BucketSection(height=height, width=width, frames=frames)
    for height, width in ((352, 640), (640, 352), (720, 1280), (1280, 720))
    for frames in (48, 120)
)


def table(schema: pa.Schema, rows: int, **columns) -> pa.Table:
    """Rows with these columns; others are null."""
    return pa.table(
        [
            pa.array(columns[name], type_) if name in columns else pa.nulls(rows, type_)
            for name, type_ in zip(schema.names, schema.types, strict=True)
        ],
        schema=schema,
    )


def write_part(work: Path, number: int, count: int) -> pa.Table:
    """Writes the fragments of a unit of videos; returns its rows of `FIT`."""
    ids = sorted(hashlib.blake2b(f"{number} {i}".encode(), digest_size=16).hexdigest() for i in range(count))
    videos = [hashlib.sha256(f"{number} {i // 20}".encode()).hexdigest() for i in range(count)]
    paths = [f"folder/{video[:20]}.mp4" for video in videos]
    buckets = [BUCKETS[i % len(BUCKETS)].name for i in range(count)]
    score = np.random.default_rng(number).random(count)
    scores = dict.fromkeys(
        ("sharp_min", "sharp_med", "sharp_max", "motion", "shake", "luma", "repeated", "area"), score
    )
    pts = [list(range(1000 * i, 1000 * i + 48 * 512, 512)) for i in range(count)]
    hashes = np.random.default_rng(number).integers(0, 1 << 63, (count, 8)).tolist()
    fits = table(FIT, count, clip=ids, bucket=buckets, area=score, time_error=score, repeated=score, pts=pts)
    crops = {f"crop_{side}": [0] * count for side in SIDES}
    parts = {
        "fit": fits,
        "select": table(
            SELECT,
            count,
            clip=ids,
            video=videos,
            path=paths,
            licence=["CC0"] * count,
            accepted=[True] * count,
            weight=score + 0.5,
        ),
        "clips": table(
            CLIP,
            count,
            clip=ids,
            video=videos,
            first_pts=range(count),
            last_pts=range(count),
            phash=hashes,
            **crops,
            **scores,
        ),
        "caption": table(CAPTION, count, clip=ids, caption=[f"{clip} " * 20 for clip in ids], source=["model"] * count),
    }
    for step, rows in parts.items():
        Fragments(work / step).write(number, "0" * 12, rows)
    return fits.select(["clip", "bucket"])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    args = parser.parse_args(argv)
    config = PrepareConfig(encode=EncodeSection(buckets=BUCKETS))
    with tempfile.TemporaryDirectory() as folder:
        work, out = Path(folder, "work"), Path(folder, "out")
        out.mkdir(parents=True)
        count = -(-args.clips // CLIPS_OF_A_PART)
        started = time.process_time()
        fits = [(part, write_part(work, part, CLIPS_OF_A_PART)) for part in range(count)]
        print(f"{count} units of videos written in {time.process_time() - started:.0f} CPU-s", flush=True)
        started = time.process_time()
        encode_plan = extend_plan(ENCODE_PLAN.empty_table(), fits, config.encode)
        texts = [(part, rows["clip"].to_pylist()) for part, rows in fits]
        embed_plan = extend_text_plan(EMBED_PLAN.empty_table(), texts, config.embed)
        del fits, texts
        print(f"plans of {encode_plan.num_rows:,} rows in {time.process_time() - started:.0f} CPU-s", flush=True)
        for step, plan, schema in (("encode", encode_plan, ENCODE), ("embed", embed_plan, EMBED)):
            for unit, rows in units_in(plan):
                size, shard = (
                    rows.num_rows,
                    f"{'latents/x' if step == 'encode' else 'text_features'}/u{unit:06d}.safetensors",
                )
                given = {
                    "clip": rows["clip"].combine_chunks(),
                    "shard": [shard] * size,
                    "bytes": [1] * size,
                    "sha256": ["0" * 64] * size,
                }
                Fragments(work / step).write(unit, "0" * 12, table(schema, size, **given))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        started = time.process_time(), time.monotonic()

        def read(step: str, unit: int, columns: Sequence[str]) -> pa.Table:
            return read_table(Fragments(work / step).path(unit, "0" * 12), columns)

        manifest = write_manifest(
            out, Parts(count, encode_plan, embed_plan, read, lambda step, unit: "0" * 12), config, {}
        )
        took = time.process_time() - started[0], time.monotonic() - started[1]
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{manifest['counts']} in {took[0]:.0f} CPU-s, {took[1]:.0f} s; peak {peak:.2f} GiB, {before:.2f} before")
        for path in sorted(out.iterdir()):
            print(f"  {path.name} {path.stat().st_size / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
