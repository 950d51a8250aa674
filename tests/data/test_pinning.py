"""Batches in pinned memory. Without a CUDA device DataLoader's thread runs all the same and copies to other memory."""

import logging

import pytest
import torch

from mugv_ds.data.loader import loader
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.quarantine import Quarantined, Reading, Replacing
from mugv_ds.data.readers import Batch
from mugv_ds.data.sample import SampleError
from tests.data.test_loader import EXPECTED, PLAN, WORKERS, DieAt, FailAt, first_pick, plain, read
from tests.engine.test_feed import samples
from tests.helpers.dataset import write_config, write_dataset


@pytest.fixture(autouse=True)
def pinned(monkeypatch):
    """The tensors that were pinned, where the device is a make-believe; all that is left out is the pinning itself."""
    tensors = []
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensors.append(tensor) or tensor.clone())
    return tensors


@pytest.mark.parametrize("workers", WORKERS)
def test_resuming_is_going_on(workers):
    assert plain(read(5, 12, workers=workers, pin=True)) == EXPECTED[5:]


def test_an_error_keeps_its_class_and_message():
    bad = PLAN.step(2).refs[1].item
    with pytest.raises(SampleError, match=rf"data/x\.pt: row {bad} is bad"):
        list(read(0, 4, workers=2, make=FailAt(bad), pin=True))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # how DataLoader's thread ends
def test_killed_workers_are_replaced(tmp_path, caplog, impatient):
    killers = (first_pick(3), first_pick(8))
    with caplog.at_level(logging.WARNING):
        assert plain(read(0, 12, workers=2, make=DieAt(killers, tmp_path, once=True), pin=True)) == EXPECTED
    assert len(caplog.records) == 2


@pytest.fixture
def readings(tmp_path):
    """What a worker makes of samples of which one cannot be read, pinned; and the same without a worker."""
    write_config(tmp_path, write_dataset(tmp_path, [(2, 4, 6)] * 4))
    make = Replacing(samples(tmp_path, caption_drop=0.0))
    (tmp_path / "latents/train-2.pt").write_bytes(b"")  # after the index was built, which would leave it out
    refs = [SampleRef(0, row, 0) for row in range(4)]
    steps = loader(
        lambda _: [refs[:2], refs[2:]],
        start_step=0,
        stop_step=1,
        make=make,
        name=str,
        num_workers=1,
        pin=True,
    )
    (made,) = steps
    return made, [make(refs[:2]), make(refs[2:])]


def test_what_training_reads_keeps_its_types_and_values(readings, pinned):
    made, expected = readings
    assert [len(reading.quarantined) for reading in made] in ([0, 1], [1, 0])
    for got, want in zip(made, expected, strict=True):
        assert type(got) is Reading and type(got.batch) is Batch
        assert all(torch.equal(one, other) for one, other in zip(got.batch, want.batch, strict=True))
        assert all(type(bad) is Quarantined for bad in got.quarantined)
        assert list(got.quarantined) == list(want.quarantined)
    assert torch.cuda.is_available() or len(pinned) == len(made), "one buffer of each micro-batch"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_in_pinned_memory(readings):
    made, expected = readings
    assert all(tensor.is_pinned() for reading in made for tensor in reading.batch)
    assert not any(tensor.is_pinned() for reading in expected for tensor in reading.batch)
