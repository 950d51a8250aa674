"""Saving and resuming through real engines, in one layout and across them."""

from pathlib import Path

import pytest
import torch

from mugv_ds.checkpoint.reader import open_checkpoint
from mugv_ds.checkpoint.store import Store
from mugv_ds.config import TrainConfig
from mugv_ds.config.errors import CheckpointError, PeerError
from mugv_ds.data.readers import Batch
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.ema import PowerEma
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.process import Process, start_process
from mugv_ds.models.matrices import chunks_of
from mugv_ds.weights.published import export
from tests.helpers.distributed import run_ranks
from tests.parallel.test_layouts import CHANNELS, GLOBAL_BATCH, SHAPE, global_batch, perturb
from tests.parallel.test_layouts import config as layout_config

DATA = {"the sample ids": "0" * 64}  # what the order of the samples is a function of
HALF, STEPS = 3, 6
AVERAGES = ("ema_0.050", "ema_0.100")
KINDS = ("weight", "exp_avg", "exp_avg_sq", *AVERAGES)

VARIANTS = {
    "fp32": {},
    "bf16": {"model": {"precision": "bf16"}},
    "muon": {"optimizer": {"kind": "muon", "weight_decay": 0.1, "adamw_lr": 5e-4}},
    "width": {"optimizer": {"kind": "muon", "weight_decay": 0.1, "width_reference": 72}},  # of a model twice as wide
    "lora": {"lora": {"rank": 3}, "model": {"precision": "bf16"}},
}
RESHAPED = ("fp32", "bf16", "lora", "muon", "width")


def settings(folder: Path, layout: tuple[int, int, int], variant: str = "fp32", **checkpoint) -> TrainConfig:
    values = layout_config(layout).model_dump()
    for name, section in (VARIANTS[variant] | {"checkpoint": {"dir": str(folder), **checkpoint}}).items():
        values[name] = (values[name] or {}) | section
    return TrainConfig.model_validate(values)


