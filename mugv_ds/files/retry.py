"""Reading from a file system that may fail for a moment."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from mugv_ds.config.errors import TrainingError

ATTEMPTS = 3
WAIT_SECONDS = 2.0  # before the second attempt; doubled before each further one

T = TypeVar("T")

logger = logging.getLogger(__name__)


def retried(function: Callable[[], T]) -> T:
    """What `function` returns, called again after a pause when the file system fails.

    Raises:
        TrainingError: it failed `ATTEMPTS` times.
    """
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(WAIT_SECONDS * 2 ** (attempt - 1))
        try:
            return function()
        except OSError as error:
            failure = error
            logger.warning("%s; attempt %d of %d", error, attempt + 1, ATTEMPTS)
    raise TrainingError(f"{failure}; the file system failed {ATTEMPTS} times") from failure
