"""Writes a training checkpoint as published-format weights that `DiT.load_state_dict(strict=True)` takes.

A model card, README.md, is written beside them: what they came from, and code that loads them.
Adapters (LoRA) are merged into their base; --adapter writes them alone, in peft's format.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from mugv_ds.config import InputError
from mugv_ds.weights.located import located
from mugv_ds.weights.lora import export_adapter
from mugv_ds.weights.published import export


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the checkpoint cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ckpt", required=True, help="a run's checkpoint folder or URL, or a step-<n> in it")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--format", choices=["pt", "bin", "safetensors"], help="one .pt (default), or shards")
    parser.add_argument("--layout", choices=["flat", "diffusers"], default="flat", help="of the folder")
    parser.add_argument("--license", default="other", help="of the weights, as the hub calls it (default: %(default)s)")
    parser.add_argument("--evaluation", type=Path, help="folder of an evaluation, whose table the card then has")
    parser.add_argument("--adapter", action="store_true", help="of a run with lora: the adapters, in peft's format")
    args = parser.parse_args(argv)
    try:
        if args.layout == "diffusers" and args.format in ("pt", "bin"):
            raise InputError(f"--layout diffusers has safetensors; leave out --format {args.format}")
        layout = "diffusers" if args.layout == "diffusers" else args.format or "pt"
        write = partial(export, layout=layout, licence=args.license, evaluation=args.evaluation)
        write = export_adapter if args.adapter else write
        print(write(located(args.ckpt), args.out))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
