"""Writes weights of a DiT that is wider by a whole factor and computes the same; says how far the outputs are apart."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config import InputError
from mugv_ds.weights.base import preset_of
from mugv_ds.weights.convert import DTYPES, widen_weights
from mugv_ds.weights.widen import Noise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the weights or an argument cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", type=Path, required=True, help="anything that import_hf.py takes")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--factor", type=int, default=2, help="default: 2, from 2B to 10B")
    parser.add_argument(
        "--noise",
        choices=["paired", "iid", "none"],
        default="paired",
        help="paired (default) leaves the output as it is, iid changes it; with none the copies learn alike for ever",
    )
    parser.add_argument(
        "--noise-scale",
        type=float,
        default=0.01,
        help="standard deviation over the matrix's root mean square; ours, unpublished (default: 0.01)",
    )
    parser.add_argument("--seed", type=int, default=6309, help="of the noise (default: 6309)")
    parser.add_argument("--format", choices=["safetensors", "bin", "pt"], default="safetensors")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of what is written (default: fp32)")
    parser.add_argument(
        "--check-blocks", type=int, help="blocks run for the comparison; by default all, of large models 2"
    )
    args = parser.parse_args(argv)
    try:
        report = widen_weights(
            args.weights,
            args.out,
            factor=args.factor,
            noise=Noise(args.noise, args.noise_scale, args.seed),
            layout=args.format,
            dtype=DTYPES[args.dtype],
            check_blocks=args.check_blocks,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{report.path}: {preset_of(report.config) or report.config}; over the first {report.blocks} of "
        f"{report.config.depth} blocks, the output on random input differs from the narrow model's by "
        f"{report.difference:.1e} (relative, fp32)\n"
        f"to train it with the narrow model's optimizer.lr, set optimizer.width_reference = {report.narrow_width}, or "
        "what the narrow model's run has there"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
