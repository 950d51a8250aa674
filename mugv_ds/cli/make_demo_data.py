"""Draws the demo data set: captioned clips of moving shapes for every stage, encoded. Nothing is downloaded."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from mugv_ds.prepare.demo.sets import Sizes, make_demo_data


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and makes the data set; returns the exit status, 2 for arguments that cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    rows = parser.add_argument_group("rows of each CSV")
    for field in fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        rows.add_argument(option, type=int, default=field.default, metavar="ROWS", help="default: %(default)s")
    arguments = vars(parser.parse_args(argv))
    out, seed = arguments.pop("out"), arguments.pop("seed")
    try:
        make_demo_data(out, Sizes(**arguments), seed=seed)
    except ValueError as error:
        print(f"make_demo_data: {error}", file=sys.stderr)
        return 2
    tables = [*arguments, "vae_train", "vae_val"]
    print(f"{out}: {', '.join(f'{name}.csv' for name in tables)} and codec.safetensors are ready")
    return 0


if __name__ == "__main__":
    sys.exit(main())
