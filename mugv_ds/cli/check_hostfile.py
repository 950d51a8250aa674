"""Checks a hostfile before `deepspeed` is started with it: prints its totals, or one line that says what is wrong."""

import argparse
import sys
from collections.abc import Sequence

from mugv_ds.config.hostfile import HostfileError, parse_hostfile


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the hostfile cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="hostfile, with lines such as 'localhost slots=2'")
    args = parser.parse_args(argv)
    try:
        hosts = parse_hostfile(args.file)
    except HostfileError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{len(hosts)} hosts, {sum(hosts.values())} slots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
