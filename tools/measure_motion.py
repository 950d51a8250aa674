"""Says of every mp4 in a folder whether the demo's shape in it moves left or right, and what share moves right."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mugv_ds.config import InputError
from mugv_ds.data.video import read_mp4
from mugv_ds.prepare.demo.motion import LEAST_MOTION, horizontal_motion


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the videos cannot be read."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--videos", type=Path, required=True, help="folder of the mp4 files")
    args = parser.parse_args(argv)
    counts: Counter[str] = Counter()
    try:
        files = sorted(args.videos.glob("*.mp4"))
        if not files:
            raise InputError(f"{args.videos}: holds no mp4 file; name the folder that tools/sample.py wrote")
        for file in files:
            frames, _ = read_mp4(file)
            verdict, why = judge(frames)
            counts[verdict] += 1
            print(f"{file.name}: {verdict} ({why})")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    right, total = counts["right"], counts.total()
    print(
        f"{right} of {total} move right ({100 * right / total:.0f}%), {counts['left']} left, "
        f"{counts['no motion']} show no motion to the side"
    )
    return 0


def judge(frames: np.ndarray) -> tuple[str, str]:
    """Returns the verdict on uint8 frames [F, H, W, 3] (left, right or no motion), and what it rests on."""
    try:
        speed = horizontal_motion(frames)
    except ValueError as error:
        return "no motion", str(error)
    seen = f"{speed:+.2f} pixels a frame"
    if abs(speed) < LEAST_MOTION:
        return "no motion", seen
    return ("right" if speed > 0 else "left"), seen


if __name__ == "__main__":
    sys.exit(main())
