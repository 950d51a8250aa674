"""What a launcher tells each process of a run, in environment variables."""

import os
from dataclasses import dataclass

from mugv_ds.config.errors import ConfigError

_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process among those of the launch.

    Attributes:
        world_size: processes of the run. local_size: those of this host.
        rank, local_rank: of this process, among them.
        master_addr, master_port: where rank 0 is found.
    """

    world_size: int
    local_size: int
    rank: int
    local_rank: int
    master_addr: str
    master_port: int


def given_world_size() -> int | None:
    """The number of processes of the run; None outside of a launch.

    Raises:
        ConfigError: WORLD_SIZE is not a number.
    """
    return _number("WORLD_SIZE") if "WORLD_SIZE" in os.environ else None


def read_environment() -> LaunchEnvironment:
    """Reads what the launcher has set.

    Raises:
        ConfigError: a variable is missing, not a number or out of range; names all that are missing.
    """
    missing = [name for name in (*_NUMBERS, "MASTER_ADDR") if not os.environ.get(name)]
    if missing:
        raise ConfigError(f"{', '.join(missing)}: not set; start with tools/launch.py or deepspeed, which set them")
    world_size, rank, local_rank, port = map(_number, _NUMBERS)
    local_size = _number("LOCAL_SIZE") if "LOCAL_SIZE" in os.environ else world_size  # torchrun does not set it
    if not rank < world_size:
        raise ConfigError(f"RANK = {rank}: must be below WORLD_SIZE = {world_size}; start with tools/launch.py")
    if not 0 < port < 1 << 16:
        raise ConfigError(f"MASTER_PORT = {port}: must be 1..65535; give the launcher another --master_port")
    return LaunchEnvironment(world_size, max(local_size, 1), rank, local_rank, os.environ["MASTER_ADDR"], port)


def _number(name: str) -> int:
    text = os.environ[name]
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise ConfigError(f"{name} = {text!r}: must be a whole number; start with tools/launch.py or deepspeed")
    return int(text)
