"""A run's folder of checkpoints: names, durable writing, verifying, removal. Nothing here knows of ranks.

<run>/step-00000006/      complete: it was renamed from .tmp after everything in it was on disk
<run>/step-00000009.tmp/  being written, or left over from a run that died
<run>/latest              the name of the newest
<run>/lock                held by the run that uses the folder
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugv_ds.checkpoint.manifest import MANIFEST_NAME, BrokenCheckpointError, FileEntry, Manifest, parse
from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.regular_file import NotRegularError, open_regular, read_bytes_file
from mugv_ds.files.retry import STORE_WAITS, retried

LATEST = "latest"
LOCK = "lock"
BEAT_SECONDS = 10.0  # of a lock that is a file
_STALE_BEATS = 6  # missed by a holder that is taken to be gone
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL}  # a file system without locks
_STEP = re.compile(r"step-([0-9]{8,12})")
_LEFT_OVER = re.compile(r"step-[0-9]{8,12}(\.removed)?\.tmp")
_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64"}
_CHUNK = 1 << 20  # bytes that are hashed and written at once: few enough to be read from memory only once
MAX_MANIFEST_BYTES = 1 << 28
_TOKEN_WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)  # seconds
MAX_NAME_BYTES = 256  # of what is in `latest`

_retried = partial(retried, waits=STORE_WAITS, raises=OSError)


def step_name(step: int) -> str:
    """The name of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_folder(run: Path, step: int) -> Path:
    """Where it is."""
    return run / step_name(step)


def unfinished_folder(run: Path, step: int) -> Path:
    """Where it is written."""
    return run / f"step-{step:08d}.tmp"


def step_of(name: str) -> int | None:
    """The step that a checkpoint's folder is named by; None: it is no such name."""
    match = _STEP.fullmatch(name)
    return int(match[1]) if match else None


def saved_steps(run: Path) -> list[int]:
    """The steps with a checkpoint, newest first; whether it is sound is another question."""
    steps = {step_of(path.name) for path in run.glob("step-*") if path.is_dir() and not path.is_symlink()} - {None}
    return sorted((step for step in steps if step_folder(run, step).is_dir()), reverse=True)


def candidates(run: Path) -> tuple[list[int], str | None]:
    """The steps with a checkpoint, newest first, and what is odd in the folder, if anything.

    `latest` is for readers and other tools. The checkpoints themselves decide: one newer than `latest` is from a run
    that was killed before it could say so.

    Raises:
        CheckpointError: `latest` does not name a checkpoint, or names one where there are none.
    """
    steps, notes = saved_steps(run), []
    links = sorted(path.name for path in run.glob("step-*") if path.is_symlink())
    if links:
        notes.append(f"{run}: {', '.join(links)}: symlinks are passed over; move the checkpoints themselves here")
    note = _odd_latest(run, steps)
    return steps, "; ".join([*notes, *([note] if note else [])]) or None


def _odd_latest(run: Path, steps: list[int]) -> str | None:
    """What is odd about `latest`; see `candidates` for the errors."""
    latest = run / LATEST
    try:
        with open_regular(latest) as file:
            name = file.read(MAX_NAME_BYTES).decode(errors="replace").strip()
    except FileNotFoundError:
        return f"{latest}: missing; the folder is scanned" if steps else None
    except NotRegularError as error:
        raise CheckpointError(f"{error}; remove it") from None
    if not name:
        return f"{latest}: empty; the folder is scanned" if steps else None
    if not _STEP.fullmatch(name):
        raise CheckpointError(f"{latest}: names {name!r}, which is not a checkpoint; write step-<n> into it")
    if not steps:
        raise CheckpointError(f"{latest}: names {name}, but {run} holds no checkpoint; remove {latest} to start afresh")
    return None if (run / name).is_dir() else f"{latest}: names {name}, which is not there; the folder is scanned"


def write_token(run: Path) -> str:
    """Writes a small file under a name of its own, by which other hosts can tell that they see this folder."""
    name = f".shared-{uuid.uuid4().hex}"
    (run / name).touch()
    return name


