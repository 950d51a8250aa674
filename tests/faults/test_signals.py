"""Being asked to stop."""

from functools import partial
from signal import SIGINT, SIGTERM, SIGUSR1

import pytest

from tests.faults.conftest import configure, equal
from tests.faults.inject import signal_at_mark, signal_in_step
from tests.faults.runs import run
from tests.helpers.dataset import write_dataset


def test_signals_save_the_same_step_and_lose_nothing(tmp_path, manifest, reference, report):
    """Each in the middle of accumulation, on one rank; resumed with and without loader workers."""
    config = configure(tmp_path, manifest)
    cases = [
        (12, "SIGTERM to one rank, and again while it saves", SIGTERM, 1, 2, 0),
        (14, "SIGINT to one rank", SIGINT, 0, 5, 2),
        (16, "SIGUSR1 in the middle of accumulation", SIGUSR1, 1, 7, 0),
    ]
    for number, name, signal, rank, step, workers in cases:
        fault = {rank: partial(signal_in_step, step=step, number=signal, again=signal == SIGTERM)}
        done = run(config, 2, f"data.num_workers={workers}", faults=fault)
        assert done.codes == [75, 75], done.output
        assert [sorted(done.steps(rank))[-1] for rank in (0, 1)] == [step, step]
        (*_, stop) = done.incidents("stop")
        assert (stop["step"], stop["rank"], stop["signal"]) == (step + 1, rank, signal.name)
        report(number, name, "all ranks save the same step, status 75, goes on bitwise", done.seconds)
    done = run(config, 2)
    assert done.codes == [0, 0] and "going on after step 8" in done.output
    assert equal(done, reference)
    report(15, "resumed in the middle of an epoch, 0 and 2 workers", "bitwise as if uninterrupted", done.restarted_in())
    first, second = (done.steps(rank) for rank in (0, 1))
    assert all(first[step].noise != second[step].noise for step in first)
    report(19, "noise of the data ranks after resuming", "differs between ranks, as uninterrupted", done.restarted_in())


@pytest.mark.parametrize("work", ["validation", pytest.param("previews", marks=pytest.mark.long)])
def test_validations_and_previews_are_left(tmp_path, manifest, reference, report, work):
    """At the second mark; what was trained is saved, and the run goes on and makes them anew."""
    held_out = write_dataset(tmp_path / "held_out", [(2, 4, 6)] * 40, "val")
    sections = {
        "validation": {"data": {"val_manifest": str(held_out)}, "logging": {"eval_every": 5}},
        "previews": {
            "preview": {
                "every": 5,
                "manifest": str(held_out),
                "count": 2,
                "steps": 4,
                "dir": str(tmp_path / "previews"),
            }
        },
    }[work]
    config = configure(tmp_path / "run", manifest, **sections)
    done = run(config, 2, faults={1: partial(signal_at_mark, step=5, mark=2)})
    assert done.codes == [75, 75], done.output
    (stop,) = done.incidents("stop")
    assert (stop["step"], stop["rank"], stop["signal"]) == (5, 1, "SIGUSR1")
    made = {"validation": "step 5: validation loss", "previews": "step-000005"}[work]
    assert made not in done.output and not (tmp_path / "previews/step-000005").exists()
    again = run(config, 2)
    assert again.codes == [0, 0] and "going on after step 5" in again.output and equal(again, reference)
    assert made in again.output if work == "validation" else (tmp_path / "previews/step-000005").exists()
    report(37, f"SIGUSR1 in {work}", "left between two parts, saved; status 75; made anew", done.seconds)
