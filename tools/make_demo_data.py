"""Draws the demo data set: captioned clips of moving shapes, encoded and ready to train on. Nothing is downloaded."""

import argparse
import sys

from mugv_ds.prepare.demo import make_demo_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="data/demo", help="folder to write (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=720, help="training clips (default: %(default)s)")
    parser.add_argument("--held-out", type=int, default=64, help="clips of val.csv (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of everything drawn (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        make_demo_data(arguments.out, clips=arguments.clips, held_out=arguments.held_out, seed=arguments.seed)
    except ValueError as error:
        sys.exit(f"make_demo_data: {error}")
    print(f"{arguments.out}: train.csv, val.csv and codec.safetensors are ready")


if __name__ == "__main__":
    main()
