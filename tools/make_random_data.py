"""Writes random latents and text features of one shape, in the published format, to measure speed with."""

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--shape", type=int, nargs=3, default=[15, 90, 160], metavar=("T", "H", "W"), help="latent")
    parser.add_argument("--caption-channels", type=int, default=4096)
    parser.add_argument("--text-tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    generator = torch.Generator().manual_seed(args.seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    for name in ("latents", "text_features"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    text = (1, 1, args.text_tokens, args.caption_channels)
    mask = torch.ones(1, args.text_tokens, dtype=torch.int64)
    with (args.out / "train.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sample_id", "source", "latent_path", "text_feat_path"])
        for i in range(args.samples):
            torch.save(normal(24, *args.shape), args.out / f"latents/{i}.pt")
            torch.save({"y": normal(*text), "mask": mask}, args.out / f"text_features/{i}_text.pt")
            rows.writerow([i, "generated", f"latents/{i}.pt", f"text_features/{i}_text.pt"])
    torch.save({"y": normal(*text), "mask": mask}, args.out / "text_features/negative.pt")
    print(f"{args.out}: {args.samples} samples of latent {'×'.join(map(str, args.shape))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
