"""Reading files whose disk or store may fail: whose fault a failure is, and how long it is waited for."""

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from mugv_ds.config.errors import TransientError
from mugv_ds.data.paths import PathError
from mugv_ds.data.storage import Files, Folder
from mugv_ds.files.retry import READ_WAITS, TRANSIENT
from mugv_ds.files.tensor_file import SampleError

_LONG_WAITS = (10.0, 20.0, 40.0, 60.0, 60.0, 60.0)  # seconds; a file system that is restarted comes back within these
_random = random.Random()  # of its own: training's randomness is a function of the seed alone

T = TypeVar("T")

logger = logging.getLogger(__name__)


def read_patiently(read: Callable[[], T], files: Files) -> T:
    """Returns what `read` returns, and decides of a failure whose fault it is: the file's, or the file system's.

    A file that cannot be opened though its folder can be read is a bad file, as one with a bad content is. A file
    system or store that is away is waited for, some minutes.

    Args:
        read: reads some of `files`; it is called again after a failure.

    Raises:
        SampleError: a file cannot be used; of a path that leads somewhere it must not, too.
        TransientError: the file system did not come back.
    """
    for wait in (*READ_WAITS, *_LONG_WAITS, None):
        try:
            return read()
        except PathError as error:
            raise SampleError(str(error)) from error
        except OSError as error:
            is_away = not files.is_readable()
            if error.errno not in TRANSIENT and not is_away:
                raise SampleError(f"{error.filename or files}: {error.strerror}") from error
            if wait in (_LONG_WAITS[0], None) and not is_away:
                raise SampleError(f"{error.filename or files}: {error.strerror}, time and again") from error
            if wait is None:
                raise TransientError(f"{files}: {error}; the file system has been away for minutes") from error
            logger.warning("%s; trying again in %g s", error, wait)
            if not isinstance(files, Folder):  # of those that a store turned away not all come back together
                wait *= _random.uniform(1.0, 1.25)
            time.sleep(wait)
    raise AssertionError("unreachable: the last attempt returns or raises")
