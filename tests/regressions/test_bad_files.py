"""One bad file, one bad disk: the sample is set aside, the run waits, or it ends with one line. Faults found once."""

import errno
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mugv_ds.checkpoint import files
from mugv_ds.config import CheckpointError
from mugv_ds.config.errors import InputError, PeerError, TrainingError, TransientError, exit_status
from mugv_ds.data import patience
from mugv_ds.data.loader import loader
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.quarantine import FILLER, Replacing
from mugv_ds.engine.guard.history import History
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.weights.published import PublishedWeights
from mugv_ds.weights.save import save_weights
from tests.engine.test_feed import samples
from tests.helpers.dataset import write_config, write_dataset

pytestmark = pytest.mark.regression

SHAPES = [(2, 4, 6)] * 4


@pytest.fixture
def root(tmp_path) -> Path:
    write_config(tmp_path, write_dataset(tmp_path, SHAPES))
    return tmp_path


def as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def as_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def as_outward_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("/etc/passwd")


def huge(path: Path) -> None:
    torch.save(torch.full((24, *SHAPES[0]), 1e30), path)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


@pytest.mark.parametrize("spoil", [as_directory, as_fifo, as_outward_link, huge, truncated])
def test_whatever_is_in_the_place_of_a_latent_sets_the_sample_aside(root, spoil):
    read = samples(root, caption_drop=0.0)
    spoil(root / "latents/train-1.pt")
    reading = Replacing(read)([SampleRef(0, 1, 0)])
    (bad,) = reading.quarantined
    assert bad.sample_id == "train-1" and bad.replaced_by in {"train-0", "train-2", "train-3"}
    assert "train-1.pt" in bad.why and len(bad.why.splitlines()) == 1


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.EISDIR])
def test_a_file_that_alone_cannot_be_read_is_the_file_s_fault(root, monkeypatch, number):
    """The folder can be read, so it is not the file system; an EIO may pass, and is asked again first."""
    read = samples(root, caption_drop=0.0)
    open_, pauses, bad_path = os.open, [], str(root / "latents/train-1.pt")

    def failing(path, *arguments, **options):
        if str(path) == bad_path:
            raise OSError(number, os.strerror(number), str(path))
        return open_(path, *arguments, **options)

    monkeypatch.setattr(os, "open", failing)
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    reading = Replacing(read)([SampleRef(0, 1, 0)])
    (bad,) = reading.quarantined
    assert os.strerror(number) in bad.why and bad.replaced_by != FILLER
    assert pauses == ([2.0, 4.0] if number == errno.EIO else [])


def test_a_file_system_that_stays_away_ends_with_the_status_that_says_again(root, monkeypatch, capsys):
    read = samples(root)
    monkeypatch.setattr(patience.time, "sleep", lambda _: None)
    root.rename(root.with_name(f"{root.name}-elsewhere"))

    def run() -> int:
        Replacing(read)([SampleRef(0, 0, 0)])
        return 0

    assert exit_status(run) == 75
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_item_that_spoilt_two_steps_is_not_read_again(root):
    history = History()
    assert history.suspect([(0, 1), (0, 2)]) == [] and history.aside() == frozenset()
    assert history.suspect([(0, 1), (0, 3)]) == [(0, 1)]
    again = History.model_validate_json(history.model_dump_json())  # as a checkpoint keeps it
    reading = Replacing(samples(root, caption_drop=0.0), again.aside())([SampleRef(0, 1, 0), SampleRef(0, 2, 0)])
    (bad,) = reading.quarantined
    assert bad.sample_id == "train-1" and "no finite loss" in bad.why


class OutOfSharedMemory:
    """A batch whose worker may not write more than a few bytes into a file, as where /dev/shm is full."""

    def __call__(self, refs):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return {"x": torch.zeros(1 << 20)}


class Killed:
    def __call__(self, refs):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "said"), [(OutOfSharedMemory(), "/dev/shm is too small"), (Killed(), "were killed 2 times in a row")]
)
def test_a_worker_that_cannot_hand_over_its_batch_ends_the_run_with_one_line(make, said):
    """It used to hang for ever, or to end in a traceback."""
    steps = loader(
        lambda step: [[SampleRef(0, step, 0)]], start_step=0, stop_step=4, make=make, name=str, num_workers=1
    )
    begin = time.monotonic()
    with pytest.raises(TrainingError, match=said) as error:
        next(steps)
    assert "/dev/shm" in str(error.value) and "data.num_workers" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and time.monotonic() - begin < 60


@pytest.fixture
def no_locks(monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(files.fcntl, "flock", flock)


def test_a_file_system_without_locks_is_locked_by_a_file(tmp_path, no_locks):
    lock = files.Lock(tmp_path)
    with pytest.raises(CheckpointError, match=rf"lock\.held: another run uses this folder \(process {os.getpid()} on"):
        files.Lock(tmp_path)
    lock.release()
    files.Lock(tmp_path).release()


def test_the_lock_of_a_dead_holder_is_taken_over(tmp_path, no_locks, monkeypatch, capfd):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (tmp_path / "lock.held").write_text(f"process {gone.pid} on {socket.gethostname()}")
    files.Lock(tmp_path).release()
    assert "its holder is gone; taken over" in capfd.readouterr().out
    (tmp_path / "lock.held").write_text("process 1 on another-host")
    with pytest.raises(CheckpointError, match="another-host"):
        files.Lock(tmp_path)
    old = time.time() - 1000
    os.utime(tmp_path / "lock.held", (old, old))
    files.Lock(tmp_path).release()


def test_a_rename_that_was_done_but_answers_that_there_is_no_source_is_done(tmp_path, monkeypatch):
    rename = Path.rename

    def twice(self, target):
        rename(self, target)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

    monkeypatch.setattr(Path, "rename", twice)
    files.unfinished_folder(tmp_path, 3).mkdir()
    files.publish(tmp_path, 3)
    assert files.saved_steps(tmp_path) == [3]
    with pytest.raises(FileNotFoundError):
        files.publish(tmp_path, 4)


def test_a_folder_that_is_not_shared_is_found_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    with pytest.raises(CheckpointError, match="does not see what rank 0 wrote there"):
        files.check_token(tmp_path, ".shared-of-another-host")
    files.check_token(tmp_path, files.write_token(tmp_path))


def test_a_checkpoint_that_is_a_symlink_is_named(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "step-00000005").symlink_to(tmp_path / "elsewhere")
    steps, note = files.candidates(tmp_path)
    assert steps == [] and "step-00000005: symlinks are passed over" in note


def test_a_folder_of_the_user_s_is_not_removed(tmp_path):
    """Exports used to write into OUT.partial, removing what was there."""
    mine = tmp_path / "out.partial/notes.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    config = DiTConfig(144, 2, 1, caption_channels=8)
    torch.save(DiT(config).state_dict(), tmp_path / "dit.pt")
    save_weights(PublishedWeights(tmp_path / "dit.pt"), config, tmp_path / "out", "safetensors")
    assert mine.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.partial", "dit.pt"}


def test_the_statuses_of_errors():
    def raising(error):
        def command() -> int:
            raise error

        return command

    statuses = {InputError("x"): 2, TrainingError("x"): 1, TransientError("x"): 75, PeerError("x"): 1}
    for error, status in statuses.items():
        assert exit_status(raising(error)) == status
