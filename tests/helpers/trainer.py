"""A trainer without checkpoints, in the processes of a test."""

from pathlib import Path

import torch

from mugv_ds.checkpoint.manifest import StartWeights
from mugv_ds.config import load_config
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.run_data import RunData
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.evaluate.reference import ReferenceModel
from mugv_ds.engine.loop import Trainer
from mugv_ds.engine.metrics import Recorder
from mugv_ds.engine.process import start_process
from mugv_ds.models.flops import SampleCost
from mugv_ds.weights.start import FrozenWeights, put_start, start_digest
from tests.helpers.distributed import whole_state
from tests.parallel.test_layouts import perturb


class NoStore:
    def __init__(self) -> None:
        self.state = {}


class TestTrainer(Trainer):
    """Takes steps one by one, from the config's weights or from initial ones that were moved off their zeros."""

    __test__ = False

    def __init__(self, config: TrainConfig) -> None:
        process = start_process(config)
        data = RunData(config, SampleCost.of(config), process.layout.data, process.host.first_then_all)
        init = config.checkpoint.init_from
        start = StartWeights(path=init, digest=start_digest(init, config))
        weights = put_start(start, config, fresh=True) if init else perturb
        engine = build_engine(config, process, data.typical_shape, weights=weights)
        reference = None
        self.references = []
        if config.preference is not None and config.lora is None:
            reference = ReferenceModel(config, process, engine, data, FrozenWeights(start, config), held=True)
            reference.open_files()
            self.references = reference.complete(0, config.schedule.steps)
        super().__init__(
            config,
            process,
            engine,
            data=data,
            reference=reference,
            ema=PowerEma([], ()),
            store=NoStore(),
        )
        if reference is not None:
            self.readers = data.readers_with(self.references)
        self.recorder = Recorder(
            config.logging, rank=process.rank, world_size=process.layout.world_size, start=0, steps=10**6, peak=None
        )

    def train(self, steps: int) -> list[float]:
        """The losses of the first so many steps."""
        readings = self._readings(0, steps)
        losses = []
        for step in range(steps):
            batches, ahead = self._read(readings)
            assert ahead.failure is None, ahead.failure
            losses.append(self._train_step(step, batches, self.recorder).loss)
        return losses

    def first_gradients(self, beta1: float) -> dict[str, torch.Tensor]:
        """This stage's gradients of the first step: its first moment is (1 − β1) times the reduced gradient."""
        return {name: moment / (1 - beta1) for name, moment in whole_state(self.engine, "exp_avg").items()}


def run(path: Path, out: Path, steps: int) -> TestTrainer:
    """Trains the config at `path`; every rank writes losses, and the gradients of one step, to `out`."""
    config = load_config(path)
    trainer = TestTrainer(config)
    losses = trainer.train(steps)
    gradients = trainer.first_gradients(config.optimizer.betas[0]) if steps == 1 else {}
    references = [torch.from_numpy(cells["loss"].copy()) for cells in trainer.references]
    out.mkdir(exist_ok=True)
    results = {"losses": losses, "gradients": gradients, "references": references}
    torch.save(results, out / f"rank{trainer.process.rank}.pt")
    return trainer
