"""Shows, without starting anything, how evenly the plan of a config loads the data ranks and how much its steps differ.

tools/balance.py --config ds_configs/base.json --data-ranks 64 --set data.manifest=data/train.csv \\
    --set 'data.budget={"shape": [15, 90, 160], "multiple": 64, "device_tokens": 13501}' \\
    --set data.global_batch_size=128 --set data.micro_batch_size=64

Costs are model FLOPs, or predicted seconds where data.budget.by says so. The steps looked at are the first ones or,
where the shares of data.mixture change over the run, spread over all of it.
"""

import argparse
import sys
from collections.abc import Sequence

from mugv_ds.config import InputError, load_config


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, 2 where the config cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--data-ranks", type=positive, help="data-parallel replicas; by default parallel.data, or 1")
    parser.add_argument("--steps", type=positive, help="steps to look at; by default one epoch, at most 2,000")
    args = parser.parse_args(argv)
    from mugv_ds.plan.balance import balance_report  # once it is needed: a wrong command line answers at once

    try:
        config = load_config(args.config, args.set)
        print(balance_report(config, args.data_ranks or config.fitted(1).parallel.data or 1, args.steps))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def positive(text: str) -> int:
    """Parses a whole number from 1 on; argparse turns the ValueError of others into its own message."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


if __name__ == "__main__":
    sys.exit(main())
