"""Checks the machines that a config is to be trained on, in less than a minute; started as training is.

tools/launch.py --hostfile hostfiles/localhost tools/preflight.py --config ds_configs/debug.json

Names each rank that falls short of the bounds in the config's section "preflight", and by how much; then it exits with
status 1. Nothing of the run is read or written, but for a file in checkpoint.dir that is removed again.
"""

import os

from mugv_ds.engine.guard.signals import SIGNALS

if __name__ == "__main__" and "RANK" in os.environ:
    SIGNALS.listen()  # from here on a signal ends nothing half-way: what is imported below takes seconds

import argparse
from collections.abc import Sequence

from mugv_ds.config import ConfigError, Status, TrainConfig, exit_status, load_config
from mugv_ds.config.command import fit_to_launch, leave
from mugv_ds.config.console import say
from mugv_ds.config.environment import given_world_size, read_environment
from mugv_ds.config.hostfile import check_launcher


def check(config: TrainConfig) -> None:
    """Checks the machine of this process, as one of the processes of the launch.

    Raises:
        InputError, TrainingError, PeerError, Stopped: see `start_process` and `preflight`.
    """
    import torch.distributed as dist

    from mugv_ds.checkpoint.places import place_of
    from mugv_ds.engine.preflight import preflight
    from mugv_ds.engine.process import start_process

    process = start_process(config)
    preflight(config, process, place_of(config.checkpoint, process.rank))
    if process.rank == 0:
        say("preflight: nothing falls short")
    dist.destroy_process_group()  # without it some processes abort at exit


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and checks; returns the exit status, one of `config.errors.Status`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="JSON file of the run, or the name of one of ds_configs/")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; it is in the environment too
    arguments = parser.parse_args(argv)

    def run() -> int:
        if given_world_size() is None:
            raise ConfigError("started without tools/launch.py; see the command in --help, or give mugv-ds --nproc")
        config = load_config(arguments.config, arguments.set)
        check_launcher(read_environment().world_size)
        if (config := fit_to_launch(config)) is not None:
            check(config)
        return Status.DONE

    return exit_status(run)


if __name__ == "__main__":
    leave(main())
