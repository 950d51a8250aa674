"""Says now and then how far a long piece of work has come."""

import time

from mugv_ds.config.console import say

_SECONDS = 10.0


class Progress:
    """Prints a line to stderr at most every ten seconds, and none for work that is done sooner.

    Args:
        what: what is worked on; each line begins with it.
    """

    def __init__(self, what: str) -> None:
        self._what, self._next = what, time.monotonic() + _SECONDS

    def tell(self, done: str) -> None:
        """Prints how much is done, if it is time to."""
        if time.monotonic() >= self._next:
            say(f"{self._what}: {done}", error=True)
            self._next = time.monotonic() + _SECONDS
