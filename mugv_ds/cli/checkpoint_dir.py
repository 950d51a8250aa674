"""Prints the local folder of a run, given the arguments of mugv_ds/train.py; `latest` is in it once it has saved."""

import argparse
import sys
from collections.abc import Sequence

from mugv_ds.config import exit_status, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the config cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True, help="JSON file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    arguments = parser.parse_args(argv)

    def run() -> int:
        print(load_config(arguments.config, arguments.set).checkpoint.folder)
        return 0

    return exit_status(run)


if __name__ == "__main__":
    sys.exit(main())
