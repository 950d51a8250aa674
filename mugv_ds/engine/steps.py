"""Taking the steps of a run one after the other, whatever is trained: what every training loop does between them."""

import socket
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from mugv_ds.config.errors import Stopped
from mugv_ds.config.run import RunConfig
from mugv_ds.data.loader import loader
from mugv_ds.data.plan import Plan
from mugv_ds.data.quarantine import Reading, Replacing
from mugv_ds.data.readers import Sources
from mugv_ds.engine.goodput import Timeline
from mugv_ds.engine.guard.guard import Guard, Prefetched, Rollback, StepResult
from mugv_ds.engine.metrics import Recorder, peak_tflops, quartile_means
from mugv_ds.engine.process import Process
from mugv_ds.engine.profile import profiled
from mugv_ds.engine.trackers import run_facts

State = dict[str, Any]


class Checkpoints(Protocol):
    """Where the loop saves; see `checkpoint.store.Store`. All ranks call each method together."""

    state: State  # what was saved with the checkpoint that was restored; empty after a fresh start

    def save(self, step: int, state: State) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...

    def restore(self, before: int) -> int: ...


class Shown(Protocol):
    """What is written to look at; see `engine.preview`."""

    def write(self, step: int, recorder: Recorder, alive: Any) -> None: ...


