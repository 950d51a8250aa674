"""The training loop of the DiT, one for every layout."""

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import PlannedStep
from mugv_ds.data.readers import Batch
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.evaluate.evaluate import Evaluator
from mugv_ds.engine.evaluate.reference import ReferenceModel, measure_held_out
from mugv_ds.engine.evaluate.validate import Validation
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.alarms import alarms
from mugv_ds.engine.guard.guard import Guard, StepResult
from mugv_ds.engine.guard.stopping import stop_if_asked
from mugv_ds.engine.metrics import Expected, OptimizerProbe, Recorder
from mugv_ds.engine.monitor import Monitor
from mugv_ds.engine.preview import Evaluations, Previews
from mugv_ds.engine.process import Process
from mugv_ds.engine.reward.rounds import Rounds
from mugv_ds.engine.schedule import rate_factor
from mugv_ds.engine.steps import Checkpoints, State, StepLoop
from mugv_ds.models.flops import step_flops
from mugv_ds.models.lora import adapters_off
from mugv_ds.models.rope import patch_grid
from mugv_ds.objectives.preference import kl_reference_point


class Trainer(StepLoop):
    """Runs optimizer steps over the data of a run.

    Args:
        config: the run. process: this process. engine: see `build_engine`.
        data: what is trained on and validated with.
        reference: of a preference run; None: it is none, or has adapters. The reference is then its base, the model
            with the adapters off, which is measured step by step.
        rounds: of a run that learns from a reward; None: it does not.
        ema: averages of the weights, which take in those of every step that was applied.
        store: saves when a checkpoint is due, and holds the state that the run goes on from.
        previews: writes videos when they are due; None: there are none. evaluations: measures some, likewise.
        expected: what is predicted of the steps of a stream and latent shape; of others nothing is.
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
        evaluations: Evaluations | None = None,
        rounds: Rounds | None = None,
        expected: Mapping[tuple[str, Shape], Expected] | None = None,
    ) -> None:
        shown = [(config.preview.every, previews), (config.evaluation.every, evaluations)]
        super().__init__(config, process, plan=data.plan, readers=data.readers, store=store, shown=shown)
        self.engine, self.data, self.reference, self.ema, self.rounds = engine, data, reference, ema, rounds
        self.dit, self.expected = config.model.dit(), expected or {}
        self.feed = Feed(engine.module, process, config.data, self.dit.caption_channels)
        self.evaluator = Evaluator(process, engine, self.feed, config.data.num_workers)
        held_out = reference.held_out() if reference else self._base_held_out()
        self.validation = Validation(config.preference, data, held_out, self.evaluator)
        parameters = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
        self.probe = OptimizerProbe(engine.optimizer, parameters, process.layout.replicas)
        self.monitor = Monitor(config, process, engine.module, engine.optimizer)
        self.guard = Guard(
            config, process, engine.module.blocks[0].mlp, engine.module.parameters, self._explain, self._items
        )
        # The last stage reads the same samples as the first.
        self.reads, self.reports = self.feed.reads, self.feed.module.is_first

    def _base_held_out(self) -> list[np.ndarray | None]:
        """The base's losses of the held-out annotations of a preference run with adapters."""
        if self.config.preference is None:
            return []
        with adapters_off(self.engine.module):
            alive = partial(stop_if_asked, self.process.host)
            return measure_held_out(self.data, len(self.config.preference.sources), self.evaluator, alive)

    def _ready_until(self, position: int, stop: int) -> int:
        """The end of the round, where there are rounds."""
        return stop if self.rounds is None else min(stop, self.rounds.end_of(position))

    def _complete(self, step: int, position: int, stop: int, recorder: Recorder) -> None:
        """Has the reference measured on the preference samples that are to come, or the round's rollouts made."""
        alive = partial(self.guard.alive, step)
        if self.reference is not None:
            self.readers = self.data.readers_with(self.reference.complete(position, stop, alive))
        if self.rounds is not None:
            self.readers = self.rounds.complete(position, stop, step, recorder, alive)

    def _train_step(self, step: int, batches: list[Batch] | None, recorder: Recorder) -> StepResult:
        """Takes the optimizer step after `step` steps.

        Args:
            batches: what this rank read for it; None where it reads nothing.
        """
        planned = self.plan.step(self.guard.history.position(step))  # known to all ranks before anything is sent
        work = self._prepare(planned, batches)
        self.probe.armed = recorder.due(step)
        rate = self.config.optimizer.lr * rate_factor(self.config.schedule, self.engine.lr_scheduler.last_epoch)
        with self.monitor.watching(step):
            loss = self.engine.train_batch(work)
        if self.engine.was_step_applied():
            self.ema.update(step + 1)
        if self.rounds is not None:
            self.rounds.finished(planned.position)
        self._note(planned, loss, recorder)
        if recorder.due(step):
            self._record(step + 1, planned, rate, recorder)
        if self.monitor.due(step):
            readings = self.monitor.read()
            recorder.write(step + 1, readings.scalars().items())
            self.guard.raise_alarms(step + 1, alarms(readings.of_blocks, self.config.monitor))
        return StepResult(float(loss), self.engine.was_step_applied(), planned.samples)

    def _prepare(self, planned: PlannedStep, batches: list[Batch] | None) -> Iterator[tuple]:
        """Tells the engine the step's shape and size, and returns what its schedule asks this rank for."""
        streamed, companions = planned.counts(self.process.layout.data)
        count, preferred = streamed + companions, 0
        if self.config.preference is not None:
            preferred = streamed
            if self.reference is None:
                batches = self._refer_to_base(planned, batches, streamed)
            self._set_reference_point(planned, batches, streamed)
            batches = self._weigh(batches, streamed, companions, self.config.preference.sft_weight)
        if self.rounds is not None:
            preferred = streamed
            self.engine.module.loss.old = self.rounds.old_velocities(planned.position)
            batches = self._weigh(batches, streamed, companions, self.config.reward.data_weight)
        self.evaluator.set_shape(planned.shape, planned.micro)
        engine = self.engine
        engine.set_train_batch_size(engine.train_micro_batch_size_per_gpu() * count * engine.dp_world_size)
        return self.feed.stage(batches, planned.shape, planned.micro, count, preferred)

    def _refer_to_base(self, planned: PlannedStep, batches: list[Batch] | None, streamed: int) -> list[Batch] | None:
        """Measures the step's preference samples with the adapters off, and has them as their reference's losses."""
        own, module = None if batches is None else batches[:streamed], self.engine.module
        with adapters_off(module):
            self.evaluator.losses(own, planned.shape, planned.micro, streamed)
        if batches is None or not module.is_last:  # the other stages need none
            return batches
        measured = [batch._replace(reference=loss.cpu()) for batch, loss in zip(own, module.loss.recorded, strict=True)]
        return measured + batches[streamed:]

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

    @staticmethod
    def _weigh(
        batches: list[Batch] | None, streamed: int, companions: int, companion_weight: float
    ) -> list[Batch] | None:
        """Weighs the micro-batches so that the step's loss is L + λ·ℓ(companions).

        DeepSpeed averages over all micro-batches; of both kinds the mean is wanted.
        """
        if batches is None:
            return None
        count = streamed + companions
        weights = [count / streamed] * streamed + [companion_weight * count / max(companions, 1)] * companions
        return [batch._replace(weight=batch.weight * weight) for batch, weight in zip(batches, weights, strict=True)]

    def _note(self, planned: PlannedStep, loss: torch.Tensor, recorder: Recorder) -> None:
        """Hands the recorder what the finished step was and did."""
        if (kind := (planned.stream, planned.shape)) in self.expected:
            recorder.expect(self.expected[kind])
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
        """Writes the scalars that are due after `done` steps; ends a preference run that goes astray."""
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
        """Ends the run where a side's error has become much larger than under the reference."""
        section = self.config.preference
        remedies = {
            "better": "a smaller learning rate or a larger preference.sft_weight",
            "worse": "a smaller learning rate, fewer steps, or a larger preference.beta, which is satisfied sooner",
        }
        for stream, means in preferences.items():
            for side, remedy in remedies.items():
                limit = getattr(section, f"max_{side}_ratio")
                if means[f"{side}_ratio"] > limit:
                    self.guard.fail(
                        f"step {step}: {stream}: the {side} side's error is {means[f'{side}_loss']:.4g}, more than "
                        f"preference.max_{side}_ratio = {limit:g} × the reference's {means[f'{side}_reference']:.4g}; "
                        f"go on from an earlier checkpoint with {remedy}"
                    )

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