def check_token(run: Path, name: str) -> None:
    """Looks for the file of `write_token`, some seconds long: network file systems take a while to show a new name.

    Raises:
        CheckpointError: it is not there.
    """
    for wait in (0.0, *_TOKEN_WAITS):
        time.sleep(wait)
        if (run / name).exists():
            return
    raise CheckpointError(
        f"{run}: {socket.gethostname()} does not see what rank 0 wrote there; all hosts need one folder as "
        "checkpoint.dir, on a shared file system"
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> FileEntry:
    """Writes contiguous CPU tensors as a safetensors file, and waits until it is on the disk.

    It is hashed as it is written, and nothing is copied: the library's own writer would hold the file in memory.

    Raises:
        OSError: the disk is full or fails.
    """
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants the data aligned
    parts = [len(text).to_bytes(8, "little") + text, *(t.view(-1).view(torch.uint8).numpy() for t in tensors.values())]
    try:
        return _retried(lambda: _write_parts(path, parts))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # a full disk does not say which file


def _write_parts(path: Path, parts: Iterable[bytes | np.ndarray]) -> FileEntry:
    hashed, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for part in parts:
            data = memoryview(part)
            size += len(data)
            for begin in range(0, len(data), _CHUNK):
                chunk = data[begin : begin + _CHUNK]
                hashed.update(chunk)
                while chunk:
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return FileEntry(bytes=size, sha256=hashed.hexdigest())


def write_durably(path: Path, data: bytes) -> None:
    """Writes a small file, and waits until it is on the disk."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Waits until the names in a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_folder(run: Path, step: int, needed: int) -> None:
    """Makes the folder that a checkpoint of `needed` bytes is written into.

    Raises:
        CheckpointError: there is not enough space. OSError: the file system fails.
    """
    _retried(lambda: discard(run, step))
    free = free_bytes(run)
    if needed > free:
        raise CheckpointError(
            f"{run}: a checkpoint takes {gib(needed)} and {gib(free)} are free; free some, or lower "
            "checkpoint.keep_last"
        )
    unfinished_folder(run, step).mkdir()


def commit(run: Path, step: int, manifest: Manifest) -> None:
    """Completes a checkpoint whose other files are on the disk; from the rename on it is valid."""
    unfinished = unfinished_folder(run, step)
    _retried(lambda: write_durably(unfinished / MANIFEST_NAME, manifest.dump()))
    _retried(lambda: sync_folder(unfinished))
    remove(run, step)  # one that was found broken, or from before the run went back
    publish(run, step)


def publish(run: Path, step: int) -> None:
    """The rename that makes a checkpoint valid."""
    _rename(unfinished_folder(run, step), step_folder(run, step))
    sync_folder(run)


def point_latest(run: Path, step: int) -> None:
    """Replaces `latest`."""
    beside = run / f"{LATEST}.tmp"
    write_durably(beside, f"{step_folder(run, step).name}\n".encode())
    beside.replace(run / LATEST)
    sync_folder(run)


def _rename(source: Path, target: Path) -> None:
    """Renames; a network file system that did so may answer, to a request it had to repeat, that there is no source."""
    try:
        source.rename(target)
    except FileNotFoundError:
        if source.exists() or not target.exists():
            raise


def discard(run: Path, step: int) -> None:
    """Removes what was written of a checkpoint that is not complete."""
    if unfinished_folder(run, step).exists():
        shutil.rmtree(unfinished_folder(run, step))


def remove(run: Path, step: int) -> None:
    """Removes a complete checkpoint, if it is there; renamed first, so that a half-removed one is never taken."""
    doomed = run / f"step-{step:08d}.removed.tmp"
    if step_folder(run, step).exists():
        if doomed.exists():
            shutil.rmtree(doomed)
        _rename(step_folder(run, step), doomed)
        sync_folder(run)
        shutil.rmtree(doomed)


def sweep(run: Path) -> None:
    """Removes what runs that died have left over in the folder."""
    for path in run.glob("step-*.tmp"):
        if _LEFT_OVER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
    (run / f"{LATEST}.tmp").unlink(missing_ok=True)


def expired(steps: list[int], newest: int, keep_last: int, keep_every: int) -> list[int]:
    """Those of `steps` up to `newest` that are neither among the last nor kept for ever.

    Args:
        keep_every: steps divisible by it are kept for ever, but for 0, the start; 0: none is.
    """
    older = sorted((step for step in steps if step <= newest), reverse=True)
    return [step for step in older[keep_last:] if step == 0 or keep_every == 0 or step % keep_every]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint's folder.

    Raises:
        BrokenCheckpointError: it is missing or not as it was written. CheckpointError: a newer version wrote it.
    """
    path = folder / MANIFEST_NAME
    try:
        text = read_bytes_file(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BrokenCheckpointError(f"{path}: {error.strerror}") from None
    except InputError as error:
        raise BrokenCheckpointError(str(error)) from None
    manifest = parse(text, str(path))
    if _STEP.fullmatch(folder.name) and folder.name != step_folder(folder.parent, manifest.step).name:
        raise BrokenCheckpointError(f"{path}: is of step {manifest.step}")
    return manifest


def verify(path: Path, entry: FileEntry) -> None:
    """Compares a file with what the manifest says of it.

    Raises:
        BrokenCheckpointError: it is missing, or differs in size or content.
    """
    try:
        if path.is_symlink() or not path.is_file():
            raise BrokenCheckpointError(f"{path}: missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise BrokenCheckpointError(f"{path}: {size} bytes, the manifest says {entry.bytes}")
        found = _retried(lambda: _sha256(path))
    except OSError as error:
        raise BrokenCheckpointError(f"{path}: {error.strerror}") from None
    if found != entry.sha256:
        raise BrokenCheckpointError(f"{path}: its SHA-256 differs from the manifest's")


def _sha256(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Lock:
    """Keeps other runs out of a folder until it is released or the process ends, however it ends.

    The kernel's lock does that where the file system knows it. Where it does not (some of Lustre and NFS), the lock is
    a file that only one can make, with a heartbeat; one whose holder is dead is taken over.

    Raises:
        CheckpointError: another run has it.
    """

    def __init__(self, run: Path) -> None:
        self._path = run / LOCK
        self._beating = threading.Event()
        try:
            self._file = self._path.open("a+")
        except OSError as error:
            raise CheckpointError(f"{self._path}: {error.strerror}; name another checkpoint.dir") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read(256).strip()
            self._file.close()
            raise self._taken(holder) from None
        except OSError as error:
            self._file.close()
            if error.errno not in _NO_LOCKS:
                raise CheckpointError(f"{self._path}: cannot be locked: {error.strerror}") from None
            self._hold()
            return
        self._file.truncate(0)
        self._file.write(f"{own_name()}\n")
        self._file.flush()

    def _hold(self) -> None:
        """Makes the file that stands for the lock, and keeps it young."""
        self._path = self._path.with_name(f"{LOCK}.held")
        for _ in range(2):
            try:
                descriptor = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                holder = self._holder()
                if holder is not None:
                    raise self._taken(holder) from None
                say(f"{self._path}: its holder is gone; taken over")
                self._path.unlink(missing_ok=True)
                continue
            except OSError as error:
                raise CheckpointError(f"{self._path}: {error.strerror}; name another checkpoint.dir") from None
            with os.fdopen(descriptor, "w") as file:
                file.write(own_name())
            threading.Thread(target=self._beat, name="lock", daemon=True).start()
            return
        raise self._taken("one that was quicker")

    def _holder(self) -> str | None:
        """Who has the file; None: nobody any more, as a process of this host that is gone, or one without heartbeat."""
        try:
            holder = read_bytes_file(self._path, 256).decode(errors="replace").strip()
            own = re.fullmatch(rf"process ([0-9]+) on {re.escape(socket.gethostname())}", holder)
            if own and not Path(f"/proc/{own[1]}").exists():
                return None
            probe = self._path.with_suffix(f".{os.getpid()}")  # the file system's clock, not this host's
            probe.touch()
            age = probe.stat().st_mtime - self._path.stat().st_mtime
            probe.unlink()
            return None if age > _STALE_BEATS * BEAT_SECONDS else holder
        except FileNotFoundError:
            return None

    def _beat(self) -> None:
        while not self._beating.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # the file system may be away for a while
                os.utime(self._path)

    def _taken(self, holder: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: another run uses this folder ({holder}); end it or set checkpoint.dir to another"
        )

    def release(self) -> None:
        """Lets others in."""
        if self._path.name == LOCK:
            self._file.close()
        else:
            self._beating.set()
            self._path.unlink(missing_ok=True)


def own_name() -> str:
    """What locks call this process."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def free_bytes(run: Path) -> int:
    """Free space of the file system that a run's folder is on."""
    return shutil.disk_usage(run).free


def gib(size: int) -> str:
    """A number of bytes, for people."""
    return f"{size / 2**30:.2f} GiB"
