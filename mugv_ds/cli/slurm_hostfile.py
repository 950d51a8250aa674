"""Writes a hostfile of the hosts in the current SLURM allocation."""

import argparse
import sys
from collections.abc import Sequence

from mugv_ds.config.hostfile import HostfileError, write_slurm_hostfile


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where there is no usable allocation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="hostfile to write")
    parser.add_argument(
        "--slots", type=int, help="processes a host (default: its GPUs in the allocation, or else its CPUs)"
    )
    args = parser.parse_args(argv)
    try:
        hosts = write_slurm_hostfile(args.file, args.slots)
    except HostfileError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.file}: {len(hosts)} hosts, {sum(hosts.values())} slots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
