"""A file that kills, stalls or fills its process harms its own call alone."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from mugv_ds.prepare import workers
from mugv_ds.prepare.workers import Failure, allow, run_isolated

LIMITS = {"wall_s": 20.0, "memory_gb": 2.0}


def table_of(values):
    return pa.table({"value": values, "pid": [os.getpid()] * len(values)})


def array_of(height, width):
    print("this does not disturb the answer")
    return np.arange(height * width, dtype=np.uint8).reshape(height, width)


def kill_self(number, unless):
    """Kills its process, unless the file is there."""
    if not Path(unless).exists():
        Path(unless).touch()
        os.kill(os.getpid(), number)
    return table_of([1])


def kill_always(number):
    os.kill(os.getpid(), number)


def fill_memory():
    return np.ones(3 << 30, np.uint8)


def wait(seconds, more=None):
    if more is not None:
        allow(more)
    time.sleep(seconds)
    return table_of([seconds])


def fail():
    raise KeyError("of no use")


def own_limits():
    targets = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return pa.table(
        {
            "memory": [resource.getrlimit(resource.RLIMIT_AS)[0]],
            "sockets": [sum("socket" in target for target in targets)],
            "torch": ["torch" in sys.modules],
        }
    )


@pytest.fixture(autouse=True)
def ended():
    yield
    workers.end_all()


def test_results_come_back_and_processes_are_used_again():
    first = run_isolated(table_of, {"values": [1, 2]}, **LIMITS)
    second = run_isolated(table_of, {"values": [3]}, **LIMITS)
    assert first["value"].to_pylist() == [1, 2]
    assert second["pid"][0] == first["pid"][0] != os.getpid()
    assert np.array_equal(run_isolated(array_of, {"height": 3, "width": 5}, **LIMITS), array_of(3, 5))


def test_a_crash_is_tried_again_and_then_named(tmp_path):
    once = run_isolated(kill_self, {"number": signal.SIGSEGV, "unless": str(tmp_path / "x")}, **LIMITS)
    assert once["value"].to_pylist() == [1]
    assert run_isolated(kill_always, {"number": signal.SIGSEGV}, **LIMITS) == Failure("crashed", "SIGSEGV")


def test_time_is_bounded_and_can_be_extended_by_progress():
    start = time.monotonic()
    assert run_isolated(wait, {"seconds": 60}, wall_s=1.0, memory_gb=2.0).kind == "timed_out"
    assert time.monotonic() - start < 10
    assert run_isolated(wait, {"seconds": 1.5, "more": 10}, wall_s=1.0, memory_gb=2.0)["value"].to_pylist() == [1.5]


def test_memory_is_bounded():
    failure = run_isolated(fill_memory, {}, **LIMITS)
    assert failure.kind == "raised" and "MemoryError" in failure.detail


def test_an_exception_is_told_and_not_tried_again():
    assert run_isolated(fail, {}, **LIMITS) == Failure("raised", "KeyError: 'of no use'")


def test_threads_have_processes_of_their_own_and_a_crash_harms_no_other():
    with ThreadPoolExecutor(2) as threads:
        bad = threads.submit(run_isolated, kill_always, {"number": signal.SIGABRT}, **LIMITS)
        good = threads.submit(run_isolated, wait, {"seconds": 1.0}, **LIMITS)
    assert bad.result() == Failure("crashed", "SIGABRT") and good.result()["value"].to_pylist() == [1.0]


def test_a_process_has_its_limits_and_no_sockets():
    found = run_isolated(own_limits, {}, **LIMITS).to_pylist()[0]
    assert found == {"memory": 2 << 30, "sockets": 0, "torch": False}


def test_it_ends_with_its_parent(tmp_path):
    script = textwrap.dedent(f"""
        import os, threading, time
        from tests.prepare.test_workers import pid_and_wait
        from mugv_ds.prepare.workers import run_isolated
        threading.Thread(target=run_isolated, args=[pid_and_wait, {{"path": {str(tmp_path / "pid")!r}}}],
                         kwargs={LIMITS!r}, daemon=True).start()
        while not os.path.exists({str(tmp_path / "pid")!r}):
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
    """)
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], timeout=60, check=False)
    child = int((tmp_path / "pid").read_text())
    for _ in range(100):
        if not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split(")")[1][:3]:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it outlived its parent")


def pid_and_wait(path):
    Path(f"{path}.part").write_text(str(os.getpid()))
    Path(f"{path}.part").rename(path)
    time.sleep(15)
    return table_of([0])
