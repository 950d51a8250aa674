"""Which failures of a file system are waited for, and what comes of those that stay."""

import errno

import pytest

from mugv_ds.config.errors import TrainingError
from mugv_ds.files import retry


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    slept = []
    monkeypatch.setattr(retry.time, "sleep", slept.append)
    return slept


def failing(times: int, code: int):
    left = [times]

    def function() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(code, "away", "x")
        return "done"

    return function


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EAGAIN, errno.ENOENT])
def test_what_passes_is_waited_for(waits, code):
    assert retry.retried(failing(2, code)) == "done" and waits == [2.0, 4.0]
    assert retry.retried(failing(1, code), waits=(9,)) == "done" and waits == [2.0, 4.0, 9]


def test_what_stays_is_raised_as_asked(waits):
    with pytest.raises(TrainingError, match=r"away: 'x'; the file system failed 3 times"):
        retry.retried(failing(3, errno.EIO))
    with pytest.raises(OSError, match="away"):
        retry.retried(failing(3, errno.EIO), waits=(1, 2), raises=OSError)
    assert waits == [2.0, 4.0, 1, 2]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EISDIR])
def test_what_does_not_pass_is_raised_at_once(waits, code):
    with pytest.raises(TrainingError, match=r"away: 'x'$"):
        retry.retried(failing(1, code))
    with pytest.raises(OSError, match="away"):
        retry.retried(failing(1, code), raises=OSError)
    assert not waits
