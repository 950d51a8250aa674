"""The command `mugv-ds`: finds the command that is named, imports that one alone and runs it."""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import mugv_ds


class Command(NamedTuple):
    """A command. module: whose `main` runs it. about: a line of `--help`.

    launched: it may run as several processes (`--nproc`, `--hostfile`). given: what comes before the user's arguments.
    """

    module: str
    about: str
    launched: bool = False
    given: tuple[str, ...] = ()


COMMANDS = {
    "demo-data": Command("mugv_ds.cli.make_demo_data", "draw and encode the demo's data sets"),
    "prepare": Command("mugv_ds.cli.prepare", "make a training set of a folder of raw videos"),
    "verify-data": Command("mugv_ds.cli.verify_dataset", "verify a training set"),
    "dry-run": Command("mugv_ds.train", "print what a config would run, and start nothing", given=("--dry-run",)),
    "balance": Command("mugv_ds.cli.balance", "print how evenly a config loads its data ranks"),
    "plan": Command("mugv_ds.cli.plan", "find the fastest layout that fits some number of GPUs"),
    "calibrate": Command("mugv_ds.cli.calibrate", "measure this machine's GPUs for the planner", launched=True),
    "sweep": Command("mugv_ds.cli.sweep", "train with several learning rates and say which is best"),
    "coordinate-check": Command("mugv_ds.cli.coordinate_check", "show whether activations grow with the width"),
    "preflight": Command("mugv_ds.cli.preflight", "check every rank's machine before a run", launched=True),
    "train": Command("mugv_ds.train", "train the DiT", launched=True),
    "train-vae": Command("mugv_ds.train_vae", "train the VideoVAE", launched=True),
    "reference": Command("mugv_ds.cli.reference", "write a frozen reference's losses for DPO or KTO", launched=True),
    "rdpo-pairs": Command("mugv_ds.cli.make_rdpo_pairs", "make pairs for DPO that nobody annotated", launched=True),
    "summary": Command("mugv_ds.cli.summary", "print a run's held-out loss before and after"),
    "goodput": Command("mugv_ds.cli.goodput", "print where a run's wall time went"),
    "convert": Command("mugv_ds.cli.convert_hf", "write a checkpoint as published-format weights"),
    "convert-vae": Command("mugv_ds.cli.convert_vae", "write a checkpoint of the VideoVAE as vae.pt"),
    "import": Command("mugv_ds.cli.import_hf", "check weights of any form and write them in a published one"),
    "widen": Command("mugv_ds.cli.widen", "write weights several times as wide"),
    "ema": Command("mugv_ds.cli.ema", "average a run's weights after training"),
    "sample": Command("mugv_ds.cli.sample", "sample videos from weights", launched=True),
    "evaluate": Command("mugv_ds.cli.evaluate", "compare weights by the videos that they sample", launched=True),
    "compare": Command("mugv_ds.cli.compare", "vote blindly between evaluated weights in the browser"),
    "check-hostfile": Command("mugv_ds.cli.check_hostfile", "check a hostfile"),
    "slurm-hostfile": Command("mugv_ds.cli.slurm_hostfile", "write the hostfile of a SLURM allocation"),
}


def usage() -> str:
    """Returns what `mugv-ds --help` prints."""
    launched = [name for name, command in COMMANDS.items() if command.launched]
    lines = [f"  {name:<16} {command.about}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mugv-ds COMMAND …",
            "",
            *lines,
            "",
            "`mugv-ds COMMAND --help` says more. A config is a path, or the name of a shipped one: debug/dpo.",
            "With --nproc N or --hostfile FILE these run as several processes:",
            f"{', '.join(launched)}.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit status, one of `config.errors.Status` unless a rank was killed."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"mugv-ds {mugv_ds.__version__}")
        return 0
    command = COMMANDS.get(name)
    if command is None:
        print(f"error: {name}: no such command; see mugv-ds --help", file=sys.stderr)
        return 2
    sys.argv[0] = f"mugv-ds {name}"  # what argparse calls the command
    if command.launched:
        parser = _launch_options()
        launch, rest = parser.parse_known_args(arguments)
        if launch.nproc is not None or launch.hostfile is not None:
            from mugv_ds.cli.launch import start

            launch.script, launch.arguments = command.module, rest
            return start(launch, module=True)
        if {"-h", "--help"} & set(rest):
            print(parser.format_help())
        arguments = rest
    run = importlib.import_module(command.module).main
    return run([*command.given, *arguments])


def _launch_options() -> argparse.ArgumentParser:
    from mugv_ds.cli.launch import add_launch_options

    parser = argparse.ArgumentParser(usage=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    group = parser.add_argument_group("several processes")
    where = group.add_mutually_exclusive_group()
    where.add_argument("--nproc", type=int, help="processes on this host")
    where.add_argument("--hostfile", help="hosts and their slots, one process each")
    add_launch_options(group)
    return parser


def run() -> None:
    """What the console script calls: runs the command line and ends the process with its exit status."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # what reads the output has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    run()
