"""The checkpoints of one run: saving in the background, and resuming from the newest sound one, on any layout.

Every rank writes what it owns; all agree that everything is on the disk, or in the object store; rank 0 writes the
manifest, and renames the folder. A checkpoint is there as a whole or not at all; `places` says how.
"""

import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

import mugv_ds
from mugv_ds.checkpoint import files
from mugv_ds.checkpoint.fragments import Engine, Fragment, fragments, read_counters, refresh_weights, set_counters
from mugv_ds.checkpoint.manifest import (
    WEIGHT,
    BrokenCheckpointError,
    Manifest,
    Parameter,
    Piece,
    SavedLayout,
    StartWeights,
    digest,
    file_name,
)
from mugv_ds.checkpoint.places import place_of
from mugv_ds.checkpoint.reader import CheckpointReader
from mugv_ds.checkpoint.snapshot import HostMemory, first_non_finite
from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError, PeerError
from mugv_ds.config.load import leaves
from mugv_ds.config.run import RunConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.text_encoder import TextEncoderInfo, agree
from mugv_ds.models.dit import DiT
from mugv_ds.models.lora import adapter_shapes

_ASK_SECONDS = 1.0  # between two questions to the other ranks
_LEAVE_SECONDS = 25.0  # that the end of a failed run waits for what is being saved
_SHOWN = 48  # characters of a value in a message
_PACKAGES = ("mugv_ds", "torch", "deepspeed", "safetensors")


class Host(Protocol):
    """Collectives of all ranks on the host; see `engine.process.HostGroup`."""

    rank: int
    world_size: int

    def gather(self, value: Any) -> list[Any]: ...

    def all(self, value: bool) -> bool: ...

    def agree(self, function: Callable[[], Any], error: type[Exception]) -> list[Any]: ...


class Process(Protocol):
    """What the store asks of the process: see `engine.process.Process`."""

    layout: Any  # a dataclass of data, sequence and pipeline
    host: Host
    background: Host


