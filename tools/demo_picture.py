"""Puts the videos of a folder side by side in one animated WebP, such as the pages begin with."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mugv_ds.config.errors import InputError, exit_status
from mugv_ds.data.video import read_mp4

COLUMNS, SCALE, GAP = 4, 3, 6


def picture(videos: Sequence[Path]) -> list[Image.Image]:
    """Returns the frames of the picture: the videos in rows of four, three times as large.

    Raises:
        InputError: there is no video, or they differ in size or length.
    """
    if not videos:
        raise InputError("no videos; name a folder with .mp4 files")
    films = [read_mp4(video)[0] for video in videos]
    if len({film.shape for film in films}) > 1:
        raise InputError(f"{videos[0].parent}: videos of several sizes or lengths; name a folder of one kind")
    frames, height, width, _ = films[0].shape
    rows = -(-len(films) // COLUMNS)
    size = (COLUMNS * (width * SCALE + GAP) - GAP, rows * (height * SCALE + GAP) - GAP)
    pictures = [Image.new("RGB", size, "white") for _ in range(frames)]
    for number, film in enumerate(films):
        row, column = divmod(number, COLUMNS)
        for image, frame in zip(pictures, film, strict=True):
            large = Image.fromarray(frame).resize((width * SCALE, height * SCALE), Image.Resampling.BICUBIC)
            image.paste(large, (column * (width * SCALE + GAP), row * (height * SCALE + GAP)))
    return pictures


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and writes the picture; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=Path, required=True, help="folder of .mp4 files of one size and length")
    parser.add_argument("--out", type=Path, required=True, help="the .webp to write")
    parser.add_argument("--fps", type=float, default=8, help="frames a second (default: 8)")
    args = parser.parse_args(argv)

    def run() -> int:
        first, *others = picture(sorted(args.samples.glob("*.mp4")))
        pace = {"duration": round(1000 / args.fps), "loop": 0}
        first.save(args.out, save_all=True, append_images=others, quality=60, method=6, **pace)
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
