"""The training loop of the VideoVAE."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.clips import ClipBatch, ClipData
from mugv_ds.engine.guard.guard import Guard, StepResult
from mugv_ds.engine.metrics import OptimizerProbe, Recorder
from mugv_ds.engine.process import Process
from mugv_ds.engine.steps import Checkpoints, StepLoop
from mugv_ds.engine.vae.build import VaeEngines
from mugv_ds.engine.vae.objective import TERMS, Outcome, StepDraws
from mugv_ds.engine.vae.preview import VaePreviews
from mugv_ds.engine.vae.validate import VaeValidation


def term_means(sums: Mapping[str, Mapping[str, Tensor]]) -> dict[str, float]:
    """Means of the loss's terms over the steps that had them, of sums by stream, and of rec by stream."""
    means = {}
    for name in TERMS[1:]:
        counted = [(float(of[name]), float(of[f"{name}_count"])) for of in sums.values() if name in of]
        if count := sum(count for _, count in counted):
            means[f"train/{name}"] = sum(total for total, _ in counted) / count
    means |= {
        f"rec/{stream}": float(of["rec"]) / float(of["rec_count"]) for stream, of in sums.items() if of["rec_count"]
    }
    return means


class VaeTrainer(StepLoop):
    """Runs optimizer steps of the VideoVAE and, with a GAN, of its discriminator.

    Args:
        config: the run. process: this process. engines: see `build_vae_engines`. data: of the run.
        store: saves when a checkpoint is due, and holds the state that the run goes on from.
        previews: writes reconstructions when they are due; None: there are none.
    """

    means = staticmethod(term_means)

    def __init__(
        self,
        config: VaeTrainConfig,
        process: Process,
        engines: VaeEngines,
        *,
        data: ClipData,
        store: Checkpoints,
        previews: VaePreviews | None = None,
    ) -> None:
        shown = [(config.preview.every, previews)]
        super().__init__(config, process, plan=data.plan, readers=data.readers, store=store, shown=shown)
        self.engines, self.vae = engines, engines.vae.module.vae
        self.validation = data.held_out and VaeValidation(config, process, self.vae, engines.perceptual, data.held_out)
        probed = engines.vae.module
        self.probe = OptimizerProbe(
            engines.vae.optimizer, sum(p.numel() for p in probed.parameters()), process.layout.replicas
        )
        timed = self.vae.temporal_vae.encoder.conv_in
        self.guard = Guard(config, process, timed, self._weights, self._explain, self._items)

    def _weights(self) -> list[Tensor]:
        """All parameters, which must be equal on all ranks."""
        return [p for engine in (self.engines.vae, *self.engines.others.values()) for p in engine.module.parameters()]

    def _train_step(self, step: int, batches: list[ClipBatch], recorder: Recorder) -> StepResult:
        planned = self.plan.step(self.guard.history.position(step))
        draws = StepDraws.of(self.config, step, planned.position)
        gan = self.config.gan
        learns = gan is None or step >= gan.warmup_steps  # otherwise the discriminator alone does
        self.probe.armed = learns and recorder.due(step)
        rate = self.engines.vae.get_lr()[0]
        outcomes = [self._micro_step(batch, draws, learns) for batch in batches]
        trained = [*([self.engines.vae] if learns else []), *self.engines.others.values()]
        applied = all(engine.was_step_applied() for engine in trained)
        means = self._mean_terms(outcomes)
        rec = means["rec"]
        terms = {name: value for name, value in means.items() if name != "loss"}
        terms |= {f"{name}_count": torch.ones_like(rec) for name in terms}
        frames = planned.samples * planned.shape[0]
        recorder.step(means["loss"], terms, stream=planned.stream, samples=planned.samples, frames=frames)
        if recorder.due(step):
            self._record(step + 1, rate, recorder)
        # The guard watches rec, which is positive; the loss with its logarithm may have any sign.
        return StepResult(float(rec), applied, planned.samples)

    def _micro_step(self, batch: ClipBatch, draws: StepDraws, learns: bool) -> dict[str, Tensor]:
        """Runs a micro-batch through the engines, which update the weights after the step's last; returns its terms."""
        device, (engine, adversary) = self.process.device, (self.engines.vae, self.engines.discriminator)
        given = (batch.pixels(device), batch.noise.to(device), batch.weight.to(device), draws)
        if learns:
            outcome: Outcome = engine(*given)
            engine.backward(outcome.loss)
            engine.step()
        else:
            with torch.no_grad():
                outcome = engine.module(*given)
        terms = outcome.terms
        if adversary is not None:
            loss = adversary(outcome.target, outcome.video, given[2])
            adversary.backward(loss)
            adversary.step()
            terms = terms | {"discriminator": loss.detach()}
        return terms

    def _mean_terms(self, outcomes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Means over micro-batches and ranks, on the host: one exchange, which waits for the device."""
        names = [name for name in TERMS if name in outcomes[0]]
        values = torch.stack([torch.stack([terms[name].float() for name in names]) for terms in outcomes]).mean(dim=0)
        dist.all_reduce(values)
        return dict(zip(names, (values / self.process.layout.data).unbind(), strict=True))

    def _record(self, done: int, rate: float, recorder: Recorder) -> None:
        """Writes the scalars that are due after `done` steps."""
        norm = self.engines.vae.get_global_grad_norm()
        recorder.record(done, rate=rate, norm=float(norm or 0.0), probe=self.probe, waited=self.waited)
        counters = ("skips", "rollbacks", "bad")
        recorder.write(done, [(f"guard/{name}", getattr(self.guard.history, name)) for name in counters])
        self.waited = 0.0

    def _explain(self, position: int) -> dict[str, Any]:
        """The samples of a data step, for the record of what went wrong."""
        refs = self.plan.step(position).refs
        return {"samples": [self.readers.readers[ref.source].name(ref.item) for ref in refs]}

    def _validate(self, recorder: Recorder, step: int) -> None:
        """Writes what the held-out clips give."""
        if self.validation is None:
            return
        with recorder.excluded():
            results = self.validation.run(lambda: self.guard.alive(step))
        recorder.write(step, [(f"validation/{name}", value) for name, value in results.items()])
        shown = [f"PSNR {results['psnr']:.2f} dB", f"SSIM {results['ssim']:.4f}"]
        if "lpips" in results:
            shown.append(f"LPIPS {results['lpips']:.4f}")
        recorder.say(f"step {step}: held-out {', '.join(shown)}")
