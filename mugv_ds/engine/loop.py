"""The training loop, one for every layout."""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.errors import Stopped
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.loader import loader
from mugv_ds.data.plan import PlannedStep
from mugv_ds.data.quarantine import Reading, Replacing
from mugv_ds.data.readers import Batch
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.evaluate.evaluate import Evaluator
from mugv_ds.engine.evaluate.reference import ReferenceModel
from mugv_ds.engine.evaluate.validate import Validation
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.guard import Guard, Prefetched, Rollback, StepResult
from mugv_ds.engine.metrics import OptimizerProbe, Recorder, peak_tflops
from mugv_ds.engine.preview import Previews
from mugv_ds.engine.process import Process
from mugv_ds.engine.profile import profiled
from mugv_ds.models.flops import step_flops
from mugv_ds.models.rope import patch_grid
from mugv_ds.objectives.preference import kl_reference_point

State = dict[str, Any]


class Checkpoints(Protocol):
    """Where the loop saves; see `checkpoint.store.Store`. All ranks call each method together."""

    state: State  # what was saved with the checkpoint that was restored; empty after a fresh start

    def save(self, step: int, state: State) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...

    def restore(self, before: int) -> int: ...


class Trainer:
    """Runs optimizer steps over the data of a run.

    Args:
        config: the run. process: this process. engine: see `build_engine`.
        data: what is trained on and validated with.
        reference: of a preference run; None: it is none.
        ema: averages of the weights, which take in those of every step that was applied.
        store: saves when a checkpoint is due, and holds the state that the run goes on from.
        previews: writes videos when they are due; None: there are none.
    """

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        engine: PipelineEngine,
        *,
        data: RunData,
        reference: ReferenceModel | None,
        ema: PowerEma,
        store: Checkpoints,
        previews: Previews | None = None,
    ) -> None:
        self.config, self.process, self.engine = config, process, engine
        self.ema, self.store, self.previews = ema, store, previews
        self.dit = config.model.dit()
        self.data, self.plan, self.readers, self.reference = data, data.plan, data.readers, reference
        self.feed = Feed(engine.module, process, config.data, self.dit.caption_channels)
        self.evaluator = Evaluator(process, engine, self.feed, config.data.num_workers)
        held_out = reference.held_out() if reference else []
        self.validation = Validation(config.preference, data, held_out, self.evaluator)
        parameters = sum(p.numel() for p in engine.module.parameters())
        self.probe = OptimizerProbe(engine.basic_optimizer, parameters, process.layout.replicas)
        self.guard = Guard(config, process, engine, self._explain, self._items)
        self.waited = 0.0  # seconds spent waiting for data since the last record

    def run(self, start: int) -> bool:
        """Trains from step `start` to the config's last, with records, validations and checkpoints as it says.

        Args:
            start: steps taken.

        Returns:
            Whether the run was asked to stop, and saved, before its last step.

        Raises:
            InputError: a sample and all that would replace it cannot be used, or a checkpoint could not be saved.
            TrainingError: the run cannot go on. PeerError: another rank says why.
        """
        self.guard.start(self.store.state)
        if start == 0 and self.config.checkpoint.save_every:
            self.store.save(0, self.guard.state())  # so that there is a step to go back to before the first is due
        while True:
            try:
                stopped = self._run_from(start)
            except Rollback as cause:
                # One that is saved on schedule, so that a run that was stopped in between goes back as far.
                every = max(self.config.checkpoint.save_every, 1)
                start = self.store.restore(before=cause.before // every * every + 1)
                self.guard.rolled_back(cause, start, self.store.state)
            else:
                self.store.wait()
                self.guard.close()
                return stopped

    def _run_from(self, start: int) -> bool:
        """Trains from step `start` until the last step, a stop or a Rollback; returns whether it was stopped."""
        logging, steps = self.config.logging, self.config.schedule.steps
        peak = peak_tflops(logging, self.process.device)
        world = {"rank": self.process.rank, "world_size": self.process.layout.world_size}
        recorder = Recorder(logging, **world, start=start, steps=steps, peak=peak)
        position = self.guard.history.position(start)
        if self.reference is not None:
            tables = self.reference.complete(position, position + steps - start, partial(self.guard.alive, start))
            self.readers = self.data.readers_with(tables)
        self.waited = 0.0
        with closing(recorder), closing(self._readings(position, position + steps - start)) as readings:
            step, result = start, None
            while True:
                batches, prefetched = self._read(readings if step < steps else None)
                stop = self.guard.boundary(step, result, prefetched)
                self._save(step, recorder, result, stop)
                if stop and step < steps:
                    return True
                try:
                    self._look(step, recorder, result)
                except Stopped:  # before all was measured or written, which is then done when the run goes on
                    self._save(step, recorder, result, stop=True)
                    return True
                if step >= steps:
                    return False
                with profiled(logging, step + 1, self.process):
                    result = self._train_step(step, batches, recorder)
                step += 1

    def _due(self, done: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done`; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.config.schedule.steps)

    def _save(self, step: int, recorder: Recorder, result: StepResult | None, stop: bool) -> None:
        """Saves a checkpoint if one is due after `step` steps or the run stops; raises an earlier one's failure."""
        self.store.poll()
        every = self.config.checkpoint.save_every
        if result and (self._due(step, every) or (stop and every)):
            with recorder.excluded():
                self.store.save(step, self.guard.state())

    def _look(self, step: int, recorder: Recorder, result: StepResult | None) -> None:
        """Validates and writes previews if they are due after `step` steps."""
        steps = self.config.schedule.steps
        if self._due(step, self.config.logging.eval_every or steps) if result else step < steps:
            self._validate(recorder, step)
        # Also where the run goes on from: it may have ended before they were written.
        if self.previews is not None and step and self._due(step, self.config.preview.every):
            with recorder.excluded():
                self.previews.write(step, recorder, partial(self.guard.alive, step))

    def _readings(self, first: int, stop: int) -> Iterator[list[Reading]]:
        """What this rank reads for each data step of [first, stop): its micro-batches; none where it reads nothing."""
        if not self.feed.reads:
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
                for reading in steps:
                    yield reading
                    first += 1
                    if self.guard.history.aside() != aside:  # what was read ahead may hold one of them
                        break

    def _read(self, readings: Iterator[list[Reading]] | None) -> tuple[list[Batch] | None, Prefetched]:
        """The next step's micro-batches, as far as this rank reads, and what the guard has to know of them."""
        if readings is None or not self.feed.reads:
            return None, Prefetched()
        begin = time.perf_counter()
        try:
            read = next(readings)
        except Exception as failure:
            return None, Prefetched(failure=failure)
        self.waited += time.perf_counter() - begin
        # The last stage reads the same samples as the first.
        reports = self.feed.module.is_first
        return [batch for batch, _ in read], Prefetched([bad for _, found in read if reports for bad in found])

    def _train_step(self, step: int, batches: list[Batch] | None, recorder: Recorder) -> StepResult:
        """Takes the optimizer step after `step` steps.

        Args:
            batches: what this rank read for it; None where it reads nothing.
        """
        planned = self.plan.step(self.guard.history.position(step))  # known to all ranks before anything is sent
        work = self._prepare(planned, batches)
        self.probe.armed = recorder.due(step)
        rate = self.engine.get_lr()[0]
        loss = self.engine.train_batch(work)
        if self.engine.was_step_applied():
            self.ema.update(step + 1)
        self._note(planned, loss, recorder)
        if recorder.due(step):
            self._record(step + 1, planned, rate, recorder)
        return StepResult(float(loss), self.engine.was_step_applied(), planned.samples)

    def _prepare(self, planned: PlannedStep, batches: list[Batch] | None) -> Iterator[tuple]:
        """Tells the engine the step's shape and size, and returns what its schedule asks this rank for."""
        streamed, companions = planned.counts(self.process.layout.data)
        count, preferred = streamed + companions, 0 if self.config.preference is None else streamed
        if preferred:
            self._set_reference_point(planned, batches, streamed)
            batches = self._weigh(batches, streamed, companions)
        self.evaluator.set_shape(planned.shape, planned.micro)
        engine = self.engine
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * count * engine.dp_world_size)
        return self.feed.stage(batches, planned.shape, planned.micro, count, preferred)

    def _set_reference_point(self, planned: PlannedStep, batches: list[Batch] | None, streamed: int) -> None:
        """Measures KTO's reference point on the preference samples of the step, of which this rank read `batches`."""
        section = self.config.preference
        if section.objective != "kto":
            return
        own = None if batches is None else batches[:streamed]
        now = self.evaluator.losses(own, planned.shape, planned.micro, streamed)
        gains = (now.reference - now.loss) * (now.elements if section.reduction == "sum" else 1.0)
        point = float(kl_reference_point(torch.from_numpy(gains))) if len(gains) else 0.0  # all may be fillers
        self.engine.module.loss.kl_reference_point = point

    def _weigh(self, batches: list[Batch] | None, streamed: int, companions: int) -> list[Batch] | None:
        """Weighs the micro-batches so that the step's loss is L + λ·ℓ(SFT).

        DeepSpeed averages over all micro-batches; of both kinds the mean is wanted.
        """
        if batches is None:
            return None
        sft_weight, count = self.config.preference.sft_weight, streamed + companions
        weights = [count / streamed] * streamed + [sft_weight * count / max(companions, 1)] * companions
        return [batch._replace(weight=batch.weight * weight) for batch, weight in zip(batches, weights, strict=True)]

    def _note(self, planned: PlannedStep, loss: torch.Tensor, recorder: Recorder) -> None:
        """Hands the recorder what the finished step was and did."""
        tokens, samples = patch_grid(*planned.shape).tokens, planned.samples
        flops = step_flops(self.config, planned.shape, samples=samples, companions=len(planned.companions))
        recorder.step(
            loss,
            self.engine.get_additional_losses(),
            stream=planned.stream,
            samples=samples,
            tokens=samples * tokens,
            **flops._asdict(),
        )

    def _record(self, done: int, planned: PlannedStep, rate: float, recorder: Recorder) -> None:
        """Writes the scalars that are due after `done` steps; ends a preference run whose better side got worse."""
        norm = float(self.engine.get_global_grad_norm())
        preferences = recorder.record(done, rate=rate, norm=norm, probe=self.probe, waited=self.waited)
        counters = ("skips", "rollbacks", "bad")
        recorder.write(done, [(f"guard/{name}", getattr(self.guard.history, name)) for name in counters])
        if self.config.preference is not None and self.config.preference.objective == "kto":
            recorder.write(done, [(f"preference/{planned.stream}/point", self.engine.module.loss.kl_reference_point)])
        self.waited = 0.0
        self.engine.timers("train_batch").reset()  # DeepSpeed appends to it every step and never clears it
        self._bound(done, preferences)

    def _bound(self, step: int, preferences: dict[str, dict[str, float]]) -> None:
        """Ends the run where the better side has become much worse than under the reference."""
        for stream, means in preferences.items():
            limit = self.config.preference.max_better_ratio
            if means["better_loss"] > limit * means["better_reference"]:
                self.guard.fail(
                    f"step {step}: {stream}: the better side's error is {means['better_loss']:.4g}, more than "
                    f"preference.max_better_ratio = {limit:g} × the reference's {means['better_reference']:.4g}; go on "
                    "from an earlier checkpoint with a smaller learning rate or a larger preference.sft_weight"
                )

    def _items(self, position: int) -> list[tuple[int, int]]:
        """The (source, item)s of a data step."""
        step = self.plan.step(position)
        return [(ref.source, ref.item) for ref in (*step.refs, *step.companions)]

    def _explain(self, position: int) -> State:
        """The samples of a data step and their timesteps, for the record of what went wrong."""
        step = self.plan.step(position)
        refs = [(self.readers.readers[source], item, visit) for source, item, visit in (*step.refs, *step.companions)]
        return {
            "samples": [reader.name(item) for reader, item, _ in refs],
            "timesteps": [round(reader.time(item, visit), 3) for reader, item, visit in refs],
        }

    def _validate(self, recorder: Recorder, step: int) -> None:
        """Writes what the held-out samples give."""
        with recorder.excluded():
            results = self.validation.run(lambda: self.guard.alive(step))
        recorder.write(step, results.items())
        if "validation/loss" in results:
            recorder.say(f"step {step}: validation loss {results['validation/loss']:.5f}")
