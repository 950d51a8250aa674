"""Prints where a run's wall time went, over all its starts: useful steps, and everything else by cause.

tools/goodput.py runs/stage1/tensorboard
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from mugv_ds.config.errors import InputError, exit_status

# Of the causes that no phase's name explains.
_ABOUT = {
    "useful": "steps that are part of the run",
    "compile": "what first steps of a shape took longer",
    "stalled": "what steps of more than two medians took longer",
    "skipped": "steps without an update",
    "replayed": "steps that were taken again",
    "start": "from the process's start to its first step",
    "restore": "loading checkpoints",
    "data": "waiting for samples",
    "save": "waiting for checkpoints to be saved",
    "make ready": "rollouts, or the reference's losses",
    "boundary": "all ranks meet after a step: waiting for the last one",
    "other": "between steps",
    "down": "from a process's last step to the next one's start",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="logging.dir of the run")
    parser.add_argument("--json", action="store_true", help="print seconds by cause as JSON")
    args = parser.parse_args(argv)

    def run() -> int:
        print("\n".join(report(args.run, args.json)))
        return 0

    return exit_status(run)


def report(run: Path, as_json: bool) -> Iterator[str]:
    """Yields what is printed.

    Raises:
        InputError: the folder holds no account of a run, or one that cannot be read.
    """
    from mugv_ds.engine.goodput import NAME, read_account

    try:
        account = read_account(run / NAME)
    except FileNotFoundError:
        raise InputError(f"{run}: no {NAME}; name the logging.dir of a run that has begun to take steps") from None
    totals = {name: seconds for name, seconds in account.totals().items() if seconds or name == "useful"}
    if as_json:
        facts = {"steps": account.steps, "starts": account.starts, "wall": account.wall}
        yield json.dumps(facts | {"seconds": totals}, indent=2)
        return
    yield f"{account.steps:,} steps in {account.starts} starts, {account.wall / 3600:,.2f} hours"
    for name, seconds in totals.items():
        yield f"{name:<11} {seconds:>12,.1f} s {seconds / account.wall:>7.2%}  {_ABOUT.get(name, '')}".rstrip()
    yield f"{'all':<11} {sum(totals.values()):>12,.1f} s {sum(totals.values()) / account.wall:>7.2%}"


if __name__ == "__main__":
    sys.exit(main())
