"""Every layout trains the same model: in fp32 loss, every gradient and twenty steps equal those of one process."""

import hashlib
from itertools import product
from pathlib import Path

import pytest
import torch

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Batch
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.process import start_process
from mugv_ds.models import DiT
from mugv_ds.models.dit import init_weights
from mugv_ds.models.kept_attention import KeptAttention
from mugv_ds.models.rope import patch_grid
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.parallel.pipeline import DiTPipeline
from tests.helpers.distributed import run_ranks, whole_state

LAYOUTS = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1)]
SHAPE = (3, 6, 9)  # 3 · 3 · 5 + 2 = 47 tokens: odd, and a side is padded
TEXT_TOKENS, CHANNELS, GLOBAL_BATCH, STEPS = 7, 32, 4, 20
BF16_LAYOUTS = LAYOUTS[:5]
BETA1 = 0.9


def config(
    layout: tuple[int, int, int], recompute: str | list[str] = "off", precision: str = "fp32", offload: str = "none"
) -> TrainConfig:
    data, sequence, pipeline = layout
    return TrainConfig.model_validate(
        {
            "model": {
                "preset": "mugdit_debug", "hidden_size": 144, "num_heads": 2, "caption_channels": CHANNELS,
                "precision": precision,
            },
            "data": {
                "manifest": "unused", "num_workers": 0, "max_text_tokens": TEXT_TOKENS,
                "global_batch_size": GLOBAL_BATCH, "micro_batch_size": GLOBAL_BATCH // (2 * data),
            },
            "flow": {"caption_drop": 0.0},
            "parallel": {
                "data": data, "sequence": sequence, "pipeline": pipeline, "activation_checkpointing": recompute,
                "offload": offload,
            },
            "optimizer": {"lr": 1e-3, "betas": (BETA1, 0.999), "eps": 1e-6, "gradient_clipping": 0.0},
            "schedule": {"steps": STEPS, "warmup_steps": 5},
            "checkpoint": {"dir": "unused"},
            "logging": {"dir": "unused"},
        }
    )  # fmt: skip


def global_batch(step: int) -> Batch:
    """Four samples: clean and noised frames, captions of unequal length; the same in every process."""
    generator = torch.Generator().manual_seed(step)
    b, (frames, height, width) = GLOBAL_BATCH, SHAPE
    x_mask = torch.ones(b, frames, dtype=torch.bool)
    x_mask[1, 0] = x_mask[2, 1] = False
    return Batch(
        x=torch.randn(b, 24, frames, height, width, generator=generator),
        target=torch.randn(b, 24, frames, height, width, generator=generator),
        timestep=1000 * torch.rand(b, generator=generator),
        text=torch.randn(b, TEXT_TOKENS, CHANNELS, generator=generator),
        text_mask=torch.arange(TEXT_TOKENS)[None] < torch.tensor([7, 3, 1, 5])[:, None],
        x_mask=x_mask,
        fps=torch.tensor([24.0, 30.0, 16.0, 8.0]),
        weight=torch.ones(b),
        role=torch.zeros(b, dtype=torch.int8),
        reference=torch.zeros(b),
        optimality=torch.zeros(b),
        row=torch.arange(b),
        visit=torch.zeros(b, dtype=torch.int64),
        content=torch.zeros(b, dtype=torch.int64),
    )


def perturb(layers: list[tuple[str, torch.nn.Module]]) -> None:
    """Moves the weights off their initial zeros, so that every gradient differs from zero, equally for every split."""
    for prefix, layer in layers:
        for name, parameter in layer.named_parameters():
            key = int.from_bytes(hashlib.blake2b((prefix + name).encode(), digest_size=7).digest())
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(key))
            parameter.data.add_(noise, alpha=0.05)


def initial_model(settings: TrainConfig) -> DiT:
    """The plain model with the weights that every layout starts from, in fp32."""
    model = DiT(settings.model.dit())
    init_weights(model, "", settings.data.seed)
    perturb([("", model)])
    return model


def reference() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and first gradients in one process without DeepSpeed: plain model, plain loss, torch's AdamW."""
    settings = config((1, 1, 1))
    section = settings.optimizer
    model = initial_model(settings)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=section.lr, betas=section.betas, eps=section.eps, weight_decay=section.weight_decay
    )
    losses, gradients = [], {}
    for step in range(STEPS):
        batch = global_batch(step)
        prediction = model(batch.x, batch.timestep, batch.text, batch.text_mask, batch.x_mask, batch.fps)
        loss = flow_loss(prediction, batch.target, batch.x_mask).mean()
        optimizer.zero_grad()
        loss.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.param_groups[0]["lr"] = section.lr * min((step + 1) / settings.schedule.warmup_steps, 1)
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients


