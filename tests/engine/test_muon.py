"""Muon moves every matrix as a plain implementation on one process does, under every layout."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Batch
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.muon import assign, cost_of, orthogonalise
from mugv_ds.engine.process import start_process
from mugv_ds.models.matrices import chunks_of
from mugv_ds.objectives.flow import flow_loss
from tests.helpers.distributed import run_ranks, whole_state
from tests.parallel.test_layouts import CHANNELS, GLOBAL_BATCH, SHAPE, global_batch, initial_model, perturb
from tests.parallel.test_layouts import config as layout_config

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1)]
STEPS, LR, ADAMW_LR, DECAY, MOMENTUM, CLIPPING = 3, 2e-3, 1e-3, 0.1, 0.9, 0.5


def config(layout: tuple[int, int, int], **optimizer: object) -> TrainConfig:
    given = layout_config(layout).model_dump()
    given["optimizer"] |= {
        "kind": "muon", "lr": LR, "adamw_lr": ADAMW_LR, "weight_decay": DECAY, "muon_momentum": MOMENTUM,
        "gradient_clipping": CLIPPING, **optimizer,
    }  # fmt: skip
    given["schedule"]["warmup_steps"] = 0
    given["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 90_000}}
    return TrainConfig.model_validate(given)


def plain_newton_schulz(g: torch.Tensor) -> torch.Tensor:
    """The formula of Jordan et al. 2024, on a matrix that is no taller than wide."""
    x = g / (g.norm() + 1e-7)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x


def plain_updates(name: str, ahead: torch.Tensor, chunks: int) -> torch.Tensor:
    """The update of a whole parameter, chunk by chunk."""
    done = []
    for chunk in ahead.chunk(chunks):
        m, n = chunk.shape
        x = plain_newton_schulz(chunk) if m <= n else plain_newton_schulz(chunk.T).T
        done.append(0.2 * max(m, n) ** 0.5 * x)
    return torch.cat(done)


def reference(steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses, and the weights after so many steps, by a plain loop in one process."""
    settings = config((1, 1, 1))
    model = initial_model(settings)
    named = dict(model.named_parameters())
    matrices = {name for name in named if chunks_of(name)}
    others = [p for name, p in named.items() if name not in matrices]
    adamw = torch.optim.AdamW(others, lr=ADAMW_LR, betas=settings.optimizer.betas, eps=1e-6, weight_decay=DECAY)
    momenta = {name: torch.zeros_like(named[name]) for name in matrices}
    losses = []
    for step in range(steps):
        batch = global_batch(step)
        prediction = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        loss = flow_loss(prediction, batch.target, batch.x_mask).mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
        adamw.step()
        with torch.no_grad():
            for name in matrices:
                weight, gradient = named[name], named[name].grad
                momenta[name] = MOMENTUM * momenta[name] + (1 - MOMENTUM) * gradient
                ahead = (1 - MOMENTUM) * gradient + MOMENTUM * momenta[name]
                weight.mul_(1 - LR * DECAY).sub_(LR * plain_updates(name, ahead, chunks_of(name)))
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in named.items()}


def step_on(engine, process, settings: TrainConfig, step: int, spoil: bool = False) -> float:
    """Takes one step over the global batch; spoil: its gradient is not finite."""
    micro, module = settings.data.micro_batch_size, engine.module
    feed = Feed(module, process, settings.data, CHANNELS)
    whole = global_batch(step)
    if spoil:
        whole = whole._replace(target=whole.target * torch.nan)
    begin = process.coordinates.data * (GLOBAL_BATCH // process.layout.data)
    parts = [Batch(*(t[i : i + micro] for t in whole)) for i in range(begin, begin + 2 * micro, micro)]
    if module.set_shape(SHAPE, micro, process.device):
        engine.reset_activation_shape()
    return engine.train_batch(feed.stage(parts, SHAPE, micro, len(parts))).item()


def train(layouts: list[tuple[int, int, int]], out: Path) -> None:
    for layout in layouts:
        settings = config(layout)
        process = start_process(settings)
        engine = build_engine(settings, process, SHAPE, weights=perturb)
        losses = [step_on(engine, process, settings, step) for step in range(STEPS)]
        weights = whole_state(engine, "weight")
        before = {kind: whole_state(engine, kind) for kind in ("weight", "exp_avg")}
        step_on(engine, process, settings, STEPS, spoil=True)
        assert not engine.was_step_applied()
        for kind, values in before.items():
            after = whole_state(engine, kind)
            assert all(torch.equal(after[name], value) for name, value in values.items()), kind
        kept = sum(t.numel() for state in engine.basic_optimizer.state.values() for t in state.values() if t.dim())
        name = "dp{}-sp{}-pp{}".format(*layout)
        torch.save({"losses": losses, "weights": weights, "kept": kept}, out / f"{name}-{process.rank}.pt")
        dist.barrier()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("muon")
    for world in (1, 2, 4):
        run_ranks(world, train, [layout for layout in LAYOUTS if layout[0] * layout[1] * layout[2] == world], out)
    return out


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, torch.Tensor]]:
    return reference(STEPS)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "dp{}-sp{}-pp{}".format(*layout))
def test_every_weight_is_that_of_a_plain_loop(trained: Path, expected, layout):
    losses, weights = expected
    start = dict(initial_model(config((1, 1, 1))).named_parameters())
    seen: set[str] = set()
    for file in sorted(trained.glob("dp{}-sp{}-pp{}-*.pt".format(*layout))):
        found = torch.load(file, weights_only=True)
        assert found["losses"] == pytest.approx(losses, rel=1e-5)
        for name, weight in found["weights"].items():
            moved = (weights[name] - start[name].detach()).norm()
            assert float((weight - weights[name]).norm() / moved) < 1e-4, name
            torch.testing.assert_close(weight, weights[name], rtol=1e-5, atol=1e-5, msg=name)
        seen |= found["weights"].keys()
    assert seen == weights.keys()


def test_momentum_takes_four_bytes_a_parameter_and_replica(trained: Path):
    model = initial_model(config((1, 1, 1)))
    numel = sum(p.numel() * (1 if chunks_of(name) else 2) for name, p in model.named_parameters())
    kept = torch.load(trained / "dp2-sp2-pp1-0.pt", weights_only=True)["kept"]
    assert kept == pytest.approx(numel / 4, rel=0.02)


@pytest.mark.parametrize("shape", [(40, 40), (30, 120), (120, 30)])
def test_singular_values_come_near_one(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.6 and values.max() < 1.3


def test_the_longest_work_goes_first_to_who_has_least():
    loads = [0.0, 0.0, 0.0]
    costs = [cost_of(m, n) for m, n in [(8, 8)] * 6 + [(32, 8)] * 3]
    ranks = assign(costs, loads)
    assert sorted(ranks[6:]) == [0, 1, 2], "one of the largest each"
    assert max(loads) == pytest.approx(min(loads))


def test_chunks_of_published_names():
    cut = {"blocks.3.attn.qkv.weight": 3, "blocks.12.cross_attn.kv_linear.weight": 2, "t_block.1.weight": 6}
    assert {name: chunks_of(name) for name in cut} == cut
    for name in (
        "blocks.0.attn.qkv.bias", "blocks.0.scale_shift_table", "blocks.0.attn.q_norm.weight", "t_block.1.bias",
        "x_embedder.proj.weight", "y_embedder.y_proj.fc1.weight", "final_layer.linear.weight",
    ):  # fmt: skip
        assert chunks_of(name) is None, name
