"""Selects among a million generated clips, in a process of its own, and prints as JSON what it took.

python -m tests.helpers.many_clips CLIPS FOLDER
"""

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.dedup import DedupRows, find_pairs
from mugv_ds.prepare.rows import CAPTION, CLIP, VIDEO
from mugv_ds.prepare.screen import Blocklist, Screening, Sources
from mugv_ds.prepare.select import Selection, UnitRows

PER_UNIT, PER_VIDEO = 1000, 20
SCORES = {"sharp_min": (150, 600), "motion": (0.5, 25), "shake": (0, 0.012), "luma": (0.02, 0.9)}


def units(count: int) -> Iterator[UnitRows]:
    """Yields units of 1000 clips of 50 videos each; every tenth clip is like one of another unit, off by 3 bits."""
    for number in range(count // PER_UNIT):
        yield _unit(number)


def _unit(number: int) -> UnitRows:
    generator = np.random.Generator(np.random.PCG64([1, number]))
    hashes, mirrors = _hashes(number), _hashes(number + 10**9)
    if number % 2:
        copied = _hashes(number - 1)[::5]
        hashes[::5] = copied ^ (np.uint64(0b10101) << generator.integers(0, 59, copied.shape, dtype=np.uint64))
    videos = [generator.bytes(32).hex() for _ in range(PER_UNIT // PER_VIDEO)]
    ids = [generator.bytes(16).hex() for _ in range(PER_UNIT)]
    words = generator.integers(0, 3000, (PER_UNIT, 60))
    one = {"duration": 10.0, "claimed": 10.0, "fps": 24.0, "bitrate": 0.1, "interlaced": 0.0, "hdr": False, "path": "v"}
    scores = {name: generator.uniform(*ends, PER_UNIT) for name, ends in SCORES.items()}
    same = {"duration": 5.0, "width": 1280, "height": 720, "sharp_max": 900.0, "area": 1.0, "repeated": 0.0}
    same |= {"dark": 0.1, "bright": 0.1}
    clips = {
        "clip": ids,
        "video": np.repeat(videos, PER_VIDEO),
        "phash": _lists(hashes),
        "phash_mirror": _lists(mirrors),
        "sharp_med": scores["sharp_min"] + 100,
        **scores,
    }
    captions = {"clip": ids, "caption": [" ".join(map(str, row)) for row in words.tolist()]}
    return UnitRows(
        _table(VIDEO, len(videos), {"video": videos}, one),
        _table(CLIP, PER_UNIT, clips, same),
        {"caption": _table(CAPTION, PER_UNIT, captions, {})},
    )


def _hashes(number: int) -> np.ndarray:
    generator = np.random.Generator(np.random.PCG64([2, number]))
    return generator.integers(1, 1 << 64, (PER_UNIT, 8), dtype=np.uint64)


def _lists(hashes: np.ndarray) -> pa.Array:
    return pa.ListArray.from_arrays(np.arange(0, hashes.size + 1, 8, dtype=np.int32), hashes.ravel())


def _table(schema: pa.Schema, count: int, columns: dict, same: dict) -> pa.Table:
    filled = [
        pa.array(columns[name]).cast(kind) if name in columns else pa.repeat(pa.scalar(same.get(name), kind), count)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.Table.from_arrays(filled, schema=schema)


def main(count: int, folder: Path) -> None:
    """Prints clips, accepted and duplicate ones, pairs, CPU seconds of each part, and the peak of resident bytes."""
    config = PrepareConfig.model_validate({"select": {"top": 0.5}})
    screening = Screening(Sources(), Blocklist())
    start = time.process_time()
    for _ in units(count):
        pass
    generated = time.process_time()
    pairs = find_pairs((DedupRows(u.clips, u.extras["caption"]) for u in units(count)), config.dedup, folder)
    paired = time.process_time()
    selection = Selection.of(lambda: units(count), config, screening, pairs)
    selected = time.process_time()
    accepted = rows = 0
    for unit in units(count):
        table = selection.table(unit)
        rows += len(table)
        accepted += table["accepted"].to_numpy().sum()
    written = time.process_time()
    seconds = {
        "one pass of generating": generated - start,
        "find_pairs": paired - generated,
        "Selection.of": selected - paired,
        "tables": written - selected,
    }
    counts = {"clips": rows, "pairs": len(pairs), "duplicates": len(selection.duplicates), "accepted": int(accepted)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({**counts, "seconds": seconds, "peak": peak}))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