def train_layout(settings: TrainConfig, out: Path, steps: int) -> None:
    """Trains on the global batches through DeepSpeed; rank files hold losses, terms and the stage's first gradients."""
    process = start_process(settings)
    engine = build_engine(settings, process, SHAPE, weights=perturb)
    module, micro = engine.module, settings.data.micro_batch_size
    feed = Feed(module, process, settings.data, CHANNELS)
    losses, gradients, terms = [], {}, {}
    attended = count_attention(module)
    for step in range(steps):
        whole = global_batch(step)
        begin = process.coordinates.data * (GLOBAL_BATCH // process.layout.data)
        parts = [Batch(*(t[i : i + micro] for t in whole)) for i in range(begin, begin + 2 * micro, micro)]
        if module.set_shape(SHAPE, micro, process.device):
            engine.reset_activation_shape()
        losses.append(engine.train_batch(feed.stage(parts, SHAPE, micro, len(parts))).item())
        if step == 0:
            terms = {name: value.item() for name, value in engine.get_additional_losses().items()}
            # After the first step the first moment is (1 − β1) times the reduced gradient.
            gradients = {name: moment / (1 - BETA1) for name, moment in whole_state(engine, "exp_avg").items()}
    torch.save(
        {"losses": losses, "gradients": gradients, "terms": terms, "attended": attended}, out / f"rank{process.rank}.pt"
    )


def count_attention(module: DiTPipeline) -> list[int]:
    """Has a `KeptAttention` note the block's forward passes, each as the tokens that take part."""
    attended: list[int] = []
    if isinstance(kept := module.ulysses.attention, KeptAttention):
        statistics = kept._statistics

        class Counting:
            backward = statistics.backward

            def forward(self, qkv, tokens):
                attended.append(tokens)
                return statistics.forward(qkv, tokens)

        module.ulysses.attention = KeptAttention(Counting())
    return attended


def train_cases(cases: list[tuple[TrainConfig, Path, int]]) -> None:
    for case in cases:
        train_layout(*case)


def start(cases: dict[str, tuple[TrainConfig, int]], folder: Path) -> dict[str, list[dict]]:
    """Runs the cases, those of one world size in one launch, and reads what each rank wrote."""
    worlds: dict[int, list] = {}
    for name, (settings, steps) in cases.items():
        (folder / name).mkdir()
        parallel = settings.parallel
        world = parallel.data * parallel.sequence * parallel.pipeline
        worlds.setdefault(world, []).append((settings, folder / name, steps))
    for world, these in worlds.items():
        run_ranks(world, train_cases, these)
    return {name: [torch.load(f, weights_only=True) for f in sorted((folder / name).iterdir())] for name in cases}


def name_of(layout: tuple[int, int, int]) -> str:
    return "dp{}-sp{}-pp{}".format(*layout)


@pytest.fixture(scope="module")
def expected() -> tuple[list[float], dict[str, torch.Tensor]]:
    return reference()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, list[dict]]:
    cases = {name_of(layout): (config(layout), STEPS) for layout in LAYOUTS}
    for recompute in ("light", "selective", "full"):
        cases[recompute] = (config((1, 2, 2), recompute), 2)
    for recompute, layout in MIXED.items():
        cases[recompute] = (config(layout, recompute.split("-")), 2)
    for layout, offload in KEPT:
        cases[kept_name(layout, offload)] = (config(layout, "attention", offload=offload), 2)
    for layout in BF16_LAYOUTS:
        cases[f"bf16-{name_of(layout)}"] = (config(layout, precision="bf16"), 1)
    return start(cases, tmp_path_factory.mktemp("layouts"))


KEPT = list(product([(1, 1, 1), (2, 1, 1), (1, 2, 2), (2, 2, 1)], ["none", "attention_output", "all"]))


def kept_name(layout: tuple[int, int, int], offload: str) -> str:
    return f"{name_of(layout)}-attention-{offload}"


