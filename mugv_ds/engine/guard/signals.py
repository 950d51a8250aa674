"""Being asked to stop, from the first lines of a process on: so this file imports nothing that takes time to load."""

import signal
import threading

GONE = -1  # in the place of a signal: a launcher of this process has ended, which then can tell it nothing any more

_STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LOOK_EVERY = 1.0  # seconds
_LAUNCHERS = (
    *("deepspeed", "deepspeed.launcher.runner", "deepspeed.launcher.launch", "mugv_ds.cli.deepspeed_launch"),
    *("launch.py", "mugv-ds"),
)


class StopSignals:
    """Notes SIGTERM, SIGINT and SIGUSR1, and that a launcher is gone; interrupts nothing, however often they come.

    A launcher that is killed leaves its ranks behind. They have to see by themselves that they are to stop.

    Attributes:
        received: the last of them, a signal or GONE; 0 while there was none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._watch: threading.Thread | None = None

    def listen(self) -> None:
        """From now on. Only the main thread may call it; again it does nothing new."""
        for number in _STOPPING:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)  # system calls go on: not all code around them expects EINTR
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)  # `tools/launch.py` has SIGUSR1 held back until here
        if self._watch is None:
            self._watch = threading.Thread(target=self._watch_launchers, daemon=True)
            self._watch.start()

    def _note(self, number: int, _frame) -> None:
        self.received = number

    def _watch_launchers(self) -> None:
        import psutil

        def is_launcher(process: psutil.Process) -> bool:
            try:
                words = process.cmdline()
            except psutil.Error:  # gone, or another user's
                return False
            program, *words = (word.rpartition("/")[2] for word in words or [""])
            return program.startswith("python") and any(word in _LAUNCHERS for word in words[:3])  # -u -m deepspeed.…

        def lives(process: psutil.Process) -> bool:
            try:
                return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            except psutil.Error:
                return False

        launchers = [process for process in psutil.Process().parents() if is_launcher(process)]
        while launchers and all(map(lives, launchers)):
            threading.Event().wait(_LOOK_EVERY)
        if launchers:
            self.received = self.received or GONE


def name(number: int) -> str:
    """What a number in `StopSignals.received` says happened to a rank."""
    return "lost its launcher" if number == GONE else f"got {signal.Signals(number).name}"


SIGNALS = StopSignals()  # of this process: handlers belong to it
