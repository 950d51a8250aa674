"""Working on a file system that may be away for a moment."""

import errno
import logging
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from mugv_ds.config.errors import TrainingError

# How a network file system fails that comes back. ENOENT: a mount that is gone leaves an empty folder behind; a file
# that is just not there is told apart by who calls.
TRANSIENT = {
    *(errno.EIO, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
    *(errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOENT),
}
READ_WAITS = (2.0, 4.0)  # seconds before each further attempt to read a sample
STORE_WAITS = (1.0, 5.0, 20.0)  # and of a checkpoint, which is dearer to lose

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retried(
    function: Callable[[], T],
    *,
    waits: Sequence[float] = READ_WAITS,
    raises: type[TrainingError] | type[OSError] = TrainingError,
) -> T:
    """What `function` returns, called again after a while if the file system fails as one does that comes back.

    Args:
        function: what to do; it must not matter if it is done in part and then again.
        waits: seconds before each further attempt.
        raises: what is raised at the end: TrainingError, or OSError for the file system's own error.

    Raises:
        TrainingError, OSError: as asked for; at once if the file system failed otherwise.
    """
    for attempt in range(len(waits) + 1):
        try:
            return function()
        except OSError as error:
            passes = error.errno in TRANSIENT
            if passes and attempt < len(waits):
                logger.warning("%s; trying again in %g s", error, waits[attempt])
                time.sleep(waits[attempt])
                continue
            if raises is OSError:
                raise
            again = f"; the file system failed {attempt + 1} times" if passes else ""
            raise TrainingError(f"{error}{again}") from error
    raise AssertionError("unreachable: the last attempt returns or raises")
