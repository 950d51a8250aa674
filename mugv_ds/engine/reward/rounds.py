"""The rounds of learning from a reward: rollouts, their videos and rewards, and what the old policy says of them.

Everything that costs something is in `reward.dir` as soon as it is made, under the round's number. So a run that is
killed goes on in the middle of a round, and a round whose updates are taken again finds its rollouts and rewards.
"""

import json
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.console import say
from mugv_ds.config.errors import ConfigError, InputError, TrainingError
from mugv_ds.config.post_training_schema import RewardFunctionSection
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Sources
from mugv_ds.data.rounds import (
    LATENT_SUFFIX,
    VIDEO_SUFFIX,
    RolloutSamples,
    RoundPlan,
    read_rollout,
    round_folder,
    write_rollout,
)
from mugv_ds.data.run_data import RunData
from mugv_ds.data.video import write_mp4
from mugv_ds.engine.evaluate.evaluate import Evaluator
from mugv_ds.engine.metrics import Recorder
from mugv_ds.engine.preview_codec import Codec, PreviewCodec
from mugv_ds.engine.process import Process
from mugv_ds.engine.reward.judges import Numbers, ask, make_judge
from mugv_ds.engine.reward.old_policy import OldPolicy
from mugv_ds.engine.sampled import Prompt, RowSampler
from mugv_ds.files.atomic import write_atomically
from mugv_ds.objectives.reward import diversity, optimality, total_advantages
from mugv_ds.parallel.inference import PipelinedModel
from mugv_ds.parallel.pipeline import DiTPipeline

_WRITERS = 4  # videos that are written at a time: H.264 takes longer than decoding does
_MOST_BYTES = 1 << 28  # of a file of rewards
_RUN, _ROUND = "run.json", "round.json"

Alive = Callable[[], None]