class Store:
    """The checkpoints of one run. All ranks make it together, and call each method together.

    Where a method raises CheckpointError it does so on rank 0, with the ranks that failed and why; the others raise
    PeerError.

    Args:
        config: the run. process: this process. engine: holds what is saved.
        data: what the order of its samples is a function of, part by part; see `data.run_data.RunData.order`.
        start: the weights that the run started from. text_encoder: what made its text features, if the data say.
        shapes: of all parameters that all ranks hold, by name; by default those of the config's DiT.
        others: further engines that are saved too, by the prefix of their parameters' names.

    Attributes:
        place: where the checkpoints are. fragments: what this rank owns.
        extra_kinds: more tensors to save: kind → a tensor [numel] for each of `fragments`, in their order. Set it
            before `restore`, which fills them; all ranks have the same kinds.
        state: what was given to `save` with the checkpoint that was restored; empty after a fresh start.

    Raises:
        CheckpointError: another run uses the folder, or it cannot be written.
    """

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        engine: Engine,
        data: Mapping[str, str],
        start: StartWeights = StartWeights(path=None, digest=None),  # noqa: B008, it is frozen
        text_encoder: TextEncoderInfo | None = None,
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        others: Mapping[str, Engine] | None = None,
    ) -> None:
        self.place = place_of(config.checkpoint, process.host.rank)
        self._engine, self._others = engine, dict(others or {})
        self.fragments: list[Fragment] = [
            piece for prefix, of in [("", engine), *self._others.items()] for piece in fragments(of, prefix)
        ]
        self.extra_kinds: Mapping[str, Sequence[Tensor]] = {}
        self.state: dict[str, Any] = {}
        self._config = config.checkpoint
        self._host, self._background, self._rank = process.host, process.background, process.host.rank
        self._memory = HostMemory()
        self._thread = ThreadPoolExecutor(1, "checkpoint", initializer=_yield_to_training)
        self._pending: Future | None = None
        self._newest: int | None = None
        self._run, self._data = config, dict(data)
        self._began: dict[str, int] = {}  # averages that were switched on during the run → after which step
        self._shapes = dict(_dit_shapes(config) if shapes is None else shapes)
        run_config = config.model_dump(mode="json")
        self._constant = {
            "data": self._data,
            "text_encoder": text_encoder,
            "start": start,
            "layout": SavedLayout(**asdict(process.layout)),
            "config": run_config,
            "config_sha256": digest(run_config),
        }
        token = self._first(self._open)
        self._agree(lambda: self.place.join(token))
        self._first(lambda: self.place.joined(token))

    def _open(self) -> str:
        token = self.place.open()
        self._constant["versions"] = {name: _version(name) for name in _PACKAGES}
        self._constant["git_commit"] = _git_commit()
        return token

    def save(self, step: int, state: Mapping[str, Any] | None = None) -> None:
        """Saves what there is after `step` steps; in the background if the config says so, once it is copied.

        Waits for an earlier save first. Does nothing if the newest checkpoint is of this step.

        Args:
            state: more to keep, as JSON can hold it; that of rank 0 is kept.

        Raises:
            CheckpointError: this save or, in the background, an earlier one failed: a rank could not write, there is
                no space, or a tensor is not finite. No rank has committed it, and `latest` is as before.
        """
        self.wait()
        if step == self._newest:
            return
        kept = json.loads(json.dumps(dict(state or {}), allow_nan=False))  # the caller may go on to change it
        copies, problem = self._copy()
        about = {
            "counters": read_counters(self._engine),
            "other_counters": {prefix: read_counters(engine) for prefix, engine in self._others.items()},
            "state": kept,
            "began": self._began,
            **self._constant,
        }
        if self._config.background:
            self._pending = self._thread.submit(self._write, step, copies, problem, about)
        else:
            self._write(step, copies, problem, about)

    def poll(self) -> None:
        """Raises the failure of a background save, if it has come to its end on all ranks. Cheap; for every step.

        Raises:
            CheckpointError: as `save`.
        """
        if self._pending is not None and self._host.all(self._pending.done()):
            self.wait()

    def wait(self) -> None:
        """Waits for the background save, if there is one.

        The ranks ask each other meanwhile: of one that is gone, the threads that save would not hear.

        Raises:
            CheckpointError: as `save`.
        """
        if self._pending is not None:
            while not self._host.all(self._pending.done()):
                wait([self._pending], timeout=_ASK_SECONDS)
            pending, self._pending = self._pending, None
            pending.result()

    def close(self) -> None:
        """Gives the folder free. What a failed run still saves in the background is waited for, up to 25 s.

        Its failure is printed. The launcher kills what has not ended 30 s after another rank; without one, a rank that
        is gone must not hold up the others.
        """
        pending, self._pending = self._pending, None
        if pending is not None and pending not in wait([pending], timeout=_LEAVE_SECONDS).done:
            self._thread.shutdown(wait=False)
            self._say(f"warning: the save in the background is left unfinished after {_LEAVE_SECONDS:g} s")
            return  # and the thread its memory and the lock, which end with the process
        self._thread.shutdown()
        if pending is not None and (failure := pending.exception()) is not None:
            self._say(f"error: {failure}")
        self._memory.release()
        self.place.release()

    def _tensors(self) -> dict[str, Tensor]:
        """What this rank saves, by key in its file."""
        return {
            f"{fragment.name}/{kind}": tensor
            for i, fragment in enumerate(self.fragments)
            for kind, tensor in self._kinds(i).items()
        }

    def _kinds(self, i: int) -> dict[str, Tensor]:
        """Kind → tensor of the i-th fragment."""
        return self.fragments[i].tensors | {kind: tensors[i] for kind, tensors in self.extra_kinds.items()}

    def _copy(self) -> tuple[dict[str, Tensor], Exception | None]:
        """Copies of what this rank saves, or why there are none, which the ranks have yet to agree on."""
        tensors = self._tensors()
        try:
            if (name := first_non_finite(tensors)) is not None:
                raise CheckpointError(f"{name} holds a NaN or an infinity; nothing was saved")
            return self._memory.copy(tensors), None
        except (CheckpointError, RuntimeError) as error:
            return {}, error

    def _write(self, step: int, tensors: dict[str, Tensor], problem: Exception | None, about: dict[str, Any]) -> None:
        """Writes a checkpoint from copies: all ranks, in the same order, none goes on before all are done."""

        def size() -> int:
            if problem is not None:
                raise problem
            return _bytes(tensors)

        host = self._background
        sizes = self._agree(size, host)
        try:
            self._first(lambda: self.place.start(step, sum(sizes)), host)
            saved = self._agree(lambda: self._write_files(step, tensors), host)
            self._first(lambda: self._commit(step, saved, about), host)
        except BaseException:
            if self._rank == 0:
                with contextlib.suppress(OSError):  # the next start sweeps it
                    self.place.discard(step)
            raise
        self._newest = step

    def _write_files(self, step: int, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Writes this rank's files, one for each kind, each to where it belongs before the next."""
        folder = self.place.unfinished(step, _bytes(tensors))
        by_kind: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            name, _, kind = key.rpartition("/")
            by_kind.setdefault(kind, {})[name] = tensor
        entries = {}
        for kind, held in sorted(by_kind.items()):
            name = file_name(self._rank, kind)
            entries[kind] = files.write_tensors(folder / name, held).model_dump()
            self.place.put(step, name)
        self.place.written(step)
        return {"entries": entries, "held": [(piece.name, piece.start, piece.numel) for piece in self.fragments]}

    def _commit(self, step: int, saved: list[dict[str, Any]], about: dict[str, Any]) -> None:
        pieces: dict[str, list[Piece]] = {name: [] for name in self._shapes}
        for rank, report in enumerate(saved):
            for name, start, numel in report["held"]:
                pieces[name].append(Piece(rank=rank, start=start, numel=numel))
        manifest = Manifest(
            step=step,
            kinds=tuple(sorted({kind for report in saved for kind in report["entries"]})),
            files={
                file_name(rank, kind): entry
                for rank, report in enumerate(saved)
                for kind, entry in report["entries"].items()
            },
            parameters={
                name: Parameter(shape=shape, pieces=tuple(sorted(pieces[name], key=lambda piece: piece.start)))
                for name, shape in self._shapes.items()
            },
            **about,
        )
        self.place.commit(step, manifest)
        self.place.point_latest(step)
        for old in files.expired(self.place.steps(), step, self._config.keep_last, self._config.keep_every):
            try:
                self.place.remove(old)
            except OSError as error:  # what was saved is saved
                self._say(f"warning: {self.place.name(old)}: could not be removed: {error}")

    def restore(self, before: int | None = None) -> int:
        """Loads the newest sound checkpoint, as `checkpoint.resume` says; broken ones are named and passed over.

        Args:
            before: go back inside a run, to a checkpoint of fewer steps than this. Those from this step on belong to
                the branch that is given up, and are removed.

        Returns:
            The steps it has taken; 0 for a fresh start.

        Raises:
            CheckpointError: there are checkpoints but none is sound; one is wanted and there is none, or the other
                way round; or it is of another model, other data, or a newer format.
        """
        self.wait()
        steps, note = self._first(self.place.candidates)
        mode = "must" if before is not None else self._config.resume
        wanted = steps if before is None else [step for step in steps if step < before]
        if mode == "never" and steps:
            raise self._refusal(
                f"{self.place}: holds step {steps[0]}, and checkpoint.resume is 'never'; use another dir"
            )
        if note is not None:
            self._say(note)
        if before is None:
            self._warn_of_space()
        if not wanted and mode != "must":
            return 0
        manifest = next(filter(None, map(self._sound, wanted)), None)
        if manifest is None:
            what = "none of its checkpoints is sound" if wanted else "no checkpoint"
            limit = "checkpoint.resume is 'must'" if before is None else f"one before step {before} is wanted"
            why = f"{what}; remove them to start afresh, or use another dir" if wanted else f"{what}, and {limit}"
            raise self._refusal(f"{self.place}: {why}")
        self._agree(lambda: self._load(manifest, resuming=before is None))
        counted = {"": manifest.counters, **manifest.other_counters}
        for prefix, engine in (("", self._engine), *self._others.items()):
            refresh_weights(engine)
            set_counters(engine, counted[prefix])
        self.state, self._newest = manifest.state, manifest.step
        if before is not None:
            self._first(lambda: self._give_up([step for step in steps if step >= before]))
        return manifest.step

    def _sound(self, step: int) -> Manifest | None:
        """The manifest of a checkpoint that is as it was written; each rank reads its share of the files."""
        found = []

        def check() -> str | None:
            try:
                manifest = self.place.manifest(step)
                share = sorted(manifest.files)[self._rank :: self._host.world_size]
                self.place.verify(manifest, share, self._needed(manifest))
            except BrokenCheckpointError as error:
                return str(error)
            found.append(manifest)
            return None

        problems = dict.fromkeys(filter(None, self._agree(check)))
        for problem in problems:
            self._say(f"passed over: {problem}")
        if not problems:
            return found[0]
        self.place.read(step)
        return None

    def _needed(self, manifest: Manifest) -> list[str]:
        """The files of a checkpoint that hold what this rank owns."""
        needed = set()
        for i, fragment in enumerate(self.fragments):
            kinds = {kind if kind in manifest.kinds else WEIGHT for kind in self._kinds(i)}
            pieces = manifest.parameters[fragment.name].pieces if fragment.name in manifest.parameters else ()
            for piece in pieces:
                if piece.start < fragment.start + fragment.numel and fragment.start < piece.start + piece.numel:
                    needed |= {file_name(piece.rank, kind) for kind in kinds}
        return sorted(needed)

    def _load(self, manifest: Manifest, resuming: bool) -> None:
        """Checks that the checkpoint fits this run, and fills the tensors that this rank owns."""
        folder = self.place.name(manifest.step)
        if resuming:
            self._check_config(manifest, folder)
        self._check_model(manifest, folder)
        if not self._config.accept_changed_data:
            self._check_data(manifest, folder)
        missing = sorted(self.extra_kinds.keys() - set(manifest.kinds))
        self._began = dict.fromkeys(missing, manifest.step) | {
            kind: step for kind, step in manifest.began.items() if kind in self.extra_kinds
        }
        if missing:
            self._say(f"{folder}: holds no {', '.join(missing)}; taken from the weights, as later checkpoints will say")
        kept = {kind for i in range(len(self.fragments)) for kind in self._kinds(i)}
        unused = sorted(set(manifest.kinds) - kept) if self.fragments else []
        if unused:
            self._say(f"{folder}: holds {', '.join(unused)}, which this run does not keep; left out")
        with CheckpointReader(self.place.folder(manifest.step), manifest) as saved:
            for i, fragment in enumerate(self.fragments):
                for kind, tensor in self._kinds(i).items():
                    saved.read_into(tensor, fragment.name, WEIGHT if kind in missing else kind, fragment.start)
        self.place.read(manifest.step)

    def _check_model(self, manifest: Manifest, folder: str) -> None:
        saved = {name: parameter.shape for name, parameter in manifest.parameters.items()}
        for name in chain(self._shapes, saved):
            here, there = self._shapes.get(name), saved.get(name)
            if here != there:
                raise CheckpointError(
                    f"{folder}: is of another model: {name} is {_shape(there)} there and {_shape(here)} here; set the "
                    "model as it was, or use another checkpoint.dir"
                )

    def _check_data(self, manifest: Manifest, folder: str) -> None:
        differing = [key for key in {**manifest.data, **self._data} if manifest.data.get(key) != self._data.get(key)]
        if differing:
            there_here = ((key, _short(manifest.data.get(key)), _short(self._data.get(key))) for key in differing)
            parts = ", ".join(f"{key} ({there}, now {here})" for key, there, here in there_here)
            raise CheckpointError(
                f"{folder}: the order of its samples was another; what differs: {parts}. Samples would be repeated and "
                "left out: set it as it was, or checkpoint.accept_changed_data to go on with a new order"
            )
        agree(
            {folder: manifest.text_encoder, "the data now": self._constant["text_encoder"]},
            "use the features as they were, or checkpoint.accept_changed_data to go on with others",
            CheckpointError,
        )

    def _check_config(self, manifest: Manifest, folder: str) -> None:
        """Says which settings are not those that the checkpoint was saved with; refuses what cannot be meant."""
        then, now = (dict(leaves(config)) for config in (manifest.config, self._run.model_dump(mode="json")))
        steps = self._run.schedule.steps
        if steps < manifest.step:
            raise CheckpointError(
                f"{folder}: has taken {manifest.step} steps, and schedule.steps = {steps}; raise it, or use another "
                "checkpoint.dir for a new run"
            )
        kinds = [config.get("optimizer.kind", "adamw") for config in (then, now)]
        if kinds[0] != kinds[1]:
            raise CheckpointError(
                f"{folder}: is of a run with optimizer.kind = {kinds[0]}, this one has {kinds[1]}, which keeps other "
                "moments; use another checkpoint.dir, and name this one as checkpoint.init_from, to start from its "
                "weights"
            )
        objectives = [config.get("preference.objective") for config in (then, now)]
        if objectives[0] != objectives[1]:
            raise CheckpointError(
                f"{folder}: is of a run with preference.objective = {objectives[0]}, this one has {objectives[1]}; use "
                "another checkpoint.dir, and name this one as checkpoint.init_from"
            )
        adapters = [_adapters(config) for config in (manifest.config, self._run.model_dump(mode="json"))]
        if adapters[0] != adapters[1]:
            raise CheckpointError(
                f"{folder}: is of a run with lora = {json.dumps(adapters[0])}, this one has {json.dumps(adapters[1])}; "
                "set the section as it was, or use another checkpoint.dir, and name this one as checkpoint.init_from"
            )
        name = files.step_name(manifest.step)
        for key in sorted(then.keys() | now.keys()):
            if then.get(key) != now.get(key):
                self._say(f"changed since {name}: {key} = {_short(then.get(key))} → {_short(now.get(key))}")

    def _give_up(self, steps: list[int]) -> None:
        for step in steps:
            self._say(f"{self.place.name(step)}: given up")
            self.place.remove(step)
        self.place.point_latest(self._newest)

    def _warn_of_space(self) -> None:
        needed = sum(self._host.gather(_bytes(self._tensors())))
        free = self._first(self.place.free_bytes)
        if free is not None and free < 2 * needed:
            room = f"{files.gib(free)} are free, less than two checkpoints of {files.gib(needed)}"
            self._say(f"warning: {self.place}: {room}")

    def _agree(self, function: Callable[[], Any], host: Host | None = None) -> list[Any]:
        """Calls `function` on all ranks and returns what each gave; `host` is the main thread's if not given."""
        return (host or self._host).agree(function, CheckpointError)

    def _first(self, function: Callable[[], Any], host: Host | None = None) -> Any:
        """Calls `function` on rank 0 and returns what it gave on all."""
        return self._agree(function if self._rank == 0 else lambda: None, host)[0]

    def _say(self, line: str) -> None:
        if self._rank == 0:
            say(line)

    def _refusal(self, text: str) -> Exception:
        """The error of what all ranks know: it is printed once."""
        return CheckpointError(text) if self._rank == 0 else PeerError(text, CheckpointError.status)


def _dit_shapes(config: TrainConfig) -> Mapping[str, tuple[int, ...]]:
    """Shapes of what a run trains: a whole DiT, or adapters alone."""
    if config.lora is not None:
        return adapter_shapes(config.model.dit(), config.lora)
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in DiT(config.model.dit()).named_parameters()}


def _adapters(config: dict[str, Any]) -> dict[str, Any] | None:
    """What has to stay as it is of a config's adapters, of which a checkpoint holds the factors alone."""
    lora = config.get("lora")
    return lora and {"rank": lora["rank"], "alpha": lora["alpha"] or lora["rank"], "targets": sorted(lora["targets"])}


def _bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _short(value: Any) -> str:
    """A value for a message; of a SHA-256 the beginning."""
    text = str(value)
    return f"{text[:_SHOWN]}…" if len(text) > _SHOWN else text


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def _yield_to_training() -> None:
    """Lets this thread run where training leaves a core free."""
    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)


def _version(package: str) -> str:
    """The version of a package; code that runs from its source without being installed has none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    """The commit of the repository that this code runs from, if it does."""
    folder = Path(mugv_ds.__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"], capture_output=True, text=True, check=False, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
