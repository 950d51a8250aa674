"""What went wrong in a run and what was done about it, one JSON object a line."""

import json
import os
import time
from pathlib import Path
from typing import Any

from mugv_ds.engine.optional import OptionalOutput

NAME = "incidents.jsonl"


class Incidents:
    """Appends to `incidents.jsonl` in the run's folder; on ranks other than 0 nothing happens.

    Args:
        folder: of the run. rank: global rank.

    Attributes:
        path: of the file.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.path, self._rank = folder / NAME, rank
        self._output = OptionalOutput(str(self.path))

    def write(self, event: str, step: int, **facts: Any) -> None:
        """Adds a line, on disk when the call returns: what happened after `step` steps, and the facts of it.

        A line that the disk does not take is left out, and the first such one is warned of.
        """
        if self._rank != 0:
            return
        line = {"event": event, "step": step, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts}
        self._output.attempt(lambda: self._append(json.dumps(line) + "\n"))

    def _append(self, line: str) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
