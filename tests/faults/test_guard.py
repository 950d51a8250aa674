"""What the guard does about losses, ranks and samples that go wrong."""

import os
import shutil
import signal
import socket
import time
from functools import partial

import pytest
import torch

from tests.faults import inject
from tests.faults.conftest import configure, equal
from tests.faults.runs import SHAPES, STEPS, Run, run
from tests.helpers.dataset import write_dataset

GUARD = {"max_skips": 2, "spike_factor": 5.0, "spike_window": 4, "max_rollbacks": 2}
TROUBLE = {2: float("nan"), 6: float("inf"), 7: float("nan"), 13: 100.0}  # by data step


def test_bad_losses_are_skipped_then_gone_back_from(tmp_path, manifest, report):
    """One NaN, two in a row, a spike; then the same run, stopped after it went back, must not differ."""
    fault = partial(inject.scaled_loss, factors=TROUBLE)
    sections = {"guard": GUARD, "schedule": {"steps": 12}, "checkpoint": {"save_every": 3}}
    done = run(configure(tmp_path / "one", manifest, **sections), 2, faults={1: fault})
    assert done.codes == [0, 0], done.output
    skips = [(line["step"], line["data_step"], len(line["samples"])) for line in done.incidents("skip")]
    assert skips == [(3, 2, 4), (7, 6, 4), (8, 7, 4)]
    assert all(0 <= t <= 1000 for line in done.incidents("skip") for t in line["timesteps"])
    back = [(line["step"], line["to"], line["jumped"]) for line in done.incidents("rollback")]
    # Data steps 6 and 7 lead from step 6 to 8, so step 6 is the last good one; from there 8 … are played. The spike
    # at data step 13 is the step to 12, and 9 was saved last before it.
    assert back == [(8, 6, [6, 8]), (12, 9, [11, 14])]
    assert [position for position, _ in done.losses()] == [0, 1, 2, 3, 4, 5, 8, 9, 10, 14, 15, 16]
    events = [done.steps()[step].at for step in (5, 6)]
    report(
        21, "NaN gradient; twice in a row", "all ranks skip; go back, window not played again", events[1] - events[0]
    )
    events = [done.steps()[step].at for step in (8, 9)]
    report(22, "loss × 100 on one rank", "goes back, window not played again", events[1] - events[0])

    config = configure(tmp_path / "two", manifest, **sections)
    stop = partial(inject.troubled_and_stopped, factors=TROUBLE, step=10)
    assert run(config, 2, faults={1: stop}).codes == [75, 75]  # saved at 11, which is no step to go back to
    resumed = run(config, 2, faults={1: fault})
    assert resumed.codes == [0, 0] and equal(resumed, done), resumed.output


