"""Pauses a training process at points of its start, so that a test can send a signal there: PAUSE_FOLDER has a file for
each point that is wanted, and the first one that a process comes to is taken away and waited at.

Python imports this at its start where the folder is on PYTHONPATH.
"""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from pathlib import Path

# Point → module, and what of it is called; None: when the module is imported.
POINTS = {
    "imports": ("torch", None),
    "index": ("mugv_ds.data.run_data", "RunData.__init__"),
    "loading": ("mugv_ds.weights.start", "put_start"),
    "attention": ("mugv_ds.models.choose_attention", "named_attention"),
    "restoring": ("mugv_ds.checkpoint.store", "Store.restore"),
}
SECONDS = 6.0


def pause(point: str) -> None:
    """Waits at a point if that is wanted, once, and says so by a file."""
    folder = Path(os.environ["PAUSE_FOLDER"])
    if point == "restoring" and not (folder.parent / "checkpoints/latest").exists():
        return  # there is nothing to restore yet
    try:
        (folder / point).rename(folder / f"{point}.reached")
    except FileNotFoundError:
        return
    time.sleep(SECONDS)


class Finder(importlib.abc.MetaPathFinder):
    """Finds the modules of the points as the others do, and has them pause."""

    def find_spec(self, name, path=None, target=None):
        points = [(point, what) for point, (module, what) in POINTS.items() if module == name]
        if not points:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def exec_module(module):
            for point, what in points:
                if what is None:
                    pause(point)
            load(module)
            for point, what in points:
                if what is not None:
                    wrap(module, point, what)

        spec.loader.exec_module = exec_module
        return spec


def wrap(module, point: str, what: str) -> None:
    """Has a function of a module, or a method of a class of it, pause before it begins."""
    *owner, name = what.split(".")
    holder = getattr(module, owner[0]) if owner else module
    function = getattr(holder, name)

    def paused(*args, **kwargs):
        pause(point)
        return function(*args, **kwargs)

    setattr(holder, name, paused)


if "PAUSE_FOLDER" in os.environ and os.environ.get("RANK") == "0":
    sys.meta_path.insert(0, Finder())
