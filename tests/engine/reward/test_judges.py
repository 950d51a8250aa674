"""Reward functions that answer, fail, hang, lie and are killed: each is asked as the config says, and named."""

import http.server
import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from mugv_ds.config.post_training_schema import RewardFunctionSection
from mugv_ds.engine.reward.judges import Cancelled, Failure, RewardError, ask, check_answer, make_judge

VIDEOS = [{"id": f"round-000000/rollout-{i:05d}", "video": f"/tmp/{i}.mp4", "prompt": "p"} for i in range(2)]
IDS = [video["id"] for video in VIDEOS]
GOOD = {"rewards": {name: {"a": float(i)} for i, name in enumerate(IDS)}}
EXPECTED = GOOD["rewards"]
ANSWER = (
    "import json, sys; videos = json.load(sys.stdin)['videos']; "
    "print(json.dumps({'rewards': {v['id']: {'a': float(v['id'][-1])} for v in videos}}))"
)


def section(**given) -> RewardFunctionSection:
    if "command" in given:
        given["command"] = tuple(map(str, given["command"]))
    return RewardFunctionSection(**{"name": "judge", "weights": {"a": 1.0}, "retries": 0, **given})


def asked(config: RewardFunctionSection, log: Path, said: list[str] | None = None, cancelled=None):
    judge = make_judge(config, log)
    said = [] if said is None else said
    return ask(config, judge, VIDEOS, cancelled or threading.Event(), said.append)


def python(code: str) -> tuple[str, ...]:
    return "python", "-c", code


def test_a_command_answers(tmp_path):
    assert asked(section(command=python(ANSWER)), tmp_path / "log") == EXPECTED


@pytest.mark.parametrize(
    ("code", "named"),
    {
        "garbage": ("print('hello')", "answered no JSON: b'hello"),
        "nothing": ("pass", "answered no JSON"),
        "a list": ("print('[1]')", r"must answer a JSON object with the key rewards, not \[1\]"),
        "NaN": (
            ANSWER.replace("float(v['id'][-1])", "float('nan')"),
            "rollout-00000: a must be a finite number, not nan",
        ),
        "a string": (ANSWER.replace("float(v['id'][-1])", "'1'"), "a must be a finite number, not '1'"),
        "true": (ANSWER.replace("float(v['id'][-1])", "True"), "a must be a finite number, not True"),
        "another name": (ANSWER.replace("{'a'", "{'b'"), "must have the numbers a, not {'b'"),
        "an id too few": (ANSWER.replace("for v in videos", "for v in videos[1:]"), "rollout-00000 is only in one"),
        "an id too many": (ANSWER.replace("['videos']", "['videos'] + [{'id': 'x0'}]"), "x0 is only in one"),
        "a status": ("import sys; print('no model', file=sys.stderr); sys.exit(3)", "ended with status 3; .*no model"),
        "a signal": ("import os; os.kill(os.getpid(), 9)", "was killed by signal 9"),
        "too much": ("import sys\nwhile True: sys.stdout.write('x' * 65536)", "answered more than 16,777,216 bytes"),
    }.values(),
)
def test_a_bad_answer_is_named(tmp_path, code, named):
    with pytest.raises(RewardError, match=rf"reward\.functions\.judge: .*{named}.*the same command goes on"):
        asked(section(command=python(code)), tmp_path / "log")


def test_a_program_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RewardError, match="/no/such/judge cannot be started: No such file"):
        asked(section(command=["/no/such/judge"]), tmp_path / "log")


def test_a_command_that_hangs_is_ended_with_what_it_has_started(tmp_path):
    code = "import subprocess, time; child = subprocess.Popen(['sleep', '60']); "
    code += f"open({str(tmp_path / 'child')!r}, 'w').write(str(child.pid)); time.sleep(60)"
    begin = time.monotonic()
    with pytest.raises(RewardError, match="no answer within 2 s"):
        asked(section(command=python(code), timeout_s=2.0), tmp_path / "log")
    assert time.monotonic() - begin < 10
    gone = time.monotonic() + 5
    pid = int((tmp_path / "child").read_text())
    while time.monotonic() < gone and Path(f"/proc/{pid}/stat").exists():
        if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        assert not Path(f"/proc/{pid}").exists(), "the child outlived its command"


