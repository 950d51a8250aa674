"""Output that a run can do without: curves, previews, the record of incidents."""

from collections.abc import Callable

from safetensors import SafetensorError

from mugv_ds.config.console import say


class OptionalOutput:
    """Writes, and where the disk does not take it says so once and goes on: no step is lost for it.

    Args:
        what: is written, and where; a warning begins with it.
    """

    def __init__(self, what: str) -> None:
        self._what, self._warned = what, False

    def attempt(self, write: Callable[[], object]) -> bool:
        """Calls `write`; returns whether the disk took what it wrote."""
        try:
            write()
        except (OSError, SafetensorError) as error:
            if not self._warned:
                self._warned = True
                say(f"warning: {self._what}: {error}; the run goes on without", error=True)
            return False
        return True
