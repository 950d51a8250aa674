"""Being asked to stop."""

import signal

STOPPED = 75  # exit status of a run that saved and may be started again: EX_TEMPFAIL of sysexits.h

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1 and interrupts nothing, however often they come.

    Attributes:
        received: the last of them; None while there was none.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def listen(self) -> None:
        """From now on. Only the main thread may call it."""
        for number in _STOPPING:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame) -> None:
        self.received = signal.Signals(number)
