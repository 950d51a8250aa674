"""Faults where a sample is spread over sequence ranks and stages, in bf16, as it is on GPUs."""

import signal
from functools import partial

import pytest

from tests.faults import inject
from tests.faults.conftest import configure, equal
from tests.faults.runs import run


@pytest.mark.long
def test_sequence_ranks_and_stages_skip_stop_and_resume_together(tmp_path, manifest, report):
    """A loss that is NaN on one rank of the last stage; the first stage never sees it."""
    sections = {"parallel": {"data": 1, "sequence": 2, "pipeline": 2}, "model": {"precision": "bf16"}}
    sections["data"] = {"micro_batch_size": 2}
    trouble = {"factors": {2: float("nan")}}
    done = run(configure(tmp_path / "one", manifest, **sections), 4, faults={3: partial(inject.scaled_loss, **trouble)})
    assert done.codes == [0] * 4, done.output
    assert [(line["step"], line["data_step"]) for line in done.incidents("skip")] == [(3, 2)]

    config = configure(tmp_path / "two", manifest, **sections)
    stop = partial(inject.signal_in_step, step=5, number=signal.SIGTERM)
    faults = {0: stop, 3: partial(inject.scaled_loss, **trouble)}
    assert run(config, 4, faults=faults).codes == [75] * 4
    resumed = run(config, 4)
    assert resumed.codes == [0] * 4 and equal(resumed, done), resumed.output
    report(17, "resumed with sequence 2 × pipeline 2, bf16", "bitwise as if uninterrupted", resumed.restarted_in())
