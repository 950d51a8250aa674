"""Trackers: the same scalars in each, by its real library in offline mode; and none holds a run up."""

import json
import math
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mugv_ds.config.errors import ConfigError
from mugv_ds.data.video import write_mp4
from mugv_ds.engine import trackers
from mugv_ds.engine.trackers import Background, check_trackers, open_trackers, run_facts, run_id

GIVEN = {10: {"train/loss": 1.5, "speed/mfu": 0.25}, 20: {"train/loss": 1.25, "train/loss_t0-250": 2.0}}
FACTS = {"config": {"optimizer": {"lr": 0.5}}, "commit": "c0ffee", "hosts": ["here"], "card": "cpu"}
Read = dict[int, dict[str, float]]


def read_tensorboard(folder: Path) -> tuple[Read, int, str]:
    """The scalars by step, the number of videos, and what was noted of the run."""
    events = EventAccumulator(str(folder))
    events.Reload()
    found: Read = {}
    for name in events.Tags()["scalars"]:
        for event in events.Scalars(name):
            found.setdefault(event.step, {})[name] = event.value
    (noted,) = events.Tensors("run/text_summary")
    return found, len(events.Tags()["images"]), noted.tensor_proto.string_val[0].decode()


def leveldb_log(content: bytes) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, after the 7 bytes that wandb begins it with."""
    place, block, parts = 7, 32768, b""
    while place < len(content):
        if block - place % block < 7:  # too little for a header: the rest of a block is padding
            place += block - place % block
            continue
        length, kind = struct.unpack("<HB", content[place + 4 : place + 7])
        parts += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its parts
            yield parts
            parts = b""


def read_wandb(folder: Path) -> tuple[Read, int, str]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: Read = {}
    noted = ""
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline, records = time.monotonic() + 30, []
    while not any(record.WhichOneof("record_type") == "exit" for record in records):  # its service writes on by itself
        assert time.monotonic() < deadline
        time.sleep(0.05)
        records = [Record.FromString(data) for data in leveldb_log(file.read_bytes())]
    for record in records:
        noted += str(record.run.config) + str(record.config)
        row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for name, value in row.items():
            if not name.startswith(("_", "preview/")) and name != "step":
                found.setdefault(row["step"], {})[name] = value
    return (
        found,
        len(list(folder.glob("wandb/offline-run-*/files/media/videos/**/*.mp4"))),
        noted.replace("\\", "").replace('":', '": '),
    )


def read_trackio(folder: Path) -> tuple[Read, int, str]:
    from trackio.sqlite_storage import SQLiteStorage

    found: Read = {}
    videos = 0
    (name,) = SQLiteStorage.get_runs(trackers.PROJECT)
    for row in SQLiteStorage.get_logs(trackers.PROJECT, name):
        for key, value in row.items():
            videos += isinstance(value, dict) and value.get("_type") == "trackio.video"
            if key not in ("step", "timestamp") and isinstance(value, float | int):
                found.setdefault(row["step"], {})[key] = value
    return found, videos, str(SQLiteStorage.get_run_config(trackers.PROJECT, name)).replace("'", '"')


def read_mlflow(folder: Path) -> tuple[Read, int, str]:
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").absolute().as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name(trackers.PROJECT).experiment_id])
    found: Read = {}
    for name in run.data.metrics:
        for point in client.get_metric_history(run.info.run_id, name):
            found.setdefault(point.step, {})[name] = point.value
    noted = json.dumps({name.rsplit(".", 1)[-1]: value for name, value in run.data.params.items()})
    return found, len(client.list_artifacts(run.info.run_id, "preview/step-000020")), noted.replace('"0.5"', "0.5")


READERS: dict[str, Callable[[Path], tuple[Read, int, str]]] = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "trackio": read_trackio,
    "mlflow": read_mlflow,
}


@pytest.mark.parametrize(
    "name", ["tensorboard", *(pytest.param(name, marks=pytest.mark.long) for name in ("wandb", "trackio", "mlflow"))]
)
def test_every_tracker_has_the_same_scalars_and_the_video(name, tmp_path, monkeypatch, capfd):
    """Read back from what its library wrote, of a run that went on once; nothing is sent anywhere."""
    pytest.importorskip(name)
    for variable in ("WANDB_PROJECT", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "TRACKIO_SPACE_ID"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    if name == "trackio":
        monkeypatch.setattr("trackio.sqlite_storage.TRACKIO_DIR", tmp_path / "trackio")
        monkeypatch.setattr("trackio.utils.TRACKIO_DIR", tmp_path / "trackio")
    folder = tmp_path / "run/tensorboard"
    write_mp4(tmp_path / "clip.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8.0)
    (tracker,) = open_trackers([name], str(folder), FACTS, 0)
    for step, scalars in GIVEN.items():
        tracker.log(step, scalars)
    tracker.video(20, "preview/00-a-circle", tmp_path / "clip.mp4")
    tracker.video(20, "preview/01-gone", tmp_path / "none.mp4")
    tracker.close()
    found, videos, noted = READERS[name](folder)
    assert found == GIVEN and videos == 1
    assert '"lr": 0.5' in noted and "c0ffee" in noted and "here" in noted and '"cpu"' in noted
    assert capfd.readouterr().err.count("warning") == 1, "of the video that was gone"


class Given:
    """A tracker whose `log` does what the test says."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.taken, self.closed = act, {}, False

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        self.act()
        self.taken[step] = dict(scalars)

    def video(self, step: int, name: str, path: Path) -> None:
        raise AssertionError

    def close(self) -> None:
        self.closed = True


