"""Samples that cannot be read and those that take their place."""

import numpy as np
import pytest
import torch

from mugv_ds.config.errors import ConfigError, TransientError
from mugv_ds.data import patience
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.quarantine import FILLER, Replacing, replacement
from mugv_ds.data.readers import Sources
from mugv_ds.data.sample import UnsafeFileError
from tests.engine.test_feed import samples
from tests.helpers.dataset import write_config, write_dataset

SHAPES = [(2, 4, 6)] * 6 + [(1, 4, 4)]


@pytest.fixture
def root(tmp_path):
    write_config(tmp_path, write_dataset(tmp_path, SHAPES))
    return tmp_path


def spoil(root, *rows: int) -> None:
    for row in rows:
        torch.save(torch.full((24, *SHAPES[row]), torch.inf), root / f"latents/train-{row}.pt")


def test_the_replacement_follows_from_the_sample_and_its_visit():
    def drawn(seed=0, attempt=0, visits=range(60)):
        return [replacement(alike, 2, seed=seed, name="a", visit=visit, attempt=attempt) for visit in visits]

    alike = np.arange(6)  # the rows of the first shape
    assert drawn() == drawn()
    assert set(drawn()) == {0, 1, 3, 4, 5}, "of its shape, and not itself"
    assert drawn() not in (drawn(seed=1), drawn(attempt=1))
    assert drawn() != [replacement(alike, 2, seed=0, name="b", visit=visit, attempt=0) for visit in range(60)]
    assert replacement(np.array([6]), 6, seed=0, name="a", visit=0, attempt=0) is None


def test_a_bad_sample_is_replaced_and_reported(root):
    read = samples(root, caption_drop=0.0)
    whole = Replacing(read)([SampleRef(0, 0, 0), SampleRef(0, 2, 3)])
    assert whole.quarantined == ()
    spoil(root, 2, 4)
    reading = Replacing(read)([SampleRef(0, 0, 0), SampleRef(0, 2, 3)])
    (bad,) = reading.quarantined
    assert (bad.sample_id, bad.visit) == ("train-2", 3) and "latents/train-2.pt: 0 NaN and " in bad.why
    instead = int(bad.replaced_by.removeprefix("train-"))
    assert instead in {0, 1, 3, 5}
    expected = read([SampleRef(0, 0, 0), SampleRef(0, instead, 3)])
    assert all(torch.equal(one, other) for one, other in zip(reading.batch, expected, strict=True))


def test_bad_text_counts_too_but_not_where_the_caption_is_dropped(root):
    (root / "text_features/train-2_text.pt").write_bytes(b"")
    (bad,) = Replacing(samples(root, caption_drop=0.0))([SampleRef(0, 2, 0)]).quarantined
    assert "train-2_text.pt: 0 bytes" in bad.why
    assert not Replacing(samples(root, caption_drop=1.0))([SampleRef(0, 2, 0)]).quarantined


def test_the_replacement_is_of_the_same_source(root, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    write_config(other, write_dataset(other, [SHAPES[0]] * 3, "other"))
    read = Sources((*samples(root, caption_drop=0.0).readers, *samples(other, caption_drop=0.0).readers))
    torch.save(torch.full((24, *SHAPES[0]), torch.inf), other / "latents/other-1.pt")
    for visit in range(6):
        reading = Replacing(read)([SampleRef(0, 1, visit), SampleRef(1, 1, visit)])
        (bad,) = reading.quarantined
        assert bad.sample_id == "other-1" and bad.replaced_by in {"other-0", "other-2"}
        instead = int(bad.replaced_by.removeprefix("other-"))
        expected = read([SampleRef(0, 1, visit), SampleRef(1, instead, visit)])
        assert all(torch.equal(one, two) for one, two in zip(reading.batch, expected, strict=True))


@pytest.mark.parametrize("row", [2, 6], ids=["all of the shape are bad", "the only one of its shape"])
def test_without_a_readable_replacement_a_filler_counts_nowhere(root, row):
    read = samples(root, caption_drop=0.0)
    spoil(root, *range(7))
    reading = Replacing(read)([SampleRef(0, row, 0)])
    (bad,) = reading.quarantined
    assert bad.replaced_by == FILLER and f"train-{row}.pt: " in bad.why and "be read in its place" in bad.why
    assert reading.batch.weight.tolist() == [0] and tuple(reading.batch.x.shape[2:]) == SHAPES[row]
    spoil_free = Replacing(samples(root, caption_drop=0.0)).sources.readers[0].filler(row)
    assert all(torch.equal(one[0], other) for one, other in zip(reading.batch, spoil_free, strict=True))


def test_what_is_no_sample_s_fault_replaces_none(root):
    read = samples(root, caption_drop=1.0)
    (root / "text_features/negative.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"data\.null_text_path: .*negative\.pt: 0 bytes"):
        Replacing(read)([SampleRef(0, 0, 0)])
    (root / "latents/train-0.pt").write_bytes(b"\x80\x04.")
    with pytest.raises(UnsafeFileError, match="a bare pickle"):
        Replacing(read)([SampleRef(0, 0, 0)])


def test_a_file_system_that_fails_is_asked_again_and_then_ends_the_run(root, monkeypatch):
    read, pauses = samples(root), []
    monkeypatch.setattr(patience.time, "sleep", pauses.append)
    hidden = root.with_name(f"{root.name}-elsewhere")
    root.rename(hidden)
    with pytest.raises(TransientError, match=r"No such file.*the file system has been away for minutes"):
        Replacing(read)([SampleRef(0, 0, 0)])
    assert pauses[:2] == [2.0, 4.0] and 120 < sum(pauses) < 600
    monkeypatch.setattr(patience.time, "sleep", lambda _: hidden.rename(root))
    assert not Replacing(read)([SampleRef(0, 0, 0)]).quarantined
