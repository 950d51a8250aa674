"""Draws the demo data set: captioned clips of moving shapes for every stage, encoded. Nothing is downloaded."""

import argparse
import sys
from dataclasses import fields

from mugv_ds.prepare.demo.sets import Sizes, make_demo_data


def main() -> None:
    """Parses the command line and makes the data set; exits with a message where the arguments cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    rows = parser.add_argument_group("rows of each CSV")
    for field in fields(Sizes):
        option = f"--{field.name.replace('_', '-')}"
        rows.add_argument(option, type=int, default=field.default, metavar="ROWS", help="default: %(default)s")
    arguments = vars(parser.parse_args())
    out, seed = arguments.pop("out"), arguments.pop("seed")
    try:
        make_demo_data(out, Sizes(**arguments), seed=seed)
    except ValueError as error:
        sys.exit(f"make_demo_data: {error}")
    tables = [*arguments, "vae_train", "vae_val"]
    print(f"{out}: {', '.join(f'{name}.csv' for name in tables)} and codec.safetensors are ready")


if __name__ == "__main__":
    main()
