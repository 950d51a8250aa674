"""Where the checkpoints of a run are: in a folder that all hosts see, or in an object store, by way of hosts' disks.

<url>/step-00000006/rank-0.weight.safetensors …  uploaded by the ranks that wrote them
<url>/step-00000006/MANIFEST.json                the marker, uploaded last: a step without it does not exist
<url>/latest                                     the name of the newest
<url>/lock                                       held by the run that uses the URL
<local_dir>/rank-0/                              what rank 0 is about to upload, or has downloaded to read it

A step's files are uploaded and then, when all ranks have said that theirs are there, its marker; they are removed
marker first. So whoever sees a marker finds what it names, though nothing is ever renamed.
"""

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.manifest import MANIFEST_NAME, BrokenCheckpointError, FileEntry, Manifest, parse
from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.schema import CheckpointSection
from mugv_ds.config.url import is_url
from mugv_ds.files.objects import DamagedError, ObjectFolder

BEAT_SECONDS = 10.0  # of a lock in a store
_SILENT_BEATS = 4  # after which its holder is taken to be gone
_MAX_LOCK_BYTES, _MAX_HOLDER = 1 << 12, 256
_DOWNLOADS = 2  # of a file whose hash is wrong: it may have been damaged on the way


class Place(Protocol):
    """The checkpoints of one run, for one rank. `str` of it names the place.

    What says "first" is called on rank 0 alone, the others on all ranks. Those that a place has nothing to do for it
    takes from here, where they do nothing.
    """

    def open(self) -> str:
        """First: keeps other runs out, removes what runs that died have left, and returns a token for `join`.

        Raises:
            CheckpointError: another run uses the place. OSError: it cannot be written.
        """

    def join(self, token: str) -> None:
        """Sees that this rank is at the place that rank 0 has opened.

        Raises:
            CheckpointError: it is not.
        """

    def joined(self, token: str) -> None:
        """First: all have joined."""

    def release(self) -> None:
        """Lets other runs in."""

    def name(self, step: int) -> str:
        """Returns what messages call a checkpoint."""

    def steps(self) -> list[int]:
        """Returns the steps with a checkpoint, newest first; whether it is sound is another question."""

    def candidates(self) -> tuple[list[int], str | None]:
        """Returns `steps`, and what is odd in the place, if anything.

        Raises:
            CheckpointError: `latest` does not name a checkpoint, or names one where there are none.
        """

    def manifest(self, step: int) -> Manifest:
        """Returns the manifest of a checkpoint.

        Raises:
            BrokenCheckpointError: it is missing or not as it was written. CheckpointError: a newer version wrote it.
        """

    def verify(self, manifest: Manifest, share: Iterable[str], needed: Iterable[str]) -> None:
        """Sees that a checkpoint's files are as they were written, and that those needed can be read in `folder`.

        Args:
            share: this rank's share of all files. needed: those that this rank will read.

        Raises:
            BrokenCheckpointError: one is missing, or differs in size or content.
        """

    def folder(self, step: int) -> Path:
        """Returns the local folder that a verified checkpoint is read from, until `read`."""

    def read(self, step: int) -> None:
        """Takes note that this rank reads nothing more of a checkpoint."""

    def start(self, step: int, needed: int) -> None:
        """First: makes room for a checkpoint of `needed` bytes.

        Raises:
            CheckpointError: there is not enough space, or another run has taken the place.
        """

    def unfinished(self, step: int, needed: int) -> Path:
        """Returns the local folder that this rank writes its files of a checkpoint into, `needed` bytes."""

    def put(self, step: int, name: str) -> None:
        """Brings a file that this rank has written to where it belongs."""

    def written(self, step: int) -> None:
        """Takes note that this rank has put all of its files."""

    def commit(self, step: int, manifest: Manifest) -> None:
        """First: completes a checkpoint, whose files all ranks have put."""

    def point_latest(self, step: int) -> None:
        """First: replaces `latest`."""

    def discard(self, step: int) -> None:
        """First: removes what was written of a checkpoint that will not be completed."""

    def remove(self, step: int) -> None:
        """First: removes a complete checkpoint, if it is there."""

    def free_bytes(self) -> int | None:
        """First: returns how much space there is; None where there is no bound."""

    def probe(self, name: str, count: int) -> float:
        """Writes so many bytes to where a checkpoint's file belongs, under a name of this rank's own, and removes them.

        It is called before `open`, while another run may use the place.

        Returns:
            The seconds until they were there.

        Raises:
            OSError: they could not be written.
        """