MIXED = {"attention-light": (1, 1, 1), "full-off": (1, 2, 1), "selective-attention": (1, 2, 2)}
CASES = [*map(name_of, LAYOUTS), "light", "selective", "full", *MIXED, *(kept_name(*case) for case in KEPT)]


@pytest.mark.parametrize("case", KEPT, ids=lambda case: kept_name(*case))
def test_attention_runs_forward_once_a_block_and_micro_batch(case, results):
    (data, sequence, pipeline), _ = case
    ranks = results[kept_name(*case)]
    assert len(ranks) == data * sequence * pipeline
    steps, micro_batches, tokens = 2, 2, patch_grid(*SHAPE).tokens
    blocks = config((1, 1, 1)).model.dit().depth // pipeline
    for rank in ranks:
        assert rank["attended"] == [tokens] * (steps * micro_batches * blocks)


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_one_process(case, expected, results):
    for rank in results[case]:
        torch.testing.assert_close(rank["losses"], expected[0][: len(rank["losses"])], rtol=1e-5, atol=0)
    assert expected[0][-1] < 0.99 * expected[0][0], "the loss curve must move, or the comparison shows nothing"


@pytest.mark.parametrize("case", CASES)
def test_every_gradient_equals_that_of_one_process(case, expected, results):
    gradients = {name: g for rank in results[case] for name, g in rank["gradients"].items()}
    assert gradients.keys() == expected[1].keys()
    errors = {name: float((gradients[name] - g).norm() / g.norm()) for name, g in expected[1].items()}
    assert max(errors.values()) <= 1e-5, max(errors.items(), key=lambda item: item[1])


@pytest.mark.parametrize("case", CASES)
def test_replicas_hold_the_same_gradients(case, results):
    for rank in results[case]:
        for other in results[case]:
            for name in rank["gradients"].keys() & other["gradients"].keys():
                assert torch.equal(rank["gradients"][name], other["gradients"][name]), name


@pytest.mark.parametrize("case", CASES)
def test_quartile_sums_cover_the_batch(case, expected, results):
    """Averaged over replicas and accumulation: their sum is the loss of a micro-batch, their count its size."""
    for rank in results[case]:
        terms, replicas = rank["terms"], int(case[2]) if case.startswith("dp") else 1
        count = sum(terms[f"count_q{q}"] for q in range(4))
        assert count == pytest.approx(GLOBAL_BATCH / (2 * replicas))
        assert sum(terms[f"loss_q{q}"] for q in range(4)) / count == pytest.approx(expected[0][0], rel=1e-5)


@pytest.fixture(scope="module")
def plain_bf16() -> dict[str, torch.Tensor]:
    """Gradients of the first step by the plain model in bf16, the loss in fp32: the rounding that bf16 costs."""
    model, batch = initial_model(config((1, 1, 1))).bfloat16(), global_batch(0)
    losses = []
    for i in range(GLOBAL_BATCH):  # each sample's gradient is rounded to bf16 once, and summed in fp32
        one = Batch(*(t[i : i + 1] for t in batch))
        prediction = model(one.x, one.timestep, one.text, one.text_mask, one.x_mask, one.fps)
        losses.append(flow_loss(prediction, one.target, one.x_mask).mean())
    names, parameters = zip(*model.named_parameters(), strict=True)
    summed = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    for loss in losses:
        for total, gradient in zip(summed, torch.autograd.grad(loss, parameters), strict=True):
            total += gradient.float() / GLOBAL_BATCH
    return dict(zip(names, summed, strict=True))


def distance(found: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """The relative error of the whole gradient."""
    wrong = sum(float((found[name] - g).square().sum()) for name, g in exact.items())
    return (wrong / sum(float(g.square().sum()) for g in exact.values())) ** 0.5


@pytest.mark.parametrize("layout", BF16_LAYOUTS, ids=name_of)
def test_bf16_computes_what_fp32_does_up_to_its_rounding(layout, expected, plain_bf16, results):
    """The plain model in bf16 has a gradient error of its own; no layout may add more than a third of it."""
    ranks = results[f"bf16-{name_of(layout)}"]
    for rank in ranks:
        assert rank["losses"] == pytest.approx(expected[0][:1], rel=5e-4)
    found = {name: g for rank in ranks for name, g in rank["gradients"].items()}
    assert found.keys() == expected[1].keys()
    usual = distance(plain_bf16, expected[1])
    assert 1e-3 < usual < 0.05
    assert distance(found, expected[1]) <= 1.3 * usual