def test_going_back_too_often_ends_the_run(tmp_path, manifest):
    fault = partial(inject.scaled_loss, factors=dict.fromkeys(range(100), float("nan")))
    config = configure(tmp_path, manifest, guard={"max_skips": 2, "max_rollbacks": 0}, checkpoint={"save_every": 1})
    done = run(config, 2, faults={0: fault})
    assert done.codes == [1, 1]
    (error,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert "2 steps in a row without a finite loss and gradient" in error and "went back 0 times" in error


def test_nan_samples_are_replaced_the_same_way_after_resuming(tmp_path, reference, report):
    manifest = write_dataset(tmp_path / "data", SHAPES)
    for row in (1, 4):
        latent = tmp_path / f"data/latents/train-{row}.pt"
        torch.save(torch.full_like(torch.load(latent, weights_only=True), torch.nan), latent)
    guard = {"max_bad_share": 1.0}
    done = run(configure(tmp_path / "one", manifest, guard=guard), 2)
    assert done.codes == [0, 0], done.output
    found = done.incidents("quarantine")
    assert {line["sample_id"] for line in found} == {"train-1", "train-4"}
    assert all("NaN" in line["why"] and line["sample_id"] + ".pt" in line["why"] for line in found)
    assert not {line["replaced_by"] for line in found} & {"train-1", "train-4"}
    assert [position for position, _ in done.losses()] == list(range(STEPS))

    config = configure(tmp_path / "two", manifest, guard=guard)
    stop = partial(inject.signal_in_step, step=4, number=signal.SIGTERM)
    assert run(config, 2, faults={1: stop}).codes == [75, 75]
    resumed = run(config, 2)
    assert resumed.codes == [0, 0] and equal(resumed, done), resumed.output
    key = ("step", "sample_id", "visit", "replaced_by")
    again = {tuple(line[name] for name in key) for line in resumed.incidents("quarantine")}
    assert again == {tuple(line[name] for name in key) for line in found}
    report(20, "NaN latents", "set aside, replaced; the same after resuming, bitwise", resumed.restarted_in())

    done = run(configure(tmp_path / "three", manifest, guard={"bad_share_after": 8}), 2)
    assert done.codes == [1, 1] and "more than guard.max_bad_share = 0.01" in done.output


@pytest.mark.parametrize(
    "where",
    [
        "weights to start from",
        "checkpoint",
        *(pytest.param(w, marks=pytest.mark.long) for w in ("latent", "text features")),
    ],
)
def test_a_pickle_that_runs_code_ends_the_run_and_does_not_run(tmp_path, report, where):
    manifest = write_dataset(tmp_path / "data", SHAPES)
    sentinel, weights = tmp_path / "sentinel", tmp_path / "dit.pt"
    file = {
        "latent": tmp_path / "data/latents/train-2.pt",
        "text features": tmp_path / "data/text_features/train-2_text.pt",
        "weights to start from": weights,
        "checkpoint": tmp_path / "run/checkpoints/step-00000001/rank-0.weight.safetensors",
    }[where]

    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(sentinel),)

    config = configure(tmp_path / "run", manifest)
    assert run(config, 2, "schedule.steps=1").codes == [0, 0]  # the index is built while the files are good
    torch.save({"y": Payload()}, file)
    if where == "checkpoint":
        shutil.rmtree(file.parents[1] / "step-00000000")  # or the run would go back to it
    others = () if file != weights else (f"checkpoint.init_from={weights}", f"checkpoint.dir={tmp_path / 'new'}")
    done = run(config, 2, *others)
    assert done.codes == [2, 2] and not sentinel.exists()
    assert "error:" in done.output and str(file) in done.output and "Traceback" not in done.output
    report(32, f"a pickle payload: {where}", "not executed, named; all ranks end", done.seconds)


@pytest.mark.parametrize(
    ("frozen", "act", "told"),
    [
        (1, inject.freeze, "held up by rank 1 (host {host}, pid {pid}), silent for"),
        pytest.param(
            0, inject.freeze, "held up by rank 0 (host {host}, pid {pid}), silent for", marks=pytest.mark.long
        ),
        (1, inject.doze, "held up by rank 1 (host {host}, pid {pid}), at "),
    ],
    ids=["stopped", "stopped host of the store", "busy"],
)
def test_a_rank_that_hangs_is_named(tmp_path, manifest, report, frozen, act, told):
    fault = partial(inject.at_step, step=2, act=act)
    hung = Run(configure(tmp_path, manifest), 2, "guard.timeout_s=4.0", faults={frozen: fault})
    pid = hung.ranks[frozen].pid
    hung.wait_for(lambda: hung.taken(frozen) >= 3)
    begin = time.time()
    dozing = act is inject.doze
    done = hung.finish(stopped=() if dozing else (frozen,))
    assert told.format(host=socket.gethostname(), pid=pid) in done.output
    assert [code for rank, code in enumerate(done.codes) if dozing or rank != frozen] == [75] * (1 + dozing)
    if act is inject.freeze and frozen:
        report(24, "SIGSTOP of a rank, time-out 4 s", "the rank is named, status 75", time.time() - begin)


def test_a_rank_that_sees_the_hang_later_ends_alike(tmp_path, manifest):
    """The launcher passes on the status that it sees first, and the other's end breaks this one's connection."""
    faults = {0: inject.see_late, 1: partial(inject.at_step, step=2, act=inject.doze)}
    done = run(configure(tmp_path, manifest), 2, "guard.timeout_s=4.0", faults=faults)
    assert done.codes == [75, 75], done.output
    assert done.output.count("held up by rank 1 ") == 2


