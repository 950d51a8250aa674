"""Where curves and previews go: TensorBoard, Weights & Biases, Trackio, MLflow, each through its own library.

No tracker ever holds a step up or ends a run: each has a thread and a bounded queue of its own. What a queue does not
take is dropped and counted; a tracker that raises is left out from then on. Both are said once.
"""

import importlib.util
import io
import json
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from mugv_ds.config.console import say
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.load import leaves
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.video import encode_gif, read_mp4
from mugv_ds.files.atomic import write_atomically

PROJECT = "mugv_ds"  # unless the tracker's own variable in the environment names another
IDS_NAME = "trackers.json"  # in logging.dir: run ids by tracker, so that a run that goes on is one run there too
_LIBRARIES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio", "mlflow": "mlflow"}
_QUEUED = 1000  # records
_PATIENCE_SECONDS = 60.0  # that the end of a run waits for a tracker
_PARAMETER_LENGTH = 500  # characters of a value that MLflow takes
_MOST_OF_IDS = 1 << 16  # bytes
_IDS = threading.Lock()  # of the file of ids, which trackers' threads share
_PARAMETERS = 100  # that MLflow takes at once


class Tracker(Protocol):
    """Takes what a run reports. A method may raise anything, and take any time."""

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Takes scalars after `step` steps."""

    def video(self, step: int, name: str, path: Path) -> None:
        """Takes a video, an mp4 file, under a name such as "preview/00-a-circle"."""

    def close(self) -> None:
        """Flushes and ends."""


class TensorBoard:
    """Events in `folder`; videos are GIFs there.

    Args:
        purge: step from which on what an earlier process wrote does not count. facts: see `run_facts`.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], purge: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder, purge_step=purge)
        self._writer.add_text("run", f"```json\n{json.dumps(facts, indent=2, ensure_ascii=False)}\n```", purge)

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def video(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        from PIL import Image
        from tensorboard.compat.proto.summary_pb2 import Summary

        gif = encode_gif(*read_mp4(path))
        with Image.open(io.BytesIO(gif)) as image:
            width, height = image.size
        shown = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
        summary = Summary(value=[Summary.Value(tag=name, image=shown)])
        self._writer.file_writer.add_summary(summary, step)  # its own `add_video` needs moviepy

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class Wandb:
    """A run of Weights & Biases. WANDB_MODE=offline, WANDB_PROJECT and the library's other variables hold."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], purge: int) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=str(folder),
            id=run_id(folder, "wandb", _new_id),
            resume=None if os.environ.get("WANDB_MODE") == "offline" else "allow",
            dir=folder,
            config=dict(facts),
            settings=wandb.Settings(silent=True, console="off", login_timeout=30),
        )
        self._run.define_metric("*", step_metric="step")  # its own step may not go back, as a run may

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, **scalars})

    def video(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._run.log({"step": step, name: self._wandb.Video(str(path), format="mp4")})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class Trackio:
    """A run of Trackio: local (TRACKIO_DIR), unless its variables name a Space or a server."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], purge: int) -> None:
        import trackio

        self._trackio = trackio
        name = f"{folder.parent.name}-{run_id(folder, 'trackio', _new_id)}"
        self._run = trackio.init(
            project=PROJECT, name=name, config=dict(facts), resume="allow", embed=False, auto_log_gpu=False
        )

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        self._run.log(dict(scalars), step=step)

    def video(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._run.log({name: self._trackio.Video(path)}, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MLflow:
    """A run of MLflow: at MLFLOW_TRACKING_URI, or in the folder `mlruns` of `logging.dir`. Videos are artifacts."""

    def __init__(self, folder: Path, facts: Mapping[str, Any], purge: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        store = os.environ.get("MLFLOW_TRACKING_URI")
        if store is None:
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # which MLflow wants to hear
            store = (folder / "mlruns").absolute().as_uri()
        self._client = MlflowClient(store)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)

        def create() -> str:
            experiment = self._client.get_experiment_by_name(name)
            number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
            run = self._client.create_run(number, run_name=str(folder)).info.run_id
            parameters = [Param(key, str(value)[:_PARAMETER_LENGTH]) for key, value in leaves(dict(facts))]
            for begin in range(0, len(parameters), _PARAMETERS):
                self._client.log_batch(run, params=parameters[begin : begin + _PARAMETERS])
            return run

        self._run = run_id(folder, "mlflow", create)
        self._client.update_run(self._run, status="RUNNING")

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """See `Tracker`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, [Metric(name, value, now, step) for name, value in scalars.items()])

    def video(self, step: int, name: str, path: Path) -> None:
        """See `Tracker`."""
        self._client.log_artifact(self._run, str(path), f"{Path(name).parent}/step-{step:06d}")

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self._run)


_TRACKERS = {"tensorboard": TensorBoard, "wandb": Wandb, "trackio": Trackio, "mlflow": MLflow}


def _new_id() -> str:
    return os.urandom(4).hex()


def run_id(folder: Path, tracker: str, make: Callable[[], str]) -> str:
    """Returns the id that a tracker's run was given when it began, or makes one and keeps it in `folder`."""
    file = folder / IDS_NAME
    with _IDS:
        try:
            ids = json.loads(read_text_file(file, _MOST_OF_IDS, ConfigError))
        except (ConfigError, ValueError):  # there is none yet, or a damaged one: the run is a new one there
            ids = {}
        ids = ids if isinstance(ids, dict) else {}
        if not isinstance(ids.get(tracker), str):
            ids[tracker] = make()
            folder.mkdir(parents=True, exist_ok=True)
            with write_atomically(file) as stream:
                stream.write(json.dumps(ids, indent=2, sort_keys=True).encode() + b"\n")
        return ids[tracker]


def check_trackers(names: Sequence[str]) -> None:
    """Checks that the libraries of all trackers are installed, without importing them.

    Raises:
        ConfigError: one is not; names the extra that has it.
    """
    for name in names:
        if importlib.util.find_spec(_LIBRARIES[name]) is None:
            raise ConfigError(
                f"logging.trackers: {name} is not installed; pip install 'mugv_ds[{name}]', or leave it out"
            )


class Background:
    """A tracker that is fed by a thread; it is opened there, too, as that may take long.

    Args:
        what: it is; warnings begin with it. open_: makes the tracker.
        queued: records that wait for it at most. patience: seconds that `close` waits for those.

    Attributes:
        dropped: records that the queue did not take.
    """

    def __init__(
        self, what: str, open_: Callable[[], Tracker], *, queued: int = _QUEUED, patience: float = _PATIENCE_SECONDS
    ) -> None:
        self._what, self._open, self._patience, self.dropped = what, open_, patience, 0
        self._queue: queue.Queue[tuple[str, tuple]] = queue.Queue(queued)
        self._failed = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {what}", daemon=True)
        self._thread.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Queues scalars; never waits."""
        self._put("log", step, dict(scalars))

    def video(self, step: int, name: str, path: Path) -> None:
        """Queues a video; never waits."""
        self._put("video", step, name, path)

    def close(self) -> None:
        """Waits for what is queued, but not for ever, and says what was dropped."""
        try:
            self._queue.put(("close", ()), timeout=self._patience)
        except queue.Full:
            pass
        else:
            self._thread.join(self._patience)
        if self._thread.is_alive():
            self.dropped += self._queue.qsize()
        if self.dropped and not self._failed:
            self._warn(f"is too slow: {self.dropped} records were dropped")

    def _put(self, *item: Any) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait((item[0], item[1:]))
        except queue.Full:
            self.dropped += 1

    def _work(self) -> None:
        try:
            tracker = self._open()
            while True:
                name, arguments = self._queue.get()
                if name == "video" and not arguments[-1].is_file():  # gone before its turn came
                    self.dropped += 1
                    continue
                getattr(tracker, name)(*arguments)
                if name == "close":
                    return
        except Exception as error:  # of a library that is not ours, which may raise anything
            self._failed = True
            self._warn(f"{' '.join(str(error).split()) or repr(error)}; the run goes on without")

    def _warn(self, why: str) -> None:
        say(f"warning: {self._what}: {why}", error=True)


def open_trackers(names: Sequence[str], folder: str, facts: Mapping[str, Any], purge: int) -> list[Background]:
    """Opens trackers, each in a thread of its own.

    Args:
        names: as `logging.trackers` has them. folder: `logging.dir`. facts: see `run_facts`.
        purge: step from which on what an earlier process wrote does not count.
    """

    def opener(name: str) -> Callable[[], Tracker]:
        return lambda: _TRACKERS[name](Path(folder), facts, purge)

    shown = {"tensorboard": f"logging.dir = {folder}"}
    return [Background(shown.get(name, f"logging.trackers: {name}"), opener(name)) for name in names]


def run_facts(config: Mapping[str, Any], hosts: Sequence[str], card: str | None) -> dict[str, Any]:
    """Returns what trackers note of a run once, of JSON types: its config, the code's commit, hosts and card.

    Args:
        config: of JSON types. hosts: of all ranks. card: name of a rank's device; None: it is a CPU.
    """
    return {"config": dict(config), "commit": code_commit(), "hosts": sorted(set(hosts)), "card": card or "cpu"}


def code_commit() -> str | None:
    """Returns the commit of the repository that the package lies in; None where it is installed, or git is not."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(root), "rev-parse", "HEAD"]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
