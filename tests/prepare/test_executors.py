"""Units run in processes: a process that dies harms its unit alone, and a run can be stopped at any time."""

import os
import signal
import threading
import time

import psutil
import pytest

from mugv_ds.config.errors import Stopped, TrainingError
from mugv_ds.prepare.executors import Crashed, Done, Local, Ray, Stop, refuse_crashed
from tests.helpers.units import on_device, work


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.long)])
def executor(request):
    if request.param == "local":
        return Local(2, Stop())
    pytest.importorskip("ray")
    return Ray("auto", Stop())


def outcomes(executor, names, folder):
    with executor:
        return {one.job[0]: one for one in executor.on_cpus(work, [(name, folder) for name in names])}


def test_a_process_that_dies_harms_its_unit_alone(executor, tmp_path):
    names = ["square 2", "die", "square 3", "die once 1", "segfault", *(f"square {n}" for n in range(4, 9))]
    found = outcomes(executor, names, tmp_path)
    assert {name for name, one in found.items() if isinstance(one, Crashed)} == {"die", "segfault"}
    assert {name: one.result for name, one in found.items() if isinstance(one, Done)} == {
        "die once 1": 1,
        **{f"square {n}": n**2 for n in range(2, 9)},
    }


def test_what_a_unit_raises_is_raised(executor, tmp_path):
    with pytest.raises(ValueError, match="raise"):
        outcomes(executor, ["square 1", "raise"], tmp_path)


def test_signals_are_named_and_all_others_are_done(tmp_path):
    crashed = outcomes(Local(2, Stop()), ["die", "segfault"], tmp_path).values()
    with pytest.raises(TrainingError, match=r"probe: 2 units .*SIGKILL.*") as caught:
        refuse_crashed("probe", sorted(crashed, key=lambda one: one.job[0]))
    assert "SIGSEGV" in str(caught.value)


def test_each_process_keeps_its_device(tmp_path):
    jobs = [(f"square {n}", tmp_path) for n in range(8)]
    with Local(2, Stop()) as executor:
        found = {one.result for one in executor.on_devices(on_device, jobs, ["cuda:0", "cuda:1"])}
        again = {one.result for one in executor.on_devices(on_device, jobs, ["cuda:0", "cuda:1"])}
    assert sorted(name.partition(" ")[0] for name in found) == ["cuda:0", "cuda:1"]
    assert found == again  # what is loaded in a process serves later steps


def test_a_run_that_is_asked_to_stop_ends_its_processes(tmp_path):
    stop = Stop()
    stop.listen()
    before = {child.pid for child in psutil.Process().children(recursive=True)}

    def ask():
        while not (tmp_path / "wait.tried").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=ask)
    thread.start()
    began = time.monotonic()
    try:
        with pytest.raises(Stopped):
            outcomes(Local(2, stop), ["wait", "square 1"], tmp_path)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    thread.join()
    assert time.monotonic() - began < 30
    working = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    assert all(b"wait" not in str(child.cmdline()).encode() and child.cpu_times().user < 5 for child in working)
    assert (tmp_path / "square 1.done").exists()
