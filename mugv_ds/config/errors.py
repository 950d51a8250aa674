"""Errors that end a command, and the exit statuses that they end it with."""

import traceback
from collections.abc import Callable
from enum import IntEnum

from mugv_ds.config.console import say


class Status(IntEnum):
    """The exit statuses of all commands: of a rank, and of `tools/launch.py`, which passes them on."""

    DONE = 0
    FAILED = 1  # the run cannot go on: it said why, a rank died, or nobody foresaw the error
    INPUT = 2  # a line says what to change
    AGAIN = 75  # stopped with all of its work saved, or hung: the same command goes on; EX_TEMPFAIL of sysexits.h


class InputError(ValueError):
    """What the user gave cannot be used. Commands print the message, one line, and exit with `Status.INPUT`."""

    status = Status.INPUT


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the key, what is wrong and what would do."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used, or cannot be written. The message names the file or folder and what to do."""


class TrainingError(RuntimeError):
    """The run cannot go on, though the user did nothing wrong. Commands print the message and exit with status 1."""

    status = Status.FAILED


class TransientError(TrainingError):
    """Something outside failed for minutes that may work again later. Commands exit with `Status.AGAIN`."""

    status = Status.AGAIN


class PeerError(RuntimeError):
    """Another rank met an error, which it reports; this one only stops, with the status that the error has there.

    The launcher passes on the status of the rank that it happens to see first, so that all have to give the same.

    Args:
        message: which rank. status: of the other rank's error.
    """

    def __init__(self, message: str, status: int = Status.FAILED) -> None:
        super().__init__(message)
        self.status = status


class Stopped(Exception):
    """The run was asked to stop, as all ranks know: each of them raises it, at the same place."""

    status = Status.AGAIN


_ENDS = (InputError, TrainingError, PeerError, Stopped)


def status_of(failure: Exception) -> int:
    """The exit status of a process that a failure ends: `Status.FAILED` for those that nobody foresaw."""
    return int(failure.status) if isinstance(failure, _ENDS) else int(Status.FAILED)


def exit_status(command: Callable[[], int]) -> int:
    """What `command` returns; or the status of an error above, of which InputError and TrainingError print one line.

    Of PeerError nothing is printed: the other rank says why. Of what nobody foresaw, the traceback is.
    """
    try:
        return command()
    except (InputError, TrainingError) as error:
        say(f"error: {error}", error=True)
        return status_of(error)
    except (PeerError, Stopped) as error:
        return status_of(error)
    except Exception:
        say(traceback.format_exc().rstrip(), error=True)
        return Status.FAILED
