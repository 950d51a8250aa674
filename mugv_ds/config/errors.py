"""Errors that end a command."""

import sys
from collections.abc import Callable

TEMPORARY = 75  # exit status of a run that may be started again as it is: EX_TEMPFAIL of sysexits.h


class InputError(ValueError):
    """What the user gave cannot be used. Commands print the message, one line, and exit with status 2."""


class ConfigError(InputError):
    """A configuration that cannot be run. The message names the key, what is wrong and what would do."""


class CheckpointError(InputError):
    """A checkpoint that cannot be used, or cannot be written. The message names the file or folder and what to do."""


class PeerError(RuntimeError):
    """Another rank met an error, which it reports; this one only stops."""


class TrainingError(RuntimeError):
    """The run cannot go on, though the user did nothing wrong. Commands print the message and exit with status 1."""


class TransientError(TrainingError):
    """Something outside failed for minutes that may work again later. Commands exit with status 75: start again."""


def exit_status(command: Callable[[], int]) -> int:
    """What `command` returns, or prints its error as one line and gives the status of it.

    Of PeerError nothing is printed: the other rank says why.
    """
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return TEMPORARY if isinstance(error, TransientError) else 1
    except PeerError:
        return 1
