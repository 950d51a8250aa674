"""Finds optional packages and the model files in them, without importing the packages."""

import importlib.util
from pathlib import Path


def folder_of(package: str) -> Path | None:
    """Returns the folder of an installed top-level package; None where there is none."""
    found = importlib.util.find_spec(package)  # of a top-level package, this runs none of its code
    return Path(found.origin).parent if found is not None and found.origin else None


def missing_extra(extra: str, *packages: str) -> str | None:
    """Returns in words which package of an extra is not installed; None if all are."""
    absent = [package for package in packages if folder_of(package) is None]
    return f"{', '.join(absent)} not installed; the extra {extra} has it" if absent else None