def test_a_tracker_that_raises_is_left_out_and_that_is_said_once(capfd):
    def act() -> None:
        raise RuntimeError("no such\nhost")

    tracker = Background("fake", lambda: Given(act))
    for step in range(5):
        tracker.log(step, {"loss": 1.0})
        time.sleep(0.01)
    tracker.close()
    assert capfd.readouterr().err == "warning: fake: no such host; the run goes on without\n"


def test_a_tracker_that_cannot_be_opened_is_said(capfd):
    def open_() -> Given:
        raise PermissionError("not logged in")

    tracker = Background("fake", open_)
    tracker.close()
    assert "fake: not logged in" in capfd.readouterr().err


def test_a_slow_tracker_delays_nothing_and_what_is_dropped_is_counted(capfd):
    """It hangs at the first record: three wait in the queue, the others are dropped, and the end does not wait long."""
    hangs = threading.Event()
    given = Given(hangs.wait)
    tracker = Background("fake", lambda: given, queued=3, patience=0.2)
    begin = time.perf_counter()
    tracker.log(0, {"loss": 1.0})
    while tracker._queue.qsize():
        time.sleep(0.001)
    for step in range(1, 11):
        tracker.log(step, {"loss": 1.0})
    assert tracker.dropped == 7
    tracker.close()
    assert time.perf_counter() - begin < 2
    assert capfd.readouterr().err == "warning: fake: is too slow: 10 records were dropped\n"
    hangs.set()


def test_all_that_a_tracker_takes_arrives_before_the_end(capfd):
    given = Given(lambda: time.sleep(0.001))
    tracker = Background("fake", lambda: given)
    for step in range(50):
        tracker.log(step, {"loss": math.sqrt(step)})
    tracker.close()
    assert given.closed and given.taken == {step: {"loss": math.sqrt(step)} for step in range(50)}
    assert capfd.readouterr().err == ""


def test_a_missing_library_is_one_error_that_names_the_extra(monkeypatch):
    monkeypatch.setitem(trackers._LIBRARIES, "wandb", "no_such_library")
    check_trackers(["tensorboard"])
    with pytest.raises(ConfigError, match=r"logging.trackers: wandb is not installed; pip install 'mugv_ds\[wandb\]'"):
        check_trackers(["tensorboard", "wandb"])


def test_a_run_that_goes_on_keeps_its_ids_and_a_damaged_file_gives_new_ones(tmp_path):
    assert run_id(tmp_path / "new", "wandb", lambda: "a") == "a"
    assert run_id(tmp_path / "new", "mlflow", lambda: "b") == "b"
    assert run_id(tmp_path / "new", "wandb", lambda: "c") == "a"
    (tmp_path / "new/trackers.json").write_text('["')
    assert run_id(tmp_path / "new", "wandb", lambda: "d") == "d"


def test_what_is_noted_of_a_run():
    facts = run_facts({"a": 1}, ["two", "one", "two"], None)
    assert facts["config"] == {"a": 1} and facts["hosts"] == ["one", "two"] and facts["card"] == "cpu"
    commit = facts["commit"]
    assert commit is None or len(commit) == 40
