"""Goodput: every second of a run is of one cause, over steps that compile, stall, are skipped and are taken again."""

import time

import pytest

from mugv_ds.cli import goodput as command
from mugv_ds.config.errors import InputError
from mugv_ds.engine.goodput import NAME, Account, Timeline, read_account


class Clock:
    """Lines of a run whose process began at 1000, and what they say was spent since the line before."""

    def __init__(self):
        self.at, self.lines = 1000.0, []

    def line(self, event, step, **seconds):
        facts = {name: seconds.pop(name) for name in ("kind", "applied", "began") if name in seconds}
        self.at += sum(seconds.values())
        self.lines.append({"event": event, "at": self.at, "step": step, **facts, "seconds": seconds})

    def start(self, step, down=0.0, **seconds):
        self.at += down
        self.line("start", step, began=self.at, **seconds)

    def step(self, step, seconds, kind="a", applied=True, **more):
        self.line("step", step, kind=kind, applied=applied, step_=seconds, **more)
        self.lines[-1]["seconds"]["step"] = self.lines[-1]["seconds"].pop("step_")

    def account(self):
        account = Account()
        for line in self.lines:
            account.add(line)
        return account


def test_every_second_has_one_cause():
    clock = Clock()
    clock.start(0, start=10.0)
    clock.step(1, 5.0)  # compiles: 4 more than the others of its kind
    clock.step(2, 1.0, data=0.25)
    clock.step(3, 1.0)
    clock.step(4, 30.0, kind="b")  # the only one of its kind
    clock.step(5, 2.0)  # slow, but no stall
    clock.step(6, 7.0)  # a stall: 6 more
    clock.step(7, 1.0, applied=False)
    clock.step(8, 1.0, save=0.5)  # is taken again
    clock.start(7, down=20.0, start=3.0, restore=2.0)
    clock.step(8, 3.0)  # compiles again: 2 more
    clock.step(9, 1.0)
    clock.line("back", 8, restore=4.0)
    clock.step(9, 1.0)
    clock.line("end", 9, save=0.125)
    account = clock.account()
    totals = account.totals()
    assert totals == {
        "useful": 1 + 1 + 1 + 30 + 2 + 1 + 1 + 1, "compile": 4 + 2, "stalled": 6, "skipped": 1, "replayed": 1 + 1,
        "start": 13, "data": 0.25, "save": 0.625, "down": 20, "restore": 6,
    }  # fmt: skip
    assert sum(totals.values()) == account.wall == clock.at - 1000
    assert (account.steps, account.starts) == (9, 2)


def test_adding_up_a_long_run_takes_a_step_no_time():
    """It is done at every record."""
    account = Account()
    account.add({"event": "start", "at": 1000, "step": 0, "began": 1000, "seconds": {}})
    for step in range(1, 50_001):
        facts = {"kind": "a", "applied": True, "seconds": {"step": 1}}
        account.add({"event": "step", "at": 1000 + step, "step": step, **facts})
    begin = time.process_time()
    assert account.totals()["useful"] == 50_000
    assert time.process_time() - begin < 0.01, "a pass over the steps in Python takes longer"


def test_a_process_is_always_in_one_phase(tmp_path):
    began, spent = time.time(), dict.fromkeys(("validation", "data", "step"), 0.0)

    def rest(phase, seconds):
        begin = time.perf_counter()
        time.sleep(seconds)  # or longer, on a busy machine
        spent[phase] += time.perf_counter() - begin

    timeline = Timeline(tmp_path, rank=0)
    timeline.started(0, restored=0.01)
    for step in range(1, 4):
        with timeline.phase("validation"):
            rest("validation", 0.02)
            with timeline.phase("data"):
                rest("data", 0.03)
        with timeline.phase("step"):
            rest("step", 0.01)
        timeline.step(step, "a", True)
    timeline.ended()
    account = read_account(tmp_path / NAME)
    totals = account.totals()
    assert sum(totals.values()) == pytest.approx(account.wall, abs=0.01)
    assert totals["start"] + totals["restore"] == pytest.approx(began - timeline._began, abs=0.05)
    for phase in ("validation", "data"):  # what is inside is not of the outer
        assert totals[phase] == pytest.approx(spent[phase], abs=0.03)
    shares = timeline.scalars()
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert Timeline(tmp_path, rank=1).scalars() == {}


def test_what_a_killed_process_left_is_gone_on_with(tmp_path):
    first = Timeline(tmp_path, rank=0)
    first.started(0)
    with first.phase("step"):
        pass
    first.step(1, "a", True)
    with (tmp_path / NAME).open("a") as file:
        file.write('{"event": "st')
    again = Timeline(tmp_path, rank=0)
    again.started(1)
    assert read_account(tmp_path / NAME).starts == 2
    fresh = Timeline(tmp_path, rank=0)
    fresh.started(0)
    assert read_account(tmp_path / NAME).starts == 1, "a run that starts afresh has an account of its own"


@pytest.mark.parametrize(
    "line",
    [
        "{}",
        "[]",
        "3",
        '{"event": "step", "at": "x", "step": 1, "seconds": {}}',
        "{" * 5000,
        '{"event": "start", "at": 1}',
    ],
)
def test_a_file_that_is_no_account_is_refused(tmp_path, line, capsys):
    (tmp_path / NAME).write_text(line + "\n")
    with pytest.raises(InputError, match=r"goodput\.jsonl: line 1 is none of a run's"):
        read_account(tmp_path / NAME)
    assert command.main([str(tmp_path)]) == 2
    timeline = Timeline(tmp_path, rank=0)
    timeline.started(5)
    assert "warning: " in capsys.readouterr().err, "a run goes on without"


def test_the_command_names_a_folder_without_one(tmp_path, capsys):
    assert command.main([str(tmp_path)]) == 2
    assert "no goodput.jsonl" in capsys.readouterr().err
