"""What the monitor reads in any layout is what a plain model in one process has, in fp32."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from mugv_ds.config.operation_schema import MonitorSection
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Batch
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.guard.alarms import alarms
from mugv_ds.engine.monitor import OF_BLOCKS, BlockWatch, Monitor
from mugv_ds.engine.process import start_process
from mugv_ds.models.attention import sdpa
from mugv_ds.models.compile import compile_blocks
from mugv_ds.models.matrices import KINDS, kind_of
from mugv_ds.models.rope import patch_grid
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.parallel.ulysses import Ulysses
from tests.helpers.distributed import run_ranks
from tests.parallel.test_layouts import CHANNELS, GLOBAL_BATCH, SHAPE, config, global_batch, initial_model, perturb

TOKENS = 16  # sampled, of 47
# Layout and recompute level; sequence = 2 pads the 47 tokens.
CASES = {
    "dp1-sp1-pp1": ((1, 1, 1), "off"),
    "dp1-sp2-pp1": ((1, 2, 1), "off"),
    "dp1-sp1-pp2": ((1, 1, 2), "off"),
    "dp2-sp1-pp1": ((2, 1, 1), "off"),
    "dp1-sp2-pp1-full": ((1, 2, 1), "full"),
    "dp1-sp1-pp2-attention": ((1, 1, 2), "attention"),
    "dp2-sp1-pp1-selective": ((2, 1, 1), "selective"),
    "dp1-sp1-pp1-light": ((1, 1, 1), "light"),
}
LONG = {name for name, (_, recompute) in CASES.items() if recompute != "off"}


def settings(name: str, kind: str = "adamw") -> TrainConfig:
    made = config(*CASES[name])
    sections = {"monitor": MonitorSection(every=2, tokens=TOKENS)}
    return made.model_copy(update={**sections, "optimizer": made.optimizer.model_copy(update={"kind": kind})})


def watch(cases: list[tuple[TrainConfig, Path]]) -> None:
    """Takes three steps, of which the second is monitored; rank files hold what was read of it."""
    for made, out in cases:
        torch.set_num_threads(1)  # which are as many as a run's ranks take where they share two cores
        process = start_process(made)
        engine = build_engine(made, process, SHAPE, weights=perturb)
        module, micro = engine.module, made.data.micro_batch_size
        feed = Feed(module, process, made.data, CHANNELS)
        monitor = Monitor(made, process, module, engine.optimizer)
        begin, found = process.coordinates.data * (GLOBAL_BATCH // process.layout.data), None
        for step in range(3):
            parts = [
                Batch(*(t[i : i + micro] for t in global_batch(step))) for i in range(begin, begin + 2 * micro, micro)
            ]
            if module.set_shape(SHAPE, micro, process.device):
                engine.reset_activation_shape()
            with monitor.watching(step):
                assert all(bool(block._forward_hooks) == monitor.due(step) for block in module.blocks)
                engine.train_batch(feed.stage(parts, SHAPE, micro, len(parts)))
            assert not any(block._forward_hooks for block in module.blocks)
            if monitor.due(step):
                assert found is None
                readings = monitor.read()
                found = {"of_blocks": readings.of_blocks, "norms": readings.norms, "tags": list(readings.scalars())}
        torch.save(found, out / f"rank{process.rank}.pt")


def results_of(made: dict[str, TrainConfig], folder: Path) -> dict[str, list[dict]]:
    for world in (1, 2):
        these = []
        for name, of in made.items():
            if of.parallel.data * of.parallel.sequence * of.parallel.pipeline == world:
                (folder / name).mkdir()
                these.append((of, folder / name))
        run_ranks(world, watch, these)
    return {name: [torch.load(f, weights_only=True) for f in sorted((folder / name).iterdir())] for name in made}


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[str], list[dict]]:
    """What each rank read in a case; cases of one kind are started together, when the first is asked for."""
    found: dict[str, list[dict]] = {}

    def of(name: str) -> list[dict]:
        if name not in found:
            alike = [other for other in CASES if (other in LONG) == (name in LONG)]
            found.update(results_of({other: settings(other) for other in alike}, tmp_path_factory.mktemp("monitor")))
        return found[name]

    return of


@pytest.fixture(scope="module")
def plain() -> tuple:
    """The plain model before its second step, and the norms of that step by kind."""
    made = settings("dp1-sp1-pp1")
    section, model = made.optimizer, initial_model(made)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
    )
    for step in range(2):
        weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        batch = global_batch(step)
        prediction = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        optimizer.zero_grad()
        flow_loss(prediction, batch.target, batch.x_mask).mean().backward()
        optimizer.param_groups[0]["lr"] = section.lr * (step + 1) / made.schedule.warmup_steps
        optimizer.step()
    squares = {f"{what}/{kind}": 0.0 for what in ("gradient_norm", "update_norm") for kind in KINDS}
    for name, p in model.named_parameters():
        squares[f"gradient_norm/{kind_of(name)}"] += float(p.grad.double().square().sum())
        squares[f"update_norm/{kind_of(name)}"] += float((p.detach() - weights[name]).double().square().sum())
    model.load_state_dict(weights)
    return model, {name: math.sqrt(square) for name, square in squares.items()}


@torch.no_grad()
def read_plainly(model: torch.nn.Module, samples: slice) -> dict[str, list[float]]:
    """What there is to read of some samples of the second step, computed from whole tensors."""
    batch, softmaxed, found = global_batch(1), [], {name: [] for name in OF_BLOCKS}
    tokens = patch_grid(*SHAPE).tokens
    chosen = [i * tokens // TOKENS for i in range(TOKENS)]

    def attention(q, k, v):
        softmaxed[:] = [q, k]
        return sdpa(q, k, v)

    given = (batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
    frames = torch.arange(SHAPE[0] + 2).expand(GLOBAL_BATCH, -1)
    x, condition = model.embed(*(t[samples] for t in given), frames[samples], torch.arange(tokens))
    for block in model.blocks:
        x = block(x, condition, attention)
        energy = x.double().square().sum()
        found["activation"].append(x.abs().max().item())
        found["channel_share"].append((x.double().square().sum(dim=(0, 1)).max() / energy).item())
        found["mean_share"].append((tokens * x.double().mean(dim=1).square().sum() / energy).item())
        q, k = (of[0, chosen].double() for of in softmaxed)
        found["logit"].append(max((q[:, h] @ k[:, h].T).max().item() for h in range(q.shape[1])) / 72**0.5)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG else name for name in CASES]
)
def test_readings_equal_those_of_the_plain_model(name, plain, results):
    model, norms = plain
    data = CASES[name][0][0]
    half, part = GLOBAL_BATCH // data, GLOBAL_BATCH // (2 * data)
    of_replicas = [read_plainly(model, slice(rank * half, rank * half + part)) for rank in range(data)]
    for rank in results(name):
        assert rank["of_blocks"].keys() == set(OF_BLOCKS)
        for reading, of_blocks in rank["of_blocks"].items():
            largest = [max(values) for values in zip(*(of[reading] for of in of_replicas), strict=True)]
            torch.testing.assert_close(of_blocks, largest, rtol=2e-5, atol=1e-6)
        assert rank["norms"].keys() == norms.keys()
        assert rank["norms"] == pytest.approx(norms, rel=2e-4)


def test_tags_name_block_and_kind(results):
    (rank,) = results("dp1-sp1-pp1")
    assert {"monitor/activation/block_00", "monitor/logit/block_01", "monitor/update_norm/attention"} <= {*rank["tags"]}


def test_compiled_blocks_are_not_compiled_again_and_give_the_same_bits():
    counter, model, batch = CompileCounterWithBackend("eager"), initial_model(settings("dp1-sp1-pp1")), global_batch(1)
    ulysses = Ulysses(None, 1, 0, sdpa)
    ulysses.tokens = patch_grid(*SHAPE).tokens
    watch = BlockWatch(dict(enumerate(model.blocks)), len(model.blocks), ulysses, tokens=TOKENS)

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(batch.x, batch.timestep, batch.text, batch.text_mask).square().mean().backward()
        return model.blocks[0].attn.qkv.weight.grad.clone()

    torch._dynamo.reset()
    limits = {"recompile_limit": 8, "accumulated_recompile_limit": 256}  # PyTorch's own, which are restored
    with torch._dynamo.config.patch(**limits), patch("torch.compile", partial(torch.compile, backend=counter)):
        compile_blocks(list(model.blocks), 1)
        before, compiled = gradient(), counter.frame_count
        with watch.on():
            watched = gradient()
        after = gradient()
    torch._dynamo.reset()
    assert counter.frame_count == compiled > 0
    assert torch.equal(before, watched) and torch.equal(before, after)
    assert watch.rows().isfinite().all()


@pytest.mark.long
def test_updates_of_muon_are_what_it_does_to_the_weights(tmp_path):
    """Whatever the layout: its matrices are moved by their own rate, and all kinds are moved."""
    names = ("dp1-sp1-pp1", "dp2-sp1-pp1")
    found = results_of({name: settings(name, "muon") for name in names}, tmp_path)
    (one,), (two, _) = (found[name] for name in names)
    assert one["norms"] == pytest.approx(two["norms"], rel=1e-3)
    assert {f"update_norm/{kind}" for kind in KINDS} <= one["norms"].keys()


def test_an_alarm_names_the_worst_block_and_its_bound():
    readings = {
        "activation": [1.0, 9.0],
        "channel_share": [0.5, 0.5],
        "mean_share": [0.97, 0.99],
        "logit": [math.nan, 200.0],
    }
    found = list(alarms(readings, MonitorSection(max_activation=8.0)))
    assert [(a.monitor, a.block, a.blocks, a.key) for a in found] == [
        ("activation", 1, 1, "monitor.max_activation"),
        ("mean_share", 1, 2, "monitor.max_mean_share"),
        ("logit", 0, 2, "monitor.max_logit"),
    ]
    assert str(found[1]) == (
        "share of the token mean in the residual stream's energy is 0.99 in block 1, above "
        "monitor.max_mean_share = 0.95, and so are 1 more blocks"
    )
