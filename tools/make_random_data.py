"""Writes random latents and text features of one shape, in the published format, to measure speed with; or, with
--manifest-only, a manifest alone, of clips and images whose shapes are drawn from the table below.

frames, at 24 a second (T of the latent)   share       height × width   share
  1 (1), an image                          30 %        360 × 640        40 %
 48 (6)                                    17.5 %      416 × 552        12 %
 72 (9)                                    17.5 %      480 × 480        12 %
 96 (12)                                   17.5 %      552 × 416         8 %
120 (15)                                   17.5 %      640 × 360        13 %
                                                       720 × 1280       12 %
                                                      1280 × 720         3 %

The two are drawn independently, which makes 35 latent shapes. The files that such a manifest names do not exist.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

FRAMES = {1: 0.3, 48: 0.175, 72: 0.175, 96: 0.175, 120: 0.175}
SIZES = {
    (360, 640): 0.4,
    (416, 552): 0.12,
    (480, 480): 0.12,
    (552, 416): 0.08,
    (640, 360): 0.13,
    (720, 1280): 0.12,
    (1280, 720): 0.03,
}
COLUMNS = ["sample_id", "source", "latent_path", "text_feat_path"]


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and writes the data; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", type=int, default=8, help="rows of the manifest")
    parser.add_argument("--manifest-only", action="store_true", help="no files, and shapes from the table above")
    parser.add_argument("--shape", type=int, nargs=3, default=[15, 90, 160], metavar=("T", "H", "W"), help="latent")
    parser.add_argument("--caption-channels", type=int, default=4096)
    parser.add_argument("--text-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.manifest_only:
        columns, rows = [*COLUMNS, "num_frames", "height", "width", "fps", "kind"], drawn_rows(args.samples, args.seed)
        what = f"a manifest of {args.samples} rows"
    else:
        text = (1, 1, args.text_tokens, args.caption_channels)
        columns, rows = COLUMNS, written_rows(args.out, args.samples, args.shape, text, args.seed)
        what = f"{args.samples} samples of latent {'×'.join(map(str, args.shape))}"
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "train.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)
    print(f"{args.out}: {what}")
    return 0


def written_rows(
    out: Path, samples: int, shape: Sequence[int], text: Sequence[int], seed: int
) -> Iterator[tuple[int | str, ...]]:
    """Writes the files of each sample and yields its row.

    Args:
        out: folder of the data set. samples: how many.
        shape: latent (T, H, W); latents are bf16 [24, T, H, W].
        text: shape [1, 1, L, C] of the text features.
        seed: seed of the random values.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).bfloat16()

    for name in ("latents", "text_features"):
        (out / name).mkdir(parents=True, exist_ok=True)
    mask = torch.ones(1, text[2], dtype=torch.int64)
    for i in range(samples):
        torch.save(normal(24, *shape), out / f"latents/{i}.pt")
        torch.save({"y": normal(*text), "mask": mask}, out / f"text_features/{i}_text.pt")
        yield i, "generated", f"latents/{i}.pt", f"text_features/{i}_text.pt"
    torch.save({"y": normal(*text), "mask": mask}, out / "text_features/negative.pt")


def drawn_rows(samples: int, seed: int) -> Iterator[tuple[int | str, ...]]:
    """Yields rows whose frames and sizes are drawn from the table, with a thousand files to a folder."""
    generator = np.random.default_rng(seed)
    frames, sizes = list(FRAMES), list(SIZES)
    drawn_frames = generator.choice(len(frames), samples, p=list(FRAMES.values()))
    drawn_sizes = generator.choice(len(sizes), samples, p=list(SIZES.values()))
    for i in range(samples):
        name, number = f"{i // 1000:06}/{i:09}", frames[drawn_frames[i]]
        paths = f"latents/{name}.pt", f"text_features/{name}_text.pt"
        kind = "image" if number == 1 else "video"
        yield f"{i:09}", "generated", *paths, number, *sizes[drawn_sizes[i]], 24, kind


if __name__ == "__main__":
    sys.exit(main())
