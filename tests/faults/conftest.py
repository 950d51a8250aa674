"""The data set and the reference run of a session, and the report of what the faults came to."""

from pathlib import Path

import pytest

from tests.faults.runs import SHAPES, STEPS, Done, run
from tests.helpers.dataset import write_config, write_dataset

TWO = {"data": 2}
_ROWS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--reliability-report", type=Path, help="write what the faults came to, as a table, to this file")


def pytest_configure(config):
    config.stash[_ROWS] = []


@pytest.fixture
def report(request):
    """Notes (number of the fault, fault, outcome, seconds to recover or to end)."""
    return lambda *row: request.config.stash[_ROWS].append(row)


def pytest_sessionfinish(session):
    path = session.config.getoption("--reliability-report", default=None)
    if path is None:
        return
    rows = sorted(session.config.stash[_ROWS])
    lines = ["| | fault | outcome | seconds |", "|---|---|---|---|"]
    lines += [f"| {number} | {fault} | {outcome} | {seconds:.1f} |" for number, fault, outcome, seconds in rows]
    head, mark, _ = path.read_text().partition("<!-- table -->\n")
    assert mark, f"{path}: has no line <!-- table --> to write behind"
    path.write_text(head + mark + "\n" + "\n".join(lines) + "\n")


@pytest.fixture(scope="session")
def manifest(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"), SHAPES)


def configure(folder: Path, manifest: Path, parallel: dict = TWO, **sections: dict) -> Path:
    """The config of a run of ten steps, saved every four."""
    defaults = {
        "schedule": {"steps": STEPS},
        "checkpoint": {"save_every": 4},
        "logging": {"every": 1},
    }
    for name, section in sections.items():
        defaults[name] = defaults.get(name, {}) | section
    return write_config(folder, manifest, parallel=parallel, **defaults)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, manifest) -> Done:
    """Ten steps on two data ranks that nothing happened to."""
    done = run(configure(tmp_path_factory.mktemp("reference"), manifest), 2)
    assert done.codes == [0, 0], done.output
    assert len(done.losses()) == STEPS and not done.incidents()
    return done


def equal(done: Done, reference: Done) -> bool:
    """Whether both took the same steps with the same noise and losses, and hold the same in the end, bit for bit."""
    noise = [
        [[(step, seen.noise) for step, seen in sorted(of.steps(rank).items())] for rank in range(len(of.codes))]
        for of in (done, reference)
    ]
    return noise[0] == noise[1] and done.losses() == reference.losses() and done.weights() == reference.weights()