@pytest.mark.parametrize(
    "parallel",
    [*(pytest.param({axis: 2}, marks=pytest.mark.long) for axis in ("sequence", "pipeline")), {"data": 2}],
    ids=lambda axis: next(iter(axis)),
)
def test_a_rank_that_stops_inside_a_step_is_named(tmp_path, manifest, report, parallel):
    """The others wait for it in a group of their axis, which must not give up before the watchdog."""
    fault = partial(inject.freeze_in_step, step=2, frozen=1)
    hung = Run(configure(tmp_path, manifest, parallel), 2, "guard.timeout_s=6.0", faults={0: fault, 1: fault})
    pid = hung.ranks[1].pid
    hung.wait_for(lambda: hung.taken(0) >= 2)
    begin = time.time()
    done = hung.finish(stopped=(1,))
    assert done.codes[0] == 75, done.output
    assert f"held up by rank 1 (host {socket.gethostname()}, pid {pid}), silent for" in done.output
    (axis,) = parallel
    report(24, f"SIGSTOP inside a step, {axis}, time-out 6 s", "the rank is named, status 75", time.time() - begin)


def test_a_killed_loader_worker_is_replaced(tmp_path, manifest, reference, report):
    fault = partial(inject.at_step, step=3, act=inject.kill_worker)
    config = configure(tmp_path, manifest, data={"num_workers": 1})
    done = run(config, 2, faults={0: fault})
    assert done.codes == [0, 0] and equal(done, reference), done.output
    (line,) = [line for line in done.output.splitlines() if "a loader worker was killed" in line]
    assert "samples ['train-" in line and "read again, 1 of 1" in line
    pause = max(b.at - a.at for a, b in zip(list(done.steps().values()), list(done.steps().values())[1:], strict=False))
    report(25, "a loader worker killed", "its samples named and read again; bitwise", pause)


@pytest.mark.long
def test_a_straggler_and_a_replica_that_differs_are_named(tmp_path, manifest, report):
    config = configure(tmp_path, manifest, guard={"straggler_window": 3, "check_replicas_every": 1})
    fault = partial(inject.slow_and_perturbed, seconds=0.05, step=6)
    done = run(config, 2, faults={1: fault})
    assert {(line["step"], line["rank"]) for line in done.incidents("straggler")} == {(3, 1), (6, 1)}
    assert all(line["times_the_median"] > 2 for line in done.incidents("straggler"))
    steps = done.steps(1)
    report(26, "a rank that computes more slowly", "a line names it", steps[2].at - steps[0].at)
    assert done.codes == [1, 1] and sorted(steps) == list(range(7))
    assert "error: step 7: the weights of rank 0, 1 differ from those of their replicas" in done.output
    report(
        28,
        "one bit of one replica's weights",
        "found at the next check, the ranks named",
        done.began + done.seconds - steps[6].at,
    )


def test_all_ranks_end_with_the_status_of_the_failure(tmp_path, manifest, report):
    """Also the one that only hears of it: the launcher may see it first."""
    config = configure(tmp_path, manifest)
    done = run(config, 2, f"data.manifest={tmp_path}/nowhere.csv")
    assert done.codes == [2, 2] and done.output.count("error:") == 1 and "nowhere.csv" in done.output
    report(39, "a missing manifest", "named; status 2 on all ranks", done.seconds)


def test_configs_must_be_the_same(tmp_path, manifest, report):
    done = run(configure(tmp_path, manifest), 2, only={1: ["optimizer.lr=0.5", "data.seed=1"]})
    assert done.codes == [2, 2]
    (error,) = [line for line in done.output.splitlines() if line.startswith("error:")]
    assert "data.seed = 1 on rank 1, 6309 on rank 0; optimizer.lr = 0.5 on rank 1, 0.001 on rank 0" in error
    report(27, "configs that differ between ranks", "the keys are named, nothing starts", done.seconds)