def place_of(section: CheckpointSection, rank: int = 0) -> Place:
    """Returns where the checkpoints of a run are, for one of its ranks.

    Raises:
        ConfigError: fsspec cannot open the URL.
    """
    if is_url(section.dir):
        return ObjectPlace(ObjectFolder(section.dir, "checkpoint.dir"), section.folder, rank)
    return FolderPlace(section.folder)


def newest_manifest(section: CheckpointSection) -> Manifest | None:
    """Returns the manifest of the newest checkpoint of a run that has a sound one; None: there is none.

    Raises:
        CheckpointError: another version wrote the checkpoint, or the store cannot be read.
    """
    place = place_of(section)
    try:
        for step in place.steps():
            with contextlib.suppress(BrokenCheckpointError):  # who restores it says so
                return place.manifest(step)
    except OSError as error:
        raise CheckpointError(f"{error.filename or place}: {error.strerror}") from None
    return None


class FolderPlace(Place):
    """A `Place` that is a folder of a file system; see `files` for what is in it. run: the folder."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._lock: files.Lock | None = None

    def __str__(self) -> str:
        return str(self._run)

    def open(self) -> str:
        self._run.mkdir(parents=True, exist_ok=True)
        self._lock = files.Lock(self._run)
        files.sweep(self._run)
        return files.write_token(self._run)

    def join(self, token: str) -> None:
        files.check_token(self._run, token)

    def joined(self, token: str) -> None:
        (self._run / token).unlink()

    def release(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def name(self, step: int) -> str:
        return str(self.folder(step))

    def steps(self) -> list[int]:
        return files.saved_steps(self._run)

    def candidates(self) -> tuple[list[int], str | None]:
        return files.candidates(self._run)

    def manifest(self, step: int) -> Manifest:
        return files.read_manifest(self.folder(step))

    def verify(self, manifest: Manifest, share: Iterable[str], needed: Iterable[str]) -> None:
        for name in share:
            files.verify(self.folder(manifest.step) / name, manifest.files[name])

    def folder(self, step: int) -> Path:
        return files.step_folder(self._run, step)

    def start(self, step: int, needed: int) -> None:
        files.start_folder(self._run, step, needed)

    def unfinished(self, step: int, needed: int) -> Path:
        return files.unfinished_folder(self._run, step)

    def commit(self, step: int, manifest: Manifest) -> None:
        files.commit(self._run, step, manifest)

    def point_latest(self, step: int) -> None:
        files.point_latest(self._run, step)

    def discard(self, step: int) -> None:
        files.discard(self._run, step)

    def remove(self, step: int) -> None:
        files.remove(self._run, step)

    def free_bytes(self) -> int | None:
        return files.free_bytes(self._run)

    def probe(self, name: str, count: int) -> float:
        return _probe(self._run / name, count)


class ObjectPlace(Place):
    """A `Place` in an object store.

    Args:
        objects: below the run's URL. local: folder of this run on this host. rank: of this process.
    """

    def __init__(self, objects: ObjectFolder, local: Path, rank: int) -> None:
        self._objects, self._local, self._rank = objects, local, rank
        self._own = local / f"rank-{rank}"
        self._own_lock: files.Lock | None = None
        self._lock: ObjectLock | None = None

    def __str__(self) -> str:
        return str(self._objects)

    def open(self) -> str:
        self._lock = ObjectLock(self._objects)
        whole = self.steps()
        for name in self._objects.names():
            step = files.step_of(name)
            if step is not None and step not in whole:
                self.remove(step)
        return self._lock.token

    def join(self, token: str) -> None:
        if ObjectLock.holder(self._objects).get("token") != token:
            raise CheckpointError(
                f"{self}: {socket.gethostname()} does not see what rank 0 wrote there; all hosts need the same store: "
                "compare endpoints and credentials in their environments"
            )
        self._own.mkdir(parents=True, exist_ok=True)
        self._own_lock = files.Lock(self._own)
        files.sweep(self._own)

    def release(self) -> None:
        for lock in filter(None, (self._lock, self._own_lock)):
            lock.release()
        self._lock = self._own_lock = None

    def name(self, step: int) -> str:
        return self._objects.url(files.step_name(step))

    def steps(self) -> list[int]:
        found = {files.step_of(name) for name in self._objects.names()} - {None}
        return sorted((step for step in found if self._objects.exists(_marker(step))), reverse=True)

    def candidates(self) -> tuple[list[int], str | None]:
        """Returns `steps` and the one that `latest` names, which an old list may not have yet. See `Place`."""
        steps, latest = self.steps(), self._objects.url(files.LATEST)
        try:
            name = self._objects.read(files.LATEST, files.MAX_NAME_BYTES).decode(errors="replace").strip()
        except (FileNotFoundError, DamagedError) as error:
            return steps, f"{latest}: {error.strerror}; the newest in the list is taken" if steps else None
        newest = files.step_of(name)
        if newest is None:
            raise CheckpointError(f"{latest}: names {name!r}, which is not a checkpoint; write step-<n> into it")
        if newest in steps:
            return steps, None
        if self._objects.exists(_marker(newest)):
            note = f"{latest}: names {name}, which the store does not list; it is there and taken"
            return sorted([newest, *steps], reverse=True), note
        if not steps:
            raise CheckpointError(f"{latest}: names {name}, but there is no checkpoint; remove it to start afresh")
        return steps, f"{latest}: names {name}, which is not there; the newest in the list is taken"

    def manifest(self, step: int) -> Manifest:
        where = self._objects.url(_marker(step))
        try:
            text = self._objects.read(_marker(step), files.MAX_MANIFEST_BYTES)
        except (FileNotFoundError, DamagedError) as error:
            raise BrokenCheckpointError(f"{where}: {error.strerror}") from None
        except InputError as error:
            raise BrokenCheckpointError(str(error)) from None
        manifest = parse(text, where)
        if manifest.step != step:
            raise BrokenCheckpointError(f"{where}: is of step {manifest.step}")
        return manifest

    def verify(self, manifest: Manifest, share: Iterable[str], needed: Iterable[str]) -> None:
        """Downloads what this rank needs, whose hashes are those of the files on its disk. See `Place`."""
        folder = self.folder(manifest.step)
        names = list(needed)
        files.start_folder(self._own, manifest.step, sum(manifest.files[name].bytes for name in names))
        for name in names:
            fetch_file(self._objects, f"{files.step_name(manifest.step)}/{name}", folder / name, manifest.files[name])

    def folder(self, step: int) -> Path:
        return files.unfinished_folder(self._own, step)

    def read(self, step: int) -> None:
        files.discard(self._own, step)

    def start(self, step: int, needed: int) -> None:
        self._lock.check()
        self.remove(step)

    def unfinished(self, step: int, needed: int) -> Path:
        files.start_folder(self._own, step, needed)
        return files.unfinished_folder(self._own, step)

    def put(self, step: int, name: str) -> None:
        file = files.unfinished_folder(self._own, step) / name
        self._objects.upload(file, f"{files.step_name(step)}/{name}")
        file.unlink()

    def written(self, step: int) -> None:
        files.discard(self._own, step)

    def commit(self, step: int, manifest: Manifest) -> None:
        self._lock.check()
        self._objects.write(_marker(step), manifest.dump())

    def point_latest(self, step: int) -> None:
        """Also in the local folder, where tools/train.slurm looks for it. See `Place`."""
        self._objects.write(files.LATEST, f"{files.step_name(step)}\n".encode())
        files.point_latest(self._local, step)

    def discard(self, step: int) -> None:
        files.discard(self._own, step)  # what was uploaded has no marker: the next start removes it

    def remove(self, step: int) -> None:
        names = self._objects.names(files.step_name(step))
        if MANIFEST_NAME in names or self._objects.exists(_marker(step)):
            self._objects.remove([_marker(step)])
        self._objects.remove(f"{files.step_name(step)}/{name}" for name in names if name != MANIFEST_NAME)

    def free_bytes(self) -> int | None:
        return None

    def probe(self, name: str, count: int) -> float:
        """Passes through the local folder, as checkpoints do. See `Place`."""
        seconds = _probe(self._own / name, count, lambda file: self._objects.upload(file, name))
        self._objects.remove([name])
        return seconds


def fetch_file(objects: ObjectFolder, path: str, local: Path, entry: FileEntry) -> None:
    """Downloads a file of a checkpoint, which is there as a whole, with the content that was written, or not at all.

    Raises:
        BrokenCheckpointError: it is missing, or what comes is something else, twice. OSError: the store failed.
    """
    half = local.with_name(f"{local.name}.half")
    for attempt in range(1, _DOWNLOADS + 1):
        try:
            objects.download(path, half)
            files.verify(half, entry)
        except (FileNotFoundError, DamagedError) as error:
            raise BrokenCheckpointError(f"{objects.url(path)}: {error.strerror}") from None
        except BrokenCheckpointError as error:
            if attempt == _DOWNLOADS:
                raise BrokenCheckpointError(str(error).replace(str(half), objects.url(path))) from None
        else:
            half.replace(local)
            return


class ObjectLock:
    """Keeps other runs out of a URL, as far as a store can: an object that says who has it, with a heartbeat.

    One whose holder does not change it for four beats, or was a process of this host that has ended, is taken over. Two
    that come at once are told apart where the store can create an object that must be new; else the later one has it.
    Who has lost it finds out before the next marker, see `check`; between that look and the marker nothing protects.

    Args:
        objects: below the URL.

    Attributes:
        token: of this holder.

    Raises:
        CheckpointError: another run has it. OSError: the store cannot be written.
    """

    def __init__(self, objects: ObjectFolder) -> None:
        self.token = uuid.uuid4().hex
        self._objects, self._beats, self._ended = objects, 0, threading.Event()
        there = self.holder(objects)
        if there:
            self._wait_for_silence(there)
        with contextlib.suppress(FileExistsError):  # perhaps of a first attempt whose answer was lost
            self._write(new=not there)
        self.check()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    @staticmethod
    def holder(objects: ObjectFolder) -> dict[str, object]:
        """Returns what the lock says: `holder`, `token` and `beat`; empty where there is none."""
        try:
            said = json.loads(objects.read(files.LOCK, _MAX_LOCK_BYTES))
        except (FileNotFoundError, DamagedError, ValueError):  # also one that somebody else wrote: none keeps it alive
            return {}
        return said if isinstance(said, dict) else {}

    def check(self) -> None:
        """Sees that nobody else has taken the lock.

        Raises:
            CheckpointError: somebody has. OSError: the store cannot be read.
        """
        there = self.holder(self._objects)
        if there.get("token") != self.token:
            raise self._taken(there)

    def release(self) -> None:
        """Lets others in; where the store is away, they wait until the lock is silent."""
        self._ended.set()
        self._thread.join(BEAT_SECONDS)
        with contextlib.suppress(OSError, CheckpointError):
            self.check()
            self._objects.remove([files.LOCK])

    def _write(self, new: bool = False) -> None:
        about = {"holder": files.own_name(), "token": self.token, "beat": self._beats}
        self._objects.write(files.LOCK, json.dumps(about).encode(), new=new)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_SECONDS):
            try:
                self.check()
                self._beats += 1
                self._write()
            except CheckpointError:
                return  # the next save says so
            except OSError:
                continue  # the store may be away for a while

    def _wait_for_silence(self, there: dict[str, object]) -> None:
        name = str(there.get("holder", ""))[:_MAX_HOLDER]
        own = re.fullmatch(rf"process ([0-9]+) on {re.escape(socket.gethostname())}", name)
        if own and not Path(f"/proc/{own[1]}").exists():
            return
        seconds = _SILENT_BEATS * BEAT_SECONDS
        say(f"{self._objects.url(files.LOCK)}: of {name}; {seconds:g} s are waited to see whether it is alive")
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(BEAT_SECONDS / 2)
            if (now := self.holder(self._objects)) != there:
                if now:
                    raise self._taken(now)
                return
        say(f"{self._objects.url(files.LOCK)}: its holder is gone; taken over")

    def _taken(self, there: dict[str, object]) -> CheckpointError:
        holder = str(there.get("holder", "it removed the lock"))[:_MAX_HOLDER]
        return CheckpointError(
            f"{self._objects.url(files.LOCK)}: another run uses this place ({holder}); end it or set checkpoint.dir to "
            "another"
        )


def _marker(step: int) -> str:
    return f"{files.step_name(step)}/{MANIFEST_NAME}"


def _probe(file: Path, count: int, then: Callable[[Path], None] = lambda _: None) -> float:
    """The seconds in which a file of so many bytes is written, and `then` done with it; it is removed again."""
    content = os.urandom(count)  # which no file system compresses
    file.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    try:
        files.write_durably(file, content)
        then(file)
        return time.perf_counter() - began
    finally:
        file.unlink(missing_ok=True)