class Rounds:
    """Makes ready what the updates of a round need. All ranks call each method together.

    Args:
        config: the run. process: this process. module: its stage. evaluator: runs samples through it. data: of the run.
        old: the old policy. refresh: puts the weights, rounded, into the model of all ranks.
        sample: `mugv_ds.sampling.sampler.sample_latents`. load_codec: `mugv_ds.weights.codec.load_codec`.
        distance: how far the policy is from where the run started, as a share; called on all ranks.

    Raises:
        ConfigError: the codec cannot be used, or `reward.dir` holds the rounds of another run. PeerError: rank 0 says
            so.
    """

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        module: DiTPipeline,
        evaluator: Evaluator,
        data: RunData,
        *,
        old: OldPolicy,
        refresh: Callable[[], None],
        sample: Callable[..., Tensor],
        load_codec: Callable[..., Codec],
        distance: Callable[[], float],
    ) -> None:
        self._config, self._section, self._process, self._module = config, config.reward, process, module
        self._evaluator, self._data, self._old, self._refresh = evaluator, data, old, refresh
        self._distance = distance
        self._sampler = RowSampler(
            sample,
            PipelinedModel(module),
            config.flow,
            config.data.default_fps,
            steps=self._section.steps,
            guidance=self._section.guidance,
            first_frame=self._section.first_frame,
            device=process.device,
        )
        self._plan: RoundPlan = data.plan
        sizes = {(8 * height, 8 * width) for _, height, width in data.prompts.buckets().by_shape}
        self._codec = PreviewCodec(self._section.codec, load_codec, process, sizes, "reward.codec")
        self._velocities: dict[int, list[Tensor]] = {}  # of the old policy, by position
        self._seconds: dict[str, float] = {}
        self._ready: float | None = None  # when the last round was
        mark = config.checkpoint.folder / "reward.run"
        process.host.first(lambda: claim_folder(Path(self._section.dir), mark))

    def end_of(self, position: int) -> int:
        """Returns the position at which the next round begins."""
        return (position // self._plan.steps_per_round + 1) * self._plan.steps_per_round

    def complete(self, position: int, stop: int, step: int, recorder: Recorder, alive: Alive) -> Sources:
        """Rolls out, has the rollouts judged, and asks the old policy about what the positions [position, stop) hold.

        Args:
            position, stop: within one round. step: steps taken. alive: see `Guard.alive`.

        Returns:
            The readers of the round.

        Raises:
            InputError: a prompt, a rollout or a reward function cannot be used. TrainingError: a rollout is not finite.
            PeerError: another rank met an error. Stopped: a rank was asked to stop.
        """
        self._seconds = {} if self._ready is None else {"updates": time.perf_counter() - self._ready}
        played = self._plan.round(position // self._plan.steps_per_round)
        _, rollouts = self._data.readers_of(played, ()).readers
        self._process.host.first(lambda: _make_folder(round_folder(self._section.dir, played.number)))
        with self._timed("rollouts"):
            self._roll_out(rollouts, alive)
        with self._timed("videos"):
            self._film(rollouts, alive)
        with self._timed("rewards"):
            numbers = self._judge(rollouts, alive)
        found = self._process.host.first(lambda: self._conclude(rollouts, numbers))
        sources = self._data.readers_of(played, found["optimality"])
        with self._timed("old_policy"):
            self._ask_old(sources, range(position, stop), alive)
        distance = self._distance()
        if self._process.rank == 0:
            if position % self._plan.steps_per_round == 0:  # else an earlier process has written them
                self._record(rollouts, found, distance, step, recorder)
            self._tidy(played.number)
        self._ready = time.perf_counter()
        return sources

    def old_velocities(self, position: int) -> Iterator[Tensor]:
        """Takes the old policy's velocities of a step's rollouts, by micro-batch; none where this rank has no loss."""
        return iter(self._velocities.pop(position))

    def finished(self, position: int) -> None:
        """Has the old policy follow, if the step at this position was the last of its round."""
        number, turn = divmod(position, self._plan.steps_per_round)
        if turn == self._plan.steps_per_round - 1:
            self._old.update(number)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        if self._process.device.type == "cuda":
            torch.cuda.synchronize(self._process.device)
        self._seconds[name] = time.perf_counter() - begin

    def _missing(self, rollouts: RolloutSamples, suffix: str) -> list[int]:
        """The items without a file of this suffix, as rank 0 sees it."""
        items = rollouts.round.items
        return self._process.host.first(lambda: [item for item in items if not rollouts.path(item, suffix).exists()])

    def _roll_out(self, rollouts: RolloutSamples, alive: Alive) -> None:
        """Samples the latents that are not there, in batches that are the same whatever is."""
        missing, items = set(self._missing(rollouts, LATENT_SUFFIX)), rollouts.round.items
        size, layout, place = self._section.sample_batch, self._process.layout, self._process.coordinates
        batches = [items[first : first + size] for first in range(0, len(items), size)]
        batches = [batch for batch in batches if missing & set(batch)]
        if not batches:
            return
        writes = place.stage == place.sequence == 0
        with self._old.in_model(self._refresh):
            for first in range(0, len(batches), layout.data):
                turn = batches[first : first + layout.data]
                # Replicas without a batch of their own repeat the last, so that all stay in step.
                batch = turn[min(place.data, len(turn) - 1)]
                prompts, null_text = self._process.host.attempt(
                    lambda batch=batch: ([Prompt.of(rollouts.prompt(i)) for i in batch], self._null_text(rollouts))
                )
                noise = torch.stack([rollouts.first_noise(item) for item in batch])
                latents = self._sampler(prompts, noise, null_text, alive)
                mine = set(batch) & missing if writes and place.data < len(turn) else set()
                self._process.host.attempt(lambda b=batch, x=latents, m=mine: self._keep(rollouts, b, x, m))

    def _null_text(self, rollouts: RolloutSamples) -> tuple[Tensor, Tensor] | None:
        return None if self._section.guidance == 1 else rollouts.prompts.null_text()

    def _keep(self, rollouts: RolloutSamples, batch: Sequence[int], latents: Tensor, mine: set[int]) -> None:
        if not latents.isfinite().all():
            raise TrainingError(
                f"round {rollouts.round.number}: a rollout is not finite: the policy has diverged; go on from an "
                "earlier checkpoint with a smaller optimizer.lr or a larger reward.data_weight"
            )
        for item, latent in zip(batch, latents.float().cpu(), strict=True):
            if item in mine:
                with _named():
                    write_rollout(rollouts.path(item, LATENT_SUFFIX), latent)

    def _film(self, rollouts: RolloutSamples, alive: Alive) -> None:
        """Decodes the videos that are not there; all ranks share the work of each, while rank 0 writes others."""
        missing = self._missing(rollouts, VIDEO_SUFFIX)
        if not missing:
            return
        played, writing = rollouts.round, deque()
        with self._codec.on_device(), ThreadPoolExecutor(_WRITERS, "video") as threads:
            for item in missing:
                path = rollouts.path(item, LATENT_SUFFIX)
                latent = self._process.host.attempt(lambda path=path: read_rollout(path, played.shape))
                row = rollouts.prompts.index.row(rollouts.rollout(item).row)
                frames = self._codec.decode(latent, self._sampler.gives_first_frame(row), alive)
                if self._process.rank == 0:
                    writing.append(
                        threads.submit(_write_video, rollouts.path(item, VIDEO_SUFFIX), frames, self._sampler.fps(row))
                    )
                done = writing.popleft() if len(writing) > _WRITERS else None
                self._process.host.attempt(lambda done=done: done and done.result())
                alive()
            self._process.host.attempt(lambda: [video.result() for video in writing])

    def _judge(self, rollouts: RolloutSamples, alive: Alive) -> Numbers | None:
        """Asks all reward functions about the rollouts that they have not judged; returns the numbers on rank 0."""
        cancelled = threading.Event()

        def meanwhile() -> None:
            try:
                alive()
            except BaseException:
                cancelled.set()  # nobody waits for the answers
                raise

        return self._process.host.wait_for_first(lambda: self._ask_all(rollouts, cancelled), meanwhile)

    def _ask_all(self, rollouts: RolloutSamples, cancelled: threading.Event) -> Numbers:
        """On rank 0, what all reward functions say; each answer is kept as soon as it is there."""
        numbers: Numbers = {}
        for function in self._section.functions:
            for name, values in self._ask_one(function, rollouts, cancelled).items():
                numbers[name] = numbers.get(name, {}) | values
        return numbers

    def _ask_one(
        self, function: RewardFunctionSection, rollouts: RolloutSamples, cancelled: threading.Event
    ) -> Numbers:
        folder = round_folder(self._section.dir, rollouts.round.number)
        path = folder / f"rewards-{function.name}.json"
        videos = {_name(rollouts, item): _about(rollouts, item) for item in rollouts.round.items}
        with _named():
            known = _known(path, set(videos), set(function.weights))
            judge, missing = None, [video for name, video in videos.items() if name not in known]
            for first in range(0, len(missing), function.batch):
                judge = judge or make_judge(function, folder / f"rewards-{function.name}.log")
                some = missing[first : first + function.batch]
                known |= ask(function, judge, some, cancelled, lambda line: say(f"warning: {line}"))
                _write(path, {name: known[name] for name in videos if name in known})
        return known

    def _conclude(self, rollouts: RolloutSamples, numbers: Numbers) -> dict[str, Any]:
        """Writes and returns what follows from the rewards, of JSON types."""
        section, items = self._section, rollouts.round.items
        names = [_name(rollouts, item) for item in items]
        by_name = {
            name: torch.tensor([numbers[video][name] for video in names], dtype=torch.float64).view(
                -1, section.rollouts
            )
            for name in section.weights
        }
        total_PK = total_advantages(by_name, section.weights)
        spreads = {name: (r - r.mean(dim=1, keepdim=True)).square().mean().sqrt().item() for name, r in by_name.items()}
        found = {
            "optimality": optimality(total_PK, section.advantage_clip).flatten().tolist(),
            "rewards": {name: rewards.mean().item() for name, rewards in by_name.items()},
            "spreads": spreads,
            "diversity": self._diversity(rollouts, items),
            "best": items[int(total_PK.argmax())],
            "worst": items[int(total_PK.argmin())],
        }
        about = [
            _about(rollouts, item) | {"rewards": numbers[name], "optimality": found["optimality"][at]}
            for at, (item, name) in enumerate(zip(items, names, strict=True))
        ]
        with _named():
            _write(round_folder(section.dir, rollouts.round.number) / _ROUND, {"rollouts": about, **found})
        return found

    def _diversity(self, rollouts: RolloutSamples, items: Sequence[int]) -> float:
        """The mean diversity of the prompts' rollouts, of which one prompt's are held at a time."""
        of_prompts, count = [], self._section.rollouts
        for first in range(0, len(items), count):
            paths = [rollouts.path(item, LATENT_SUFFIX) for item in items[first : first + count]]
            of_prompts.append(diversity(torch.stack([read_rollout(path, rollouts.round.shape) for path in paths])))
        return float(torch.stack(of_prompts).mean())

    def _ask_old(self, sources: Sources, positions: Sequence[int], alive: Alive) -> None:
        """Notes the velocities of the old policy for the rollouts of some steps, at the noise that they train with."""
        objective, layout = self._module.loss, self._process.layout
        self._velocities = {}
        with self._old.in_model(self._refresh):
            for position in positions:
                alive()
                planned = self._plan.step(position)
                count, _ = planned.counts(layout.data)
                refs = planned.micro_batches(self._process.coordinates.data, layout.data)[:count]
                reads = self._evaluator.reads
                batches = self._process.host.attempt(
                    lambda refs=refs, reads=reads: [sources(some) for some in refs] if reads else None
                )
                objective.velocities = []
                self._evaluator.losses(batches, planned.shape, planned.micro, count)
                self._velocities[position], objective.velocities = objective.velocities, None

    def _record(
        self, rollouts: RolloutSamples, found: dict[str, Any], distance: float, step: int, recorder: Recorder
    ) -> None:
        """Writes the curves of a round, the best and the worst of its rollouts, and one line."""
        scalars = {
            **{f"reward/{name}": mean for name, mean in found["rewards"].items()},
            **{f"reward/{name}_spread": spread for name, spread in found["spreads"].items()},
            "reward/diversity": found["diversity"],
            "reward/distance": distance,
            **{f"reward/seconds_{name}": seconds for name, seconds in self._seconds.items()},
        }
        recorder.write(step, scalars.items())
        for which in ("best", "worst"):
            recorder.video(step, f"reward/{which}", rollouts.path(found[which], VIDEO_SUFFIX))
        rewards = ", ".join(f"{name} {mean:.4g}" for name, mean in found["rewards"].items())
        seconds = ", ".join(f"{name.replace('_', ' ')} {taken:.1f} s" for name, taken in self._seconds.items())
        recorder.say(
            f"round {rollouts.round.number} (step {step}): {rewards}; diversity {found['diversity']:.3f}, distance "
            f"{distance:.2e}; {seconds}"
        )

    def _tidy(self, number: int) -> None:
        """Removes latents and videos of rounds that no checkpoint goes back to."""
        saved = self._config.checkpoint
        behind = saved.keep_last * -(-max(saved.save_every, 1) // self._plan.steps_per_round) + 1
        newest = round_folder(self._section.dir, max(number - max(self._section.keep_rounds, behind), -1) + 1).name
        for folder in Path(self._section.dir).glob("round-*"):
            for path in folder.glob("rollout-*") if folder.name < newest else ():
                path.unlink(missing_ok=True)


def claim_folder(folder: Path, mark: Path) -> None:
    """Makes the folder of the rounds, or checks that what is in it is of the run with this mark.

    Args:
        mark: file in the run's folder of checkpoints; made if there is none.

    Raises:
        ConfigError: the rounds are another run's, or the file system failed.
    """
    try:
        for made in (folder, mark.parent):
            made.mkdir(parents=True, exist_ok=True)
        if not mark.exists() and not any(folder.iterdir()):
            _write(mark, uuid.uuid4().hex)
        known = _read(mark) if mark.exists() else None
        if known is not None and not any(folder.glob("round-*")):
            _write(folder / _RUN, known)
        if known is None or not (folder / _RUN).exists() or _read(folder / _RUN) != known:
            raise ConfigError(
                f"reward.dir = {folder}: holds the rounds of another run than that in checkpoint.dir = {mark.parent}; "
                "name another folder, or remove it"
            )
    except OSError as error:
        raise ConfigError(f"reward.dir = {folder}: {error.filename or folder}: {error.strerror or error}") from None


def _write_video(path: Path, frames: np.ndarray, fps: float) -> None:
    with _named(), write_atomically(path) as stream:
        write_mp4(stream.name, frames, fps)


def _make_folder(folder: Path) -> None:
    with _named():
        folder.mkdir(exist_ok=True)


def _name(rollouts: RolloutSamples, item: int) -> str:
    """What a request calls a rollout."""
    path = rollouts.path(item, "")
    return f"{path.parent.name}/{path.name}"


def _about(rollouts: RolloutSamples, item: int) -> dict[str, Any]:
    """What a request says of a rollout."""
    row = rollouts.prompts.index.row(rollouts.rollout(item).row)
    return {
        "id": _name(rollouts, item),
        "video": str(rollouts.path(item, VIDEO_SUFFIX).resolve()),
        "prompt": row.caption or "",
        "sample_id": row.sample_id,
        "fps": row.fps or rollouts.prompts.data.default_fps,
    }


def _known(path: Path, ids: set[str], names: set[str]) -> Numbers:
    """The answers that are there, of those that are asked for."""
    if not path.exists():
        return {}
    found = _read(path)
    if not isinstance(found, dict):
        raise InputError(f"{path}: not a file of rewards; delete it, and they are asked for again")
    return {name: values for name, values in found.items() if name in ids and set(values) == names}


def _read(path: Path) -> Any:
    try:
        return json.loads(read_text_file(path, _MOST_BYTES))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: {error}; delete it, and it is made again") from None


def _write(path: Path, value: Any) -> None:
    with write_atomically(path) as stream:
        stream.write((json.dumps(value, indent=1) + "\n").encode())


@contextmanager
def _named() -> Iterator[None]:
    """Turns what the file system says into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"reward.dir: {error.filename or ''}: {error.strerror or error}") from error
