"""The training loop, one for every layout."""

from collections.abc import Iterator
from typing import Protocol

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
from mugv_ds.engine.metrics import OptimizerProbe, Recorder, peak_tflops
from mugv_ds.engine.schedule import rate_factor
from mugv_ds.models.flops import train_flops
from mugv_ds.models.rope import patch_grid


class Checkpoints(Protocol):
    """Where the loop saves; see `checkpoint.store.Store`. All ranks call each method together."""

    def save(self, step: int) -> None: ...

    def poll(self) -> None: ...

    def wait(self) -> None: ...


class Trainer:
    """Runs optimizer steps over the samples of a manifest.

    Args:
        config: the run. process: this process. engine: see `build_engine`.
        train: the training manifest. validation: the held-out one, or None.
        ema: averages of the weights, which take in those of every step that was applied.
        store: saves when a checkpoint is due.
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
    ) -> None:
        self.config, self.process, self.engine = config, process, engine
        self.ema, self.store = ema, store
        self.dit = config.model.dit()
        self.accumulation = gradient_accumulation(config, process.layout.data)
        self.order = Order(train.shapes(), config.data.global_batch_size, config.data.seed)
        self.validation = validation
        self.feed = Feed(engine.module, process, config.data, self.dit.caption_channels)
        self.samples = FlowSamples(train, config.data, config.flow, self.dit.caption_channels)
        parameters = sum(p.numel() for p in engine.module.parameters())
        self.probe = OptimizerProbe(engine.basic_optimizer, parameters, process.layout.replicas)

    def run(self, start: int) -> None:
        """Trains from step `start` to the config's last, with records, validations and checkpoints as it says.

        Raises:
            SampleError: a sample cannot be used. CheckpointError: a checkpoint could not be saved.
        """
        logging, steps = self.config.logging, self.config.schedule.steps
        recorder = Recorder(
            logging,
            rank=self.process.rank,
            world_size=self.process.layout.world_size,
            start=start,
            steps=steps,
            peak=peak_tflops(logging, self.process.device),
        )
        batches = self._batches(start, steps)
        if start < steps:
            self._validate(recorder, start)
        for step in range(start, steps):
            self._train_step(step, batches, recorder)
            self.store.poll()
            done = step + 1
            if self._due(done, self.config.checkpoint.save_every):
                with recorder.excluded():
                    self.store.save(done)
            if self._due(done, logging.eval_every or steps):
                self._validate(recorder, done)
        self.store.wait()
        recorder.close()

    def _due(self, done: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after `done`; 0 is never."""
        return every > 0 and (done % every == 0 or done == self.config.schedule.steps)

    def _batches(self, start: int, stop: int) -> Iterator[Batch] | None:
        """The micro-batches that this rank reads, in order, from step `start` to `stop`; None where it reads none."""
        if not self.feed.reads:
            return None
        steps = loader(
            self.order,
            start_step=start,
            stop_step=stop,
            data_rank=self.process.place.data,
            data_ranks=self.process.layout.data,
            micro=self.config.data.micro_batch_size,
            make=self.samples,
            num_workers=self.config.data.num_workers,
        )
        return (batch for _, micro_batches in steps for batch in micro_batches)

    def _train_step(self, step: int, batches: Iterator[Batch] | None, recorder: Recorder) -> None:
        shape = self.order.step(step).shape  # known to every rank before anything is sent
        self._set_shape(shape)
        self.probe.armed = recorder.due(step)
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
                rate=self.config.optimizer.lr * rate_factor(self.config.schedule, step),
                norm=float(self.engine.get_global_grad_norm()),
                probe=self.probe,
                waited=self.feed.waited,
            )
            self.feed.waited = 0.0
            self.engine.timers("train_batch").reset()  # DeepSpeed appends to it every step and never clears it

    def _set_shape(self, shape: tuple[int, int, int]) -> None:
        if self.engine.module.set_shape(shape, self.process.device):
            self.engine.reset_activation_shape()

    def _validate(self, recorder: Recorder, step: int) -> None:
        """Writes the mean flow loss of the held-out samples, each with its own fixed timestep and noise."""
        if self.validation is None:
            return
        waited = self.feed.waited
        with recorder.excluded():
            loss = self.validation_loss(self.validation)
        self.feed.waited = waited
        recorder.write(step, [("validation/loss", loss)])
        recorder.say(f"step {step}: validation loss {loss:.5f}")

    def validation_loss(self, index: Index) -> float:
        """Mean flow loss over all samples of a manifest: no caption dropped, no frame given clean, noise of visit 0.

        It does not depend on the layout: fillers that complete a micro-batch have weight zero.
        """
        plain = self.config.flow.model_copy(update={"caption_drop": 0.0, "first_frame_share": 0.0})
        samples = FlowSamples(index, self.config.data, plain, self.dit.caption_channels)
        micro, layout = self.config.data.micro_batch_size, self.process.layout
        total = torch.zeros((), dtype=torch.float64)
        for shape, picks in sweep(index.shapes(), micro * layout.data):
            self._set_shape(shape)
            begin = self.process.place.data * micro
            batches = (samples(chunk[begin : begin + micro]) for chunk in picks)
            stage = self.feed.stage(batches, shape, len(picks))
            mean = self.engine.eval_batch(stage, num_micro_batches=len(picks))
            total += mean.item() * len(picks) * micro * layout.data
        return total.item() / sum(1 for shape in index.shapes() if shape.any())
