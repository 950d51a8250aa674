"""The command line of the training scripts."""

import argparse
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from mugv_ds.config.console import CONSOLE, say
from mugv_ds.config.environment import given_world_size, read_environment
from mugv_ds.config.errors import ConfigError, exit_status
from mugv_ds.config.hostfile import check_launcher
from mugv_ds.config.load import Schema, load_config
from mugv_ds.config.schema import TrainConfig


def training_command(
    argv: Sequence[str] | None,
    description: str,
    schema: type[Schema],
    train: Callable[[Schema], int],
    dry_run: Callable[[Schema, int | None], str],
) -> int:
    """Parses the command line of a process of a launch and trains; returns the exit status, see `config.errors.Status`.

    Args:
        argv: the arguments, by default those of this process. description: what `--help` begins with.
        schema: of the config. train: runs it, and returns the exit status.
        dry_run: describes it; also given the number of processes, None outside of a launch.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_arguments(parser, "JSON file, or the name of one of ds_configs/")
    parser.add_argument("--dry-run", action="store_true", help="print layout, sizes and merged config; start nothing")
    arguments = parser.parse_args(argv)

    def run() -> int:
        world_size = given_world_size()
        config = load_config(arguments.config, arguments.set, schema)
        if arguments.dry_run:
            print(dry_run(config, world_size))
            return 0
        if world_size is None:
            raise ConfigError(
                "started without the deepspeed launcher; see --help, use --dry-run, or give mugv-ds --nproc"
            )
        environment = read_environment()
        check_launcher(environment.world_size)
        divert(config.logging.dir, environment.rank)
        if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
            # Read when PyTorch is imported. Steps of several shapes, and tensors that wait on other streams, otherwise
            # leave gaps of memory that nothing fits into.
            os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        return train(config)

    return exit_status(run)


def add_run_arguments(parser: argparse.ArgumentParser, config_help: str) -> None:
    """Adds the options of a process of a launch that reads a run's config: --config, --set and the launcher's own."""
    parser.add_argument("--config", required=True, help=config_help)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a value")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher gives it; it is in the environment too


def fit_to_launch(config: TrainConfig) -> TrainConfig | None:
    """Returns the config for the processes of this launch, see `TrainConfig.fitted`; None in one that is left over.

    Those that are left over are the last ones; to the others WORLD_SIZE says how many they are.
    """
    environment = read_environment()
    config = config.fitted(environment.world_size)
    parallel = config.parallel
    used = (parallel.data or 0) * parallel.sequence * parallel.pipeline
    if not used or used >= environment.world_size:
        return config
    if environment.rank < used:
        os.environ["WORLD_SIZE"] = str(used)
        return config
    if environment.rank == used:
        say(
            f"note: {environment.world_size - used} of {environment.world_size} processes are left over and end: the "
            f"samples of a step are split over {parallel.data} replicas of {parallel.sequence * parallel.pipeline}"
        )
    return None


def divert(folder: str, rank: int) -> None:
    """Has what libraries print go to `rank<k>.log` in the folder of the logs; one that cannot be written is said."""
    file = Path(folder) / f"rank{rank}.log"
    try:
        CONSOLE.divert(file)
    except OSError as error:
        if rank == 0:
            say(f"note: {file}: {error.strerror}; what libraries print is shown here", error=True)


_LEAVING = threading.Lock()


def leave(status: int, linger: float = 0.0) -> NoReturn:
    """Ends the process with this status, whichever thread calls it first: another that comes meanwhile waits.

    After an error, threads of the process groups outlive the interpreter, whose end would abort the process and with it
    the status that says what happened.

    Args:
        linger: seconds until then.
    """
    with _LEAVING:
        time.sleep(linger)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