class StepLoop(ABC):
    """Reads, guards, saves, validates and goes back; how a step is taken, a subclass says.

    Args:
        config: the run. process: this process.
        plan, readers: what each step holds, and who reads it.
        store: saves when a checkpoint is due, and holds the state that the run goes on from.
        shown: steps between two → what writes something to look at when it is due; None writes nothing.

    Attributes:
        guard: set by the subclass before `run`.
        reads: whether this rank reads samples. reports: whether it tells which of them it had to replace.
        waited: seconds spent waiting for data since the last record.
    """

    guard: Guard
    reads = reports = True
    _facts: State  # for the trackers
    means = staticmethod(quartile_means)  # makes scalars of the sums of the steps' terms, by stream

    def __init__(
        self,
        config: RunConfig,
        process: Process,
        *,
        plan: Plan,
        readers: Sources,
        store: Checkpoints,
        shown: Sequence[tuple[int, Shown | None]] = (),
    ) -> None:
        self.config, self.process, self.plan, self.readers = config, process, plan, readers
        self.store, self.shown = store, shown
        self.waited = 0.0
        self._begin_reading: Callable[[], None] = lambda: None  # of the step after the one that begins
        self.timeline = Timeline(Path(config.logging.dir), process.rank)

    @abstractmethod
    def _train_step(self, step: int, batches: list[Any] | None, recorder: Recorder) -> StepResult:
        """Takes the optimizer step after `step` steps.

        Args:
            batches: what this rank read for it; None where it reads nothing.
        """

    @abstractmethod
    def _validate(self, recorder: Recorder, step: int) -> None:
        """Writes what the held-out samples give."""

    def _complete(self, step: int, position: int, stop: int, recorder: Recorder) -> None:  # noqa: B027, may do nothing
        """Makes ready what the data steps of [position, stop) need, before the run goes on after `step` steps.

        Raises:
            Stopped: a rank was asked to stop.
        """

    def _ready_until(self, position: int, stop: int) -> int:
        """The end of the data steps from `position` on, `stop` at most, that can be made ready at once."""
        return stop

    def run(self, start: int, restored: float = 0.0) -> bool:
        """Trains from step `start` to the config's last, with records, validations and checkpoints as it says.

        Args:
            start: steps taken. restored: seconds in which the checkpoint of them was loaded.

        Returns:
            Whether the run was asked to stop, and saved, before its last step.

        Raises:
            InputError: a sample and all that would replace it cannot be used, or a checkpoint could not be saved.
            TrainingError: the run cannot go on. PeerError: another rank says why.
        """
        self.timeline.started(start, restored)
        self.guard.start(self.store.state)
        self._facts = self._run_facts()
        if start == 0 and self.config.checkpoint.save_every:
            with self.timeline.phase("save"):
                self.store.save(0, self.guard.state())  # so that there is a step to go back to before the first is due
        while True:
            try:
                stopped = self._run_from(start)
            except Rollback as cause:
                # One that is saved on schedule, so that a run that was stopped in between goes back as far.
                every = max(self.config.checkpoint.save_every, 1)
                with self.timeline.phase("restore"):
                    start = self.store.restore(before=cause.before // every * every + 1)
                self.guard.rolled_back(cause, start, self.store.state)
                self.timeline.went_back(start)
            else:
                with self.timeline.phase("save"):
                    self.store.wait()
                self.guard.close()
                self.timeline.ended()
                return stopped

    def _run_facts(self) -> State:
        """What trackers note of the run once; on rank 0, all ranks take part."""
        hosts = self.process.host.gather(socket.gethostname())
        if self.process.rank != 0:
            return {}
        return run_facts(self.config.model_dump(mode="json"), hosts, self.process.card)

    def _run_from(self, start: int) -> bool:
        """Trains from step `start` until the last step, a stop or a Rollback; returns whether it was stopped."""
        logging, steps = self.config.logging, self.config.schedule.steps
        peak = peak_tflops(logging, self.process.device)
        world = {"rank": self.process.rank, "world_size": self.process.layout.world_size}
        recorder = Recorder(logging, **world, start=start, steps=steps, peak=peak, means=self.means, facts=self._facts)
        with closing(recorder), ExitStack() as reading:
            step, result, ready, readings = start, None, start, None
            self.waited = 0.0
            while True:
                batches, prefetched = self._read(readings if step < ready else None)
                stop = self._boundary(step, result, prefetched)
                self._save(step, recorder, result, stop)
                if stop and step < steps:
                    return True
                try:
                    self._look(step, recorder, result)
                    if step >= steps:
                        return False
                    if step == ready:
                        reading.close()
                        ready, readings = self._make_ready(step, recorder)
                        reading.enter_context(closing(readings))
                        batches, prefetched = self._read(readings)
                        stop = self._boundary(step, None, prefetched)
                except Stopped:  # before all was measured, written or made ready, which is then done when it goes on
                    stop = True
                if stop:
                    self._save(step, recorder, result, stop=True)
                    return True
                with self.timeline.phase("step"), profiled(logging, step + 1, self.process):
                    self._begin_reading()
                    result = self._train_step(step, batches, recorder)
                step += 1
                self.timeline.step(step, self._kind(self.guard.history.position(step - 1)), result.applied)
                if recorder.due(step - 1):
                    recorder.write(step, self.timeline.scalars().items())

    def _make_ready(self, step: int, recorder: Recorder) -> tuple[int, Iterator[list[Reading]]]:
        """Makes the coming steps ready; returns after which step others have to be, and what is read for these."""
        position = self.guard.history.position(step)
        stop = self._ready_until(position, position + self.config.schedule.steps - step)
        with recorder.excluded(), self.timeline.phase("make ready"):
            self._complete(step, position, stop, recorder)
        return step + stop - position, self._readings(position, stop)

    def _boundary(self, step: int, taken: StepResult | None, ahead: Prefetched) -> bool:
        """See `Guard.boundary`."""
        with self.timeline.phase("boundary"):
            return self.guard.boundary(step, taken, ahead)

    def _due(self, done: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done`; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.config.schedule.steps)

    def _save(self, step: int, recorder: Recorder, result: StepResult | None, stop: bool) -> None:
        """Saves a checkpoint if one is due after `step` steps or the run stops; raises an earlier one's failure."""
        self.store.poll()
        every = self.config.checkpoint.save_every
        if result and (self._due(step, every) or (stop and every)):
            with recorder.excluded(), self.timeline.phase("save"):
                self.store.save(step, self.guard.state())

    def _look(self, step: int, recorder: Recorder, result: StepResult | None) -> None:
        """Validates and writes what is to be looked at, if they are due after `step` steps."""
        steps = self.config.schedule.steps
        if self._due(step, self.config.logging.eval_every or steps) if result else step < steps:
            with self.timeline.phase("validation"):
                self._validate(recorder, step)
        # Also where the run goes on from: it may have ended before they were written.
        for every, shown in self.shown:
            if shown is not None and step and self._due(step, every):
                with recorder.excluded(), self.timeline.phase("previews"):
                    shown.write(step, recorder, partial(self.guard.alive, step))

    def _readings(self, first: int, stop: int) -> Iterator[list[Reading]]:
        """What this rank reads for each data step of [first, stop): its micro-batches; none where it reads nothing."""
        if not self.reads:
            return
        rank, ranks = self.process.coordinates.data, self.process.layout.data
        while first < stop:
            aside = self.guard.history.aside()
            steps = loader(
                lambda position: self.plan.step(position).micro_batches(rank, ranks),
                start_step=first,
                stop_step=stop,
                make=Replacing(self.readers, aside),
                name=lambda ref: self.readers.readers[ref.source].name(ref.item),
                num_workers=self.config.data.num_workers,
                pin=self.process.device.type == "cuda",
            )
            with closing(steps):
                self._begin_reading = steps.begin
                for reading in steps:
                    yield reading
                    first += 1
                    if self.guard.history.aside() != aside:  # what was read ahead may hold one of them
                        break

    def _read(self, readings: Iterator[list[Reading]] | None) -> tuple[list[Any] | None, Prefetched]:
        """The next step's micro-batches, as far as this rank reads, and what the guard has to know of them."""
        if readings is None or not self.reads:
            return None, Prefetched()
        begin = time.perf_counter()
        try:
            with self.timeline.phase("data"):
                read = next(readings)
        except Exception as failure:
            return None, Prefetched(failure=failure)
        self.waited += time.perf_counter() - begin
        return [batch for batch, _ in read], Prefetched([bad for _, found in read if self.reports for bad in found])

    def _kind(self, position: int) -> str:
        """A name that data steps share which take equally long."""
        step = self.plan.step(position)
        return f"{step.stream} {'×'.join(map(str, step.shape))}"

    def _items(self, position: int) -> list[tuple[int, int]]:
        """The (source, item)s of a data step."""
        step = self.plan.step(position)
        return [(ref.source, ref.item) for ref in (*step.refs, *step.companions)]
