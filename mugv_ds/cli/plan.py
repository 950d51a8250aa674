"""Says, without starting anything, how a config is trained fastest on some number of GPUs: what fits, how long a step
takes and on what, what the run costs, and why other ways are slower.

tools/plan.py --config ds_configs/stage3.json --gpus 64 --page runs/plan.html
tools/plan.py --config ds_configs/h200x4_54k.json --gpus 4 --compare runs/h200x4_54k/tensorboard
tools/plan.py --validate tests/plan/runs/*.json

Times are those of a calibration (`make calibrate`); docs/planning.md says what is predicted, and how well.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mugv_ds.config import InputError, load_config

_GIB = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status: 2 where input cannot be used, 1 where a bound breaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", help="JSON file of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--gpus", type=positive, help="number of GPUs")
    parser.add_argument("--device", help="card, as the driver names it, whose shipped calibration is taken")
    parser.add_argument("--calibration", metavar="FILE", help="a calibration, by name or file, in its place")
    parser.add_argument("--shapes", nargs="+", type=shape, metavar="TxHxW", help="latents in place of the manifest's")
    parser.add_argument("--price", type=amount, help="of a GPU hour")
    parser.add_argument("--gpus-per-host", type=positive, default=8)
    parser.add_argument("--network", type=amount, help="GB/s that a GPU sends to another host (40 is assumed)")
    parser.add_argument("--memory", type=amount, metavar="GIB", help="of a device, in place of the calibrated card's")
    parser.add_argument("--host-memory", type=amount, metavar="GIB", help="for each device, likewise")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the plan as JSON")
    parser.add_argument("--page", type=Path, metavar="OUT", help="write the plan as an HTML page")
    parser.add_argument(
        "--compare", type=Path, metavar="RUN", help="logging.dir of a run: print it beside the prediction"
    )
    parser.add_argument("--validate", nargs="+", type=Path, metavar="RECORD", help="hold predictions to recorded runs")
    args = parser.parse_args(argv)
    if args.validate is None and (args.config is None or args.gpus is None):
        parser.error("--config and --gpus are required, or --validate")
    try:
        return validate(args) if args.validate else plan(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def plan(args: argparse.Namespace) -> int:
    """Plans, or compares; returns the exit status."""
    from mugv_ds.files.atomic import write_atomically
    from mugv_ds.plan import report
    from mugv_ds.plan.search import Limits, Planner, gpus_around
    from mugv_ds.plan.timing import NETWORK, Cluster, Timing

    config = load_config(args.config, args.set)
    cluster = Cluster(args.gpus_per_host, NETWORK if args.network is None else args.network * 1e9)
    timing = Timing(_calibration(args), cluster)
    limits = Limits.of(timing, *(None if n is None else n * _GIB for n in (args.memory, args.host_memory)))
    kinds, missing = _kinds(config, args.shapes)
    planner = Planner(config, kinds, timing, limits)
    if args.compare is not None:
        from mugv_ds.plan.compare import compare_run

        print("\n".join(report.table(compare_run(planner.as_set(args.gpus), args.compare))))
        return 0
    search = planner.search(args.gpus)
    others = ()
    if args.json or args.page:
        others = tuple(search if gpus == args.gpus else planner.search(gpus) for gpus in gpus_around(args.gpus))
    found = report.Plan(args.config, planner, search, others, args.price, tuple(missing))
    print("\n".join(report.lines(found)))
    outputs = {}
    if args.json is not None:
        outputs[args.json] = json.dumps(report.as_json(found), indent=1) + "\n"
    if args.page is not None:
        from mugv_ds.plan.page import page

        outputs[args.page] = page(found)
    for path, text in outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as file:
            file.write(text.encode())
    return 0


def validate(args: argparse.Namespace) -> int:
    """Prints the table of recorded runs, and which bounds break."""
    from mugv_ds.plan.calibration import load_calibration, shipped
    from mugv_ds.plan.compare import broken, hold, markdown
    from mugv_ds.plan.records import read_record

    names = [args.calibration] if args.calibration else shipped()
    held = hold([read_record(path) for path in args.validate], [load_calibration(name) for name in names])
    print("\n".join(markdown(held)))
    found = broken(held)
    for line in found:
        print(line, file=sys.stderr)
    return bool(found)


def _calibration(args: argparse.Namespace):
    """The calibration that is asked for, or the first that is shipped."""
    from mugv_ds.plan.calibration import calibration_of, shipped

    calibration = calibration_of(args.device, args.calibration)
    if calibration is None:
        known = ", ".join(shipped()) or "none"
        raise InputError(f"--device {args.device}: no calibration of it is shipped ({known}); give --calibration FILE")
    return calibration


def _kinds(config, shapes):
    """The kinds of the run's steps, and the manifests that are not there."""
    from mugv_ds.data.run_data import RunData
    from mugv_ds.plan.cost import sample_cost
    from mugv_ds.plan.steps import expected_shapes, given_kinds, kinds_of, missing_manifests

    if shapes is not None:
        return given_kinds(config, shapes), []
    missing = missing_manifests(config)
    if missing:
        return given_kinds(config, expected_shapes(config)), missing
    return kinds_of(RunData(config, sample_cost(config), data_ranks=1).plan, config.schedule.steps), []


def positive(text: str) -> int:
    """Parses a whole number from 1 to 65,536; argparse turns the ValueError of others into its own message."""
    number = int(text)
    if not 1 <= number <= 1 << 16:
        raise ValueError
    return number


def amount(text: str) -> float:
    """Parses a positive number."""
    number = float(text)
    if not 0 < number < 1e9:
        raise ValueError
    return number


def shape(text: str) -> tuple[int, ...]:
    """Parses a latent's shape, such as 15x90x160."""
    sizes = tuple(int(part) for part in text.replace("×", "x").split("x"))
    if len(sizes) != 3 or not all(1 <= size <= 4096 for size in sizes):
        raise ValueError
    return sizes


if __name__ == "__main__":
    sys.exit(main())
