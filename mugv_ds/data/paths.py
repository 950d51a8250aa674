"""The paths of a manifest: relative to its folder, and of regular files in it, or of tensors in shards."""

import errno
import posixpath
import re
import stat
from collections.abc import Collection, Sequence
from pathlib import Path

from mugv_ds.config.errors import InputError

SHARD_SUFFIX = ".safetensors"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_IN_A_SHARD = f"{SHARD_SUFFIX}#"
_MAX_KEY = 200
_METADATA = "__metadata__"  # where a safetensors header keeps what is no tensor


class ManifestError(InputError):
    """The CSV is not a manifest. The message names file, line and what is wrong."""


class PathError(InputError):
    """A path of the manifest leads somewhere it must not. The message names it."""


def resolve(root: str | Path, relative: str) -> Path:
    """The real path of the file `relative` to `root`; a missing file is left to who opens it.

    Raises:
        PathError: the path is absolute, a URL or pipe, leads out of `root` (symlinks followed), or names something that
            exists and is not a regular file.
        FileNotFoundError: `root` itself is gone, as when a mount vanishes.
    """
    check_lexically(relative)
    real_root = Path(root).resolve(strict=True)
    try:
        path = (real_root / relative).resolve()
        if not path.is_relative_to(real_root):
            raise PathError(f"{relative!r} leads out of {root}, to {path}")
        if not stat.S_ISREG(path.stat().st_mode):
            raise PathError(f"{relative!r} in {root} is not a regular file")
    except (FileNotFoundError, NotADirectoryError):
        return path
    except RuntimeError as error:  # how pathlib reports a loop of symlinks
        raise PathError(f"{relative!r} in {root}: {error}") from error
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENAMETOOLONG):
            raise
        raise PathError(f"{relative!r} in {root}: {error.strerror}") from error
    return path


def check_lexically(relative: str, name: str = "path") -> None:
    """What can be told of a path without touching the disk.

    Raises:
        PathError: it is blank, absolute, a URL or pipe, holds a NUL, or climbs out with `..`.
    """
    if not relative.strip() or "\0" in relative:
        raise PathError(f"{name} {relative!r}: must name a file")
    if relative.startswith("/"):
        raise PathError(f"{name} {relative!r}: absolute; must be relative to the CSV's folder")
    if _SCHEME.match(relative):
        raise PathError(f"{name} {relative!r}: a URL or pipe; must be a file in the CSV's folder")
    if ".." in relative and posixpath.normpath(relative).partition("/")[0] == "..":
        raise PathError(f"{name} {relative!r}: leads out of the CSV's folder")


def split_key(path: str) -> tuple[str, str | None]:
    """The file of a manifest's path, and the key of the tensor in it if the path is `….safetensors#key`, else None.

    Raises:
        PathError: a shard is followed by what cannot be a key.
    """
    file, mark, key = path.partition(_IN_A_SHARD)
    if not mark:
        return path, None
    check_key(key)
    return file + SHARD_SUFFIX, key


def distinct_files(paths: Sequence[str]) -> set[str]:
    """The different files of a manifest's paths, as `split_key` has them; all keys are checked at once.

    Raises:
        PathError: a shard is followed by what cannot be a key.
    """
    files, shards, keys = set(), set(), []
    for path in paths:
        file, mark, key = path.partition(_IN_A_SHARD)
        if mark:
            shards.add(file)
            keys.append(key)
        else:
            files.add(path)
    check_keys(keys)
    return files | {file + SHARD_SUFFIX for file in shards}


def check_keys(keys: Collection[str]) -> None:
    """`check_key` of each, all at once."""
    text = "".join(keys)
    good = all(keys) and text.isprintable() and "#" not in text and _METADATA not in keys
    if not good or max(map(len, keys), default=0) > _MAX_KEY:
        for key in keys:
            check_key(key)


def check_key(key: str) -> None:
    """Raises PathError if no tensor of a shard may be called `key`: 1 to 200 printable characters without `#`."""
    if not 0 < len(key) <= _MAX_KEY or not key.isprintable() or "#" in key or key == _METADATA:
        raise PathError(f"{key[:50]!r} cannot be the key of a tensor: 1 to {_MAX_KEY} printable characters without #")