def test_it_is_asked_again_and_each_failure_is_said(tmp_path):
    said: list[str] = []
    calls = f"calls = pathlib.Path({str(tmp_path / 'calls')!r}); made = calls.read_text() if calls.exists() else ''"
    code = f"import pathlib; {calls}; calls.write_text(made + 'x'); len(made) < 2 and exit(1); {ANSWER}"
    assert asked(section(command=python(code), retries=2), tmp_path / "log", said) == EXPECTED
    assert ["asked again (1 of 2)" in said[0], "asked again (2 of 2)" in said[1], len(said)] == [True, True, 2]


def test_a_run_that_stops_does_not_wait(tmp_path):
    cancelled = threading.Event()
    threading.Timer(0.5, cancelled.set).start()
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        asked(section(command=python("import time; time.sleep(60)"), timeout_s=60), tmp_path / "log", None, cancelled)
    assert time.monotonic() - begin < 10


def test_a_command_does_not_take_itself_for_a_rank(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    code = f"import os; assert 'RANK' not in os.environ and 'WORLD_SIZE' not in os.environ; {ANSWER}"
    assert asked(section(command=python(code)), tmp_path / "log") == EXPECTED


@pytest.fixture
def endpoint():
    """Posts to /good are answered; /error has the status 500, /hang takes its time, /lie answers something else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            videos = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["videos"]
            if self.path == "/hang":
                time.sleep(3)
            body = json.dumps({"rewards": {v["id"]: {"a": float(v["id"][-1])} for v in videos}})
            self.send_response(500 if self.path == "/error" else 200)
            self.end_headers()
            self.wfile.write(b"<html>" if self.path == "/lie" else body.encode())

        def log_message(self, *_) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_an_endpoint_answers_or_is_named(endpoint, tmp_path):
    assert asked(section(url=f"{endpoint}/good"), tmp_path / "log") == EXPECTED
    for path, named in (("error", "status 500"), ("lie", "answered no JSON"), ("hang", "timed out")):
        with pytest.raises(RewardError, match=named):
            asked(section(url=f"{endpoint}/{path}", timeout_s=1.0), tmp_path / "log")
    with pytest.raises(RewardError, match="refused"):
        asked(section(url="http://127.0.0.1:9/"), tmp_path / "log")


MODULE = """
import os
print("what a module prints is no answer")
def judge(videos):
    print("nor this")
    open(os.environ["SEEN"], "a").write(f"{os.getpid()}\\n")
    return {video["id"]: {"a": float(video["id"][-1])} for video in videos}
def broken(videos):
    raise ValueError("no such model")
"""


def test_an_entry_point_runs_in_a_process_of_its_own_unless_told_otherwise(tmp_path, monkeypatch):
    (tmp_path / "my_reward.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert asked(section(entry_point="my_reward:judge"), tmp_path / "log") == EXPECTED
    assert asked(section(entry_point="my_reward:judge", in_process=True), tmp_path / "log") == EXPECTED
    other, own = map(int, (tmp_path / "seen").read_text().split())
    assert own == os.getpid() != other
    for in_process in (False, True):
        with pytest.raises(RewardError, match="no such model"):
            asked(section(entry_point="my_reward:broken", in_process=in_process), tmp_path / "log")
    with pytest.raises(RewardError, match=r"judge\.entry_point: No module named 'my_rewards'"):
        asked(section(entry_point="my_rewards:judge", in_process=True), tmp_path / "log")


def test_integers_are_numbers_too():
    assert check_answer({"rewards": {"x": {"a": 1}}}, ["x"], ["a"]) == {"x": {"a": 1.0}}
    with pytest.raises(Failure):
        check_answer({"rewards": {"x": {"a": float("inf")}}}, ["x"], ["a"])
