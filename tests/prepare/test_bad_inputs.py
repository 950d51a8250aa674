"""What users, disks and strangers hand in that cannot be used: each is named, and nothing else is lost.

All bad videos lie in one folder beside good ones, and go through the command itself; so do the other bad inputs.
"""

import contextlib
import csv
import io
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mugv_ds.prepare.units import read_table
from tests.helpers.bad_videos import BROKEN, FPS, FRAMES, GOOD, REJECTED, SIZE, UNREADABLE, good, good_film
from tests.helpers.prepared import fit_codec
from tools import prepare

CONFIG = {
    "decode": {"memory_gb": 1.0, "max_frames": 200},
    "select": {
        "fps": {"low": 4.0},
        "sharp": {"low": None, "high": None},
        "motion": {"low": None, "high": None},
    },
    "encode": {"buckets": [{"height": SIZE[0], "width": SIZE[1], "frames": 16, "fps": FPS}], "device": "cpu"},
    "embed": {"text_encoder": "hash", "channels": 16, "max_tokens": 40, "device": "cpu"},
    "validation": {"share": 0.0},
}


class Watched(io.StringIO):
    """What a command prints, in which some lines start something: word at the line's beginning → what."""

    def __init__(self, reactions: dict[str, Callable[[], object]]) -> None:
        super().__init__()
        self.reactions = dict(reactions)

    def write(self, text: str) -> int:
        word = text.strip().partition(":")[0]
        if word in self.reactions:
            self.reactions.pop(word)()
        return super().write(text)


def run(arguments, reactions=None) -> tuple[int, str, str]:
    """Runs the command in this process; returns its status and what it printed."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    out, err = Watched(reactions or {}), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = prepare.main([str(argument) for argument in arguments])
            except SystemExit as error:
                status = error.code
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    return status, out.getvalue(), err.getvalue()
