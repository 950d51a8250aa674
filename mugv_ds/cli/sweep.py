"""Trains a config with several learning rates in several cases, and says which rate is best in each.

tools/sweep.py --config ds_configs/debug.json --powers -9 -8 -7 --case "AdamW" \\
    --case "Muon optimizer.kind=muon optimizer.adamw_lr=0.0078125" --out runs/sweep

A case is a name and what it sets. Its runs, one for each rate, follow one another in one process each, on the device of
this machine; what has ended is not run again. Prints the held-out loss at the end of each as a table, and after how
many steps the best run of a case reached what the first case's best run came to.
"""

import argparse
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.load import load_config
from mugv_ds.config.schema import TrainConfig
from mugv_ds.plan.records import read_scalars

HELD_OUT = "validation/loss"
# A run by itself in one process; of no run anything is kept but its curves.
ALONE = ("parallel.data=1", "parallel.sequence=1", "parallel.pipeline=1", "checkpoint.save_every=0", "preview.every=0")


class Case(NamedTuple):
    """What the runs of a column have in common. settings: as `--set` takes them."""

    name: str
    settings: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Reads "name key=value …"."""
        name, *settings = text.split()
        return cls(name, tuple(settings))


def train(config: str | Path, settings: Sequence[str], folder: Path, threads: int) -> None:
    """Trains in a process of its own, whose curves are written to `folder`.

    Raises:
        CalledProcessError: the run failed; it has said why.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launch["LOCAL_SIZE"] = max((os.cpu_count() or 1) // threads, 1)  # a process takes its share of the cores
    command = [sys.executable, "-m", "mugv_ds.train", "--config", str(config)]
    for setting in (*ALONE, f"checkpoint.dir={folder}/checkpoints", f"logging.dir={folder}", *settings):
        command += ["--set", setting]
    environment = os.environ | {name: str(value) for name, value in launch.items()}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)


def held_out(folder: Path) -> dict[int, float]:
    """Returns the held-out losses of a run by step; none where there is no run."""
    try:
        return dict(read_scalars(folder).get(HELD_OUT, ())) if folder.exists() else {}
    except InputError:  # it ended before it wrote any
        return {}


def report(cases: Sequence[Case], powers: Sequence[int], curves: dict[tuple[str, int], dict[int, float]]) -> str:
    """Returns the table of the last held-out losses, and a line about the best run of each case.

    Args:
        curves: of each case's name and power of two, the held-out losses by step.
    """
    lines = [
        f"| rate | {' | '.join(case.name for case in cases)} |",
        f"|---|{'---|' * len(cases)}",
    ]
    last = {run: curve[max(curve)] for run, curve in curves.items()}
    best = {case.name: min(powers, key=lambda power: last[case.name, power]) for case in cases}
    for power in powers:
        losses = [f"{last[case.name, power]:.4f}" for case in cases]
        shown = [f"**{x}**" if best[case.name] == power else x for case, x in zip(cases, losses, strict=True)]
        lines.append(f"| 2^{power} | {' | '.join(shown)} |")
    goal = last[cases[0].name, best[cases[0].name]]
    for case in cases:
        curve = curves[case.name, best[case.name]]
        reached = next((step for step in sorted(curve) if curve[step] <= goal), None)
        when = "never" if reached is None else f"after {reached} of {max(curve)} steps ({reached / max(curve):.0%})"
        lines.append(f"{case.name}: best at 2^{best[case.name]}; {goal:.4f} reached {when}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line, trains, and prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="of the runs, a path or a name; it must hold out data")
    parser.add_argument("--powers", type=int, nargs="+", required=True, help="optimizer.lr = 2^POWER")
    parser.add_argument("--case", action="append", required=True, help='"name key=value …"; may be given again')
    parser.add_argument("--set", action="append", default=[], help="what all runs set, as with training")
    parser.add_argument("--threads", type=int, default=1, help="of a run on a CPU (default: 1)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    args = parser.parse_args(argv)
    cases = [Case.parse(text) for text in args.case]
    curves = {}
    try:
        for case in cases:
            for power in args.powers:
                folder = args.out / case.name / f"{power}"
                settings = [*args.set, *case.settings, f"optimizer.lr={2.0**power}"]
                config = load_config(args.config, settings, TrainConfig)
                if config.data.val_manifest is None:
                    raise ConfigError(
                        f"{args.config}: data.val_manifest: required; rates are judged by what it holds out"
                    )
                if max(held_out(folder), default=0) < config.schedule.steps:
                    train(args.config, settings, folder, args.threads)
                curves[case.name, power] = held_out(folder)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except subprocess.CalledProcessError as error:  # it has said why
        return error.returncode
    print(report(cases, args.powers, curves))
    return 0


if __name__ == "__main__":
    sys.exit(main())
