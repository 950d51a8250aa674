"""Checks published or Megatron weights and writes them as published-format weights that a run can start from."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config import InputError
from mugv_ds.config.model import PRESETS
from mugv_ds.weights.base import preset_of
from mugv_ds.weights.convert import DTYPES, import_weights


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the weights cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--weights",
        type=Path,
        required=True,
        help="a .pt, .bin or .safetensors file, a folder of one or of shards, or a Megatron checkpoint's folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--format", choices=["safetensors", "bin", "pt"], default="safetensors")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of what is written; by default as it is")
    parser.add_argument("--preset", choices=list(PRESETS), help="refuse weights of another size")
    args = parser.parse_args(argv)
    try:
        written, config = import_weights(
            args.weights, args.out, layout=args.format, dtype=DTYPES.get(args.dtype), preset=args.preset
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{written}: {preset_of(config) or config}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
