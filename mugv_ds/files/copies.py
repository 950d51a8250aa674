"""Copies on this host's disk of objects in a store that are read as files: manifests, and weights.

<cache>/<hash>/<name>/…  what was below a URL at a time; the hash is of the URL and of what the store says of objects

The cache is the folder in MUGV_DS_CACHE, or ~/.cache/mugv_ds. A copy is of the content at one time: other content goes
into another folder. Nothing is removed by itself.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mugv_ds.files.objects import ObjectFolder

CACHE_VARIABLE = "MUGV_DS_CACHE"


def cache_folder() -> Path:
    """Returns the folder that copies are kept in."""
    named = os.environ.get(CACHE_VARIABLE)
    return Path(named) if named else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mugv_ds"


def copied(
    objects: ObjectFolder, names: Iterable[str], download: Callable[[str, Path], None] | None = None
) -> tuple[Path, list[str]]:
    """Copies objects that are directly below a URL; one that is there already is not fetched again.

    The processes of a host wait for each other: one of them fetches.

    Args:
        objects: below the URL. names: of the objects; those that are not there are left out.
        download: fetches an object to a path, whole or not at all; by default `ObjectFolder.download` does.

    Returns:
        The local folder, which has the name of the URL's, and the names that were there.

    Raises:
        OSError: the store or the disk failed.
    """
    there = {name: objects.identity(name) for name in sorted(set(names)) if objects.exists(name)}
    key = hashlib.sha256(json.dumps([str(objects), there]).encode()).hexdigest()[:16]
    folder = cache_folder() / key / (str(objects).rpartition("/")[2] or "objects")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_name("lock")):
        for name in there:
            if not (folder / name).exists():
                half = folder / f"{name}.tmp"
                (download or objects.download)(name, half)
                half.replace(folder / name)
    return folder, list(there)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
