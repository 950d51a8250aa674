"""Writes the frozen reference's losses on the preference sets of a config; started by `deepspeed`, as training is.

deepspeed --hostfile hostfiles/localhost --no_ssh --node_rank 0 --master_addr 127.0.0.1 \\
    tools/reference.py --config ds_configs/dpo.json
"""

import os

from mugv_ds.engine.guard.signals import SIGNALS

if __name__ == "__main__" and "RANK" in os.environ:
    SIGNALS.listen()  # from here on a signal ends nothing half-way: what is imported below takes seconds

import argparse
from collections.abc import Sequence

from mugv_ds.config import ConfigError, TrainConfig, exit_status, load_config
from mugv_ds.config.command import add_run_arguments, fit_to_launch
from mugv_ds.config.environment import given_world_size, read_environment
from mugv_ds.config.hostfile import check_launcher


def write(config: TrainConfig) -> None:
    """Writes the reference file of every source that names one, as one of the processes of the launch.

    Raises:
        InputError: config, data or weights cannot be used.
        TrainingError, PeerError, Stopped: as in training.
    """
    import torch.distributed as dist

    from mugv_ds.train import reference_model, start

    config = fit_to_launch(config)
    if config is None:
        return
    run = start(config, resume=False)
    for line in reference_model(config, run, fresh=True).write():
        if run.process.rank == 0:
            print(line, flush=True)
    dist.destroy_process_group()  # without it some processes abort at exit


def main(argv: Sequence[str] | None = None) -> int:
    """Parses the command line and writes the files; returns the exit status, as `mugv_ds/train.py` does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "JSON file with a preference section")
    arguments = parser.parse_args(argv)

    def run() -> int:
        if given_world_size() is None:
            raise ConfigError("started without the deepspeed launcher; see the command in --help")
        config = load_config(arguments.config, arguments.set)
        if config.preference is None or not any(source.reference for source in config.preference.sources):
            raise ConfigError(f"{arguments.config}: no source of a preference section names a reference file to write")
        check_launcher(read_environment().world_size)
        write(config)
        return 0

    return exit_status(run)


if __name__ == "__main__":
    from mugv_ds.train import leave

    leave(main())