class Run:
    """An engine that trains on the global batches, averages of its weights, and its store."""

    def __init__(self, config: TrainConfig, process: Process, data: dict = DATA) -> None:
        self.process, self.engine = process, build_engine(config, process, SHAPE, weights=perturb)
        self.store = Store(config, process, self.engine, data)
        self.ema = PowerEma([fragment.tensors["weight"] for fragment in self.store.fragments], config.ema.sigma_rel)
        self.store.extra_kinds = self.ema.averages
        self.feed, self.micro = Feed(self.engine.module, process, config.data, CHANNELS), config.data.micro_batch_size
        self.losses: list[float] = []

    def train(self, start: int, stop: int) -> None:
        module = self.engine.module
        for step in range(start, stop):
            begin = self.process.coordinates.data * (GLOBAL_BATCH // self.process.layout.data)
            whole = global_batch(step)
            parts = [Batch(*(t[i : i + self.micro] for t in whole)) for i in (begin, begin + self.micro)]
            if module.set_shape(SHAPE, self.micro, self.process.device):
                self.engine.reset_activation_shape()
            self.losses.append(self.engine.train_batch(self.feed.stage(parts, SHAPE, self.micro, len(parts))).item())
            self.ema.update(step + 1)

    def weights(self) -> dict[str, torch.Tensor]:
        """What the model of this stage computes with."""
        layers = self.engine.module.named_layers()
        return {prefix + name: p.detach() for prefix, layer in layers for name, p in layer.named_parameters()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest checkpoint in a folder, whole."""
    with open_checkpoint(folder) as saved:
        assert set(saved.manifest.kinds) == set(KINDS)
        is_muon = saved.manifest.config["optimizer"]["kind"] == "muon"
        return {
            f"{name}/{kind}": saved.read(name, kind)
            for name in saved.names()
            for kind in KINDS
            if not (is_muon and kind == "exp_avg_sq" and chunks_of(name))
        }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def save_and_go_on(root: Path) -> None:
    """(2, 1, 1): a straight run; one that saves half-way, in the background; one that goes on from there."""
    for variant in VARIANTS:
        process = start_process(settings(root, (2, 1, 1), variant))
        straight = Run(settings(root / f"{variant}-straight", (2, 1, 1), variant), process)
        assert straight.store.restore() == 0
        straight.train(0, STEPS)
        straight.store.save(STEPS)
        straight.store.close()

        first = Run(settings(root / variant, (2, 1, 1), variant), process)
        assert first.store.restore() == 0
        first.train(0, HALF)
        first.store.save(HALF, {"seen": [1, 2]})
        first.train(HALF, HALF + 1)  # while it is being written
        first.store.close()

        second = Run(settings(root / variant, (2, 1, 1), variant), process)
        assert second.store.restore() == HALF and second.store.state == {"seen": [1, 2]}
        second.store.close()
        resumed = Store(settings(root / f"{variant}-resumed", (2, 1, 1), variant), process, second.engine, DATA)
        resumed.extra_kinds = second.ema.averages
        second.train(HALF, STEPS)
        resumed.save(STEPS)
        resumed.close()
        assert straight.losses[HALF:] == second.losses
        torch.save(straight.losses, root / f"{variant}-losses.pt")


def carry_over(root: Path, out: Path, layout: tuple[int, int, int]) -> None:
    """Restores at another layout, saves the same step again elsewhere, and trains on."""
    for variant in RESHAPED:
        process = start_process(settings(root, layout, variant))
        run = Run(settings(root / variant, layout, variant), process)
        assert run.store.restore() == HALF
        run.store.close()
        again = Store(settings(out / variant, layout, variant, background=False), process, run.engine, DATA)
        again.extra_kinds = run.ema.averages
        again.save(HALF)
        again.close()
        torch.save(run.weights(), out / f"{variant}-weights-{process.rank}.pt")
        run.train(HALF, STEPS)
        if process.rank == 0:
            torch.save(run.losses, out / f"{variant}-losses.pt")
        restore_with_another_average(settings(out / variant, layout, variant), run)
    for there, here in (("fp32", "muon"), ("muon", "fp32")):
        run = Run(settings(root / there, layout, here), process)
        with pytest.raises(
            (CheckpointError, PeerError),
            match=r"of a run with optimizer\.kind = .*, and name this one as checkpoint\.init",
        ):
            run.store.restore()
        run.store.close()


def restore_with_another_average(config: TrainConfig, run: Run) -> None:
    """An average that the checkpoint does not hold begins as its weights."""
    store = Store(config, run.process, run.engine, DATA)
    weights = [fragment.tensors["weight"] for fragment in store.fragments]
    store.extra_kinds = PowerEma(weights, [0.2]).averages
    later = [weight.clone() for weight in weights]
    assert store.restore() == HALF
    store.close()
    assert all(map(torch.equal, store.extra_kinds["ema_0.200"], weights))
    assert not all(map(torch.equal, later, weights)), "they must differ from what the averages were before"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Checkpoints that ranks (2, 1, 1) saved; then (1, 2, 2) from those; then (1, 1, 1) from these."""
    root = tmp_path_factory.mktemp("store")
    (root / "four").mkdir()
    (root / "one").mkdir()
    run_ranks(2, save_and_go_on, root)
    run_ranks(4, carry_over, root, root / "four", (1, 2, 2))
    run_ranks(1, carry_over, root / "four", root / "one", (1, 1, 1))
    return root


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_resumed_run_is_the_straight_one_bitwise(root, variant):
    straight, resumed = (tensors(root / f"{variant}-{end}") for end in ("straight", "resumed"))
    assert same(straight, resumed)
    half_way = tensors(root / variant)
    for kind in KINDS:
        moved = [not torch.equal(straight[key], half_way[key]) for key in straight if key.endswith(f"/{kind}")]
        assert any(moved), f"the steps after the checkpoint must change {kind}"


@pytest.mark.parametrize("variant", RESHAPED)
@pytest.mark.parametrize("place", ["four", "one"])
def test_another_layout_has_the_same_state_and_goes_on(root, place, variant):
    saved = tensors(root / variant)
    assert same(saved, tensors(root / place / variant))
    for kind in AVERAGES:
        differs = [
            not torch.equal(saved[key], saved[f"{key.rpartition('/')[0]}/weight"]) for key in saved if kind in key
        ]
        assert any(differs), "an average that is the weights would also be right if it were not restored"
    expected = torch.load(root / f"{variant}-losses.pt", weights_only=True)[HALF:]
    found = torch.load(root / place / f"{variant}-losses.pt", weights_only=True)
    assert found == pytest.approx(expected, rel=1e-5 if variant in ("fp32", "muon", "width") else 2e-2)


@pytest.mark.parametrize("variant", ["fp32", "bf16"])
def test_exported_weights_are_those_of_the_engine_bitwise(root, tmp_path, variant):
    engine = {}
    for rank in range(4):
        engine |= torch.load(root / "four" / f"{variant}-weights-{rank}.pt", weights_only=True)
    exported = torch.load(export(root / "four" / variant, tmp_path, layout="pt"), weights_only=True)
    assert same(exported, engine)
    assert {value.dtype for value in exported.values()} == {torch.float32 if variant == "fp32" else torch.bfloat16}


def test_a_checkpoint_of_adapters_holds_nothing_else(root):
    """They and their moments and averages, cut up at any place, are what is restored under every layout."""
    saved = tensors(root / "lora")
    names = {key.rpartition("/")[0] for key in saved}
    assert len(names) == 2 * 7 * 2 and all(name.endswith((".lora_A.weight", ".lora_B.weight")) for name in names)
    size, whole = (sum(f.stat().st_size for f in (root / of).rglob("*.safetensors")) for of in ("lora", "fp32"))
    assert size < whole / 10
