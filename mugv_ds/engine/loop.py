"""The training loop, one for every layout."""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.deepspeed import gradient_accumulation
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.buckets import Order
from mugv_ds.data.loader import loader
from mugv_ds.data.manifest import Index
from mugv_ds.engine.build import Process
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.evaluate import sweep
from mugv_ds.engine.feed import Batch, Feed, FlowSamples
from mugv_ds.engine.guard import Ahead, GoBack, Guard, Taken
from mugv_ds.engine.metrics import OptimizerProbe, Recorder, peak_tflops
from mugv_ds.engine.preview import Previews
from mugv_ds.engine.quarantine import Reading, Replacing
from mugv_ds.models.flops import train_flops
from mugv_ds.models.rope import patch_grid

State = dict[str, Any]


class Checkpoints(Protocol):
    """Where the loop saves; see `checkpoint.store.Store`. All ranks call each method together."""

    state: State  # what was saved with the checkpoint that was restored; empty after a fresh start

    def save(self, step: int, state: State) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...

    def restore(self, before: int) -> int: ...


class Trainer:
    """Runs optimizer steps over the samples of a manifest.

    Args:
        config: the run. process: this process. engine: see `build_engine`.
        train: the training manifest. validation: the held-out one, or None.
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
        train: Index,
        validation: Index | None,
        ema: PowerEma,
        store: Checkpoints,
        previews: Previews | None = None,
    ) -> None:
        self.config, self.process, self.engine = config, process, engine
        self.ema, self.store, self.previews = ema, store, previews
        self.dit = config.model.dit()
        self.accumulation = gradient_accumulation(config, process.layout.data)
        self.order = Order(train.shapes(), config.data.global_batch_size, config.data.seed)
        self.train, self.validation = train, validation
        self.feed = Feed(engine.module, process, config.data, self.dit.caption_channels)
        self.samples = FlowSamples(train, config.data, config.flow, self.dit.caption_channels)
        parameters = sum(p.numel() for p in engine.module.parameters())
        self.probe = OptimizerProbe(engine.basic_optimizer, parameters, process.layout.replicas)
        self.guard = Guard(config, process, engine, self._explain)
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
        while True:
            try:
                stopped = self._run_from(start)
            except GoBack as cause:
                # One that is saved on schedule, so that a run that was stopped in between goes back as far.
                every = max(self.config.checkpoint.save_every, 1)
                start = self.store.restore(before=cause.before // every * every + 1)
                self.guard.gone_back(cause, start, self.store.state)
            else:
                self.store.wait()
                self.guard.close()
                return stopped

    def _run_from(self, start: int) -> bool:
        logging, steps = self.config.logging, self.config.schedule.steps
        recorder = Recorder(
            logging,
            rank=self.process.rank,
            world_size=self.process.layout.world_size,
            start=start,
            steps=steps,
            peak=peak_tflops(logging, self.process.device),
        )
        position = self.guard.history.position(start)
        with closing(recorder), closing(self._readings(position, position + steps - start)) as readings:
            step, taken = start, None
            while True:
                batches, ahead = self._read(readings if step < steps else None)
                stop = self.guard.boundary(step, taken, ahead)
                self.store.poll()
                save_every = self.config.checkpoint.save_every
                if taken and (self._due(step, save_every) or (stop and save_every)):
                    with recorder.excluded():
                        self.store.save(step, self.guard.state())
                if stop and step < steps:
                    return True
                if self._due(step, logging.eval_every or steps) if taken else step < steps:
                    self._validate(recorder, step)
                # Also where the run goes on from: TensorBoard drops what was written at that step.
                if self.previews is not None and step and self._due(step, self.config.preview.every):
                    with recorder.excluded():
                        self.previews.write(step, recorder, partial(self.guard.alive, step))
                if step >= steps:
                    return False
                taken = self._train_step(step, batches, recorder)
                step += 1

    def _due(self, done: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done`; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.config.schedule.steps)

    def _readings(self, first: int, stop: int) -> Iterator[list[Reading]]:
        """What this rank reads for each data step of [first, stop): its micro-batches; none where it reads nothing."""
        if not self.feed.reads:
            return
        steps = loader(
            self.order,
            start_step=first,
            stop_step=stop,
            data_rank=self.process.place.data,
            data_ranks=self.process.layout.data,
            micro=self.config.data.micro_batch_size,
            make=Replacing(self.samples),
            sample_id=lambda row: self.train.row(row).sample_id,
            num_workers=self.config.data.num_workers,
        )
        with closing(steps):
            for _, readings in steps:
                yield readings

    def _read(self, readings: Iterator[list[Reading]] | None) -> tuple[list[Batch] | None, Ahead]:
        """The next step's micro-batches, as far as this rank reads, and what the guard has to know of them."""
        if readings is None or not self.feed.reads:
            return None, Ahead()
        begin = time.perf_counter()
        try:
            read = next(readings)
        except Exception as failure:
            return None, Ahead(failure=failure)
        self.waited += time.perf_counter() - begin
        # The last stage reads the same samples as the first.
        reports = self.feed.module.is_first
        return [batch for batch, _ in read], Ahead([bad for _, found in read if reports for bad in found])

    def _train_step(self, step: int, batches: list[Batch] | None, recorder: Recorder) -> Taken:
        # Known to every rank before anything is sent.
        shape = self.order.step(self.guard.history.position(step)).shape
        self._set_shape(shape)
        self.probe.armed = recorder.due(step)
        rate = self.engine.get_lr()[0]
        loss = self.engine.train_batch(self.feed.stage(batches, shape, self.accumulation))
        if self.engine.was_step_applied():
            self.ema.update(step + 1)
        tokens, samples = patch_grid(*shape).tokens, self.config.data.global_batch_size
        sizes = self.dit, tokens, self.config.data.max_text_tokens
        recorder.step(
            loss,
            self.engine.get_additional_losses(),
            samples=samples,
            tokens=samples * tokens,
            model_flops=samples * train_flops(*sizes),
            hardware_flops=samples * train_flops(*sizes, self.config.parallel.activation_checkpointing),
        )
        if recorder.due(step):
            recorder.record(
                step + 1,
                rate=rate,
                norm=float(self.engine.get_global_grad_norm()),
                probe=self.probe,
                waited=self.waited,
            )
            counters = ("skips", "rollbacks", "bad")
            recorder.write(step + 1, [(f"guard/{name}", getattr(self.guard.history, name)) for name in counters])
            self.waited = 0.0
            self.engine.timers("train_batch").reset()  # DeepSpeed appends to it every step and never clears it
        return Taken(float(loss), self.engine.was_step_applied())

    def _explain(self, position: int) -> State:
        """The samples of a data step and their timesteps, for the record of what went wrong."""
        step = self.order.step(position)
        picks = list(zip(step.rows, step.visits, strict=True))
        return {
            "samples": [self.train.row(row).sample_id for row, _ in picks],
            "timesteps": [round(self.samples.time(row, visit), 3) for row, visit in picks],
        }

    def _set_shape(self, shape: tuple[int, int, int]) -> None:
        if self.engine.module.set_shape(shape, self.process.device):
            self.engine.reset_activation_shape()

    def _validate(self, recorder: Recorder, step: int) -> None:
        """Writes the mean flow loss of the held-out samples, each with its own fixed timestep and noise."""
        if self.validation is None:
            return
        with recorder.excluded():
            loss = self.validation_loss(self.validation, step)
        recorder.write(step, [("validation/loss", loss)])
        recorder.say(f"step {step}: validation loss {loss:.5f}")

    def validation_loss(self, index: Index, step: int) -> float:
        """Mean flow loss over all samples of a manifest: no caption dropped, no frame given clean, noise of visit 0.

        It does not depend on the layout: fillers that complete a micro-batch have weight zero.
        """
        plain = self.config.flow.model_copy(update={"caption_drop": 0.0, "first_frame_share": 0.0})
        samples = FlowSamples(index, self.config.data, plain, self.dit.caption_channels)
        micro, layout = self.config.data.micro_batch_size, self.process.layout
        total = torch.zeros((), dtype=torch.float64)
        for shape, picks in sweep(index.shapes(), micro * layout.data):
            self.guard.alive(step)
            self._set_shape(shape)
            begin = self.process.place.data * micro
            batches = (samples(chunk[begin : begin + micro]) for chunk in picks)
            stage = self.feed.stage(batches, shape, len(picks))
            mean = self.engine.eval_batch(stage, num_micro_batches=len(picks))
            total += mean.item() * len(picks) * micro * layout.data
        return total.item() / sum(1 for shape in index.shapes() if shape.any())
