"""Sharded gradients are DeepSpeed's: the same norms, clipped steps and weights, with the memory of the shard alone."""

import ctypes
import resource
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch import nn

from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.readers import Batch
from mugv_ds.engine import build
from mugv_ds.engine.distributed_optimizer import make_engine
from mugv_ds.engine.feed import Feed
from mugv_ds.engine.process import start_process
from tests.helpers.distributed import run_ranks, whole_state
from tests.parallel.test_layouts import CHANNELS, SHAPE, global_batch, perturb
from tests.parallel.test_layouts import config as layout_config

STEPS, ACCUMULATION = 20, 4
M_MMAP_THRESHOLD = -3  # of malloc.h
LAYOUTS = [(2, 2, 1), (2, 1, 2)]  # data, sequence, pipeline


def config(layout: tuple[int, int, int], precision: str = "fp32", **deepspeed: object) -> TrainConfig:
    """A run of micro-batches of one sample, whose gradients are clipped and fill many buckets."""
    given = layout_config(layout, precision=precision).model_dump()
    given["data"] |= {"global_batch_size": layout[0] * ACCUMULATION, "micro_batch_size": 1}
    given["optimizer"]["gradient_clipping"] = 0.05
    given["deepspeed"] = {"zero_optimization": {"reduce_bucket_size": 50_000}} | deepspeed
    return TrainConfig.model_validate(given)


def deepspeeds_own(module, optimizer, schedule, config: dict):
    """Makes the engine with the optimizer that DeepSpeed would take."""
    return deepspeed.initialize(model=module, optimizer=optimizer, lr_scheduler=schedule, config=config)[0]


def train(settings: TrainConfig, steps: int, own: bool) -> dict:
    """Trains; returns losses, norms and what the weights are after it. own: whether by our optimizer."""
    build.make_engine = make_engine if own else deepspeeds_own
    process = start_process(settings)
    engine = build.build_engine(settings, process, SHAPE, weights=perturb)
    module, feed = engine.module, Feed(engine.module, process, settings.data, CHANNELS)
    losses, norms = [], []
    for step in range(steps):
        wholes = [global_batch(2 * step + half) for half in range(2)]
        samples = [Batch(*(t[i : i + 1] for t in whole)) for whole in wholes for i in range(4)]
        begin = process.coordinates.data * ACCUMULATION
        parts = samples[begin : begin + ACCUMULATION]
        if module.set_shape(SHAPE, 1, process.device):
            engine.reset_activation_shape()
        losses.append(engine.train_batch(feed.stage(parts, SHAPE, 1, ACCUMULATION)).item())
        norms.append(float(engine.get_global_grad_norm()))
    weights = {name: p.detach().clone() for prefix, layer in module.named_layers() for name, p in
               ((prefix + name, p) for name, p in layer.named_parameters())}  # fmt: skip
    return {"losses": losses, "norms": norms, "weights": weights}


def compare(out: Path) -> None:
    for layout in LAYOUTS:
        own, theirs = (train(config(layout), STEPS, own) for own in (True, False))
        rank = dist.get_rank()
        torch.save({"own": own, "theirs": theirs}, out / f"{'-'.join(map(str, layout))}-rank{rank}.pt")


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared")
    run_ranks(4, compare, out)
    return out


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "dp{}-sp{}-pp{}".format(*layout))
def test_twenty_clipped_steps_are_those_of_deepspeeds_optimizer(compared: Path, layout):
    for rank in range(4):
        results = torch.load(compared / f"{'-'.join(map(str, layout))}-rank{rank}.pt")
        own, theirs = results["own"], results["theirs"]
        assert max(theirs["norms"]) > 0.1, "every step is clipped"
        assert own["losses"] == pytest.approx(theirs["losses"], rel=1e-6)
        assert own["norms"] == pytest.approx(theirs["norms"], rel=1e-6)
        for name, weight in theirs["weights"].items():
            torch.testing.assert_close(own["weights"][name], weight, rtol=1e-6, atol=2e-6, msg=name)


class Wide(nn.Module):
    """Linears, of which one takes no part; [B, width] → scalar."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.unused = nn.Linear(width, 3)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))

    def named_layers(self) -> list[tuple[str, nn.Module]]:
        return [("", self)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


def wide_engine(make, width: int, depth: int, dtype: torch.dtype = torch.float32, accumulation: int = 1, **section):
    """An engine of a `Wide` on all ranks."""
    torch.manual_seed(0)
    module = Wide(width, depth).to(dtype)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    return make(module, optimizer, schedule, {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 1, "reduce_bucket_size": width * (width + 1)}, "steps_per_print": None,
        **({"bf16": {"enabled": True}} if dtype == torch.bfloat16 else {}), **section,
    })  # fmt: skip


def measure_memory(own: bool, width: int, depth: int, out: Path) -> None:
    """Writes the most memory that a process had in four micro-batches of a step, in bytes."""
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 16)  # the C library gives back what is freed
    deepspeed.init_distributed("gloo")
    engine = wide_engine(make_engine if own else deepspeeds_own, width, depth, accumulation=4)
    for _ in range(4):
        engine.backward(engine(torch.ones(1, width)))
    (out / f"{own}-{dist.get_rank()}").write_text(str(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))


def test_memory_falls_by_what_the_formula_says(tmp_path: Path):
    """In fp32 DeepSpeed keeps gradients of 4 bytes a parameter, here a rank keeps 4 a parameter of its shard."""
    width, depth = 1024, 32
    for own in (True, False):
        run_ranks(2, measure_memory, own, width, depth, tmp_path)
    saved = 4 * depth * width * (width + 1) / 2
    bucket = 4 * width * (width + 1)
    for rank in range(2):
        own, theirs = (int((tmp_path / f"{own}-{rank}").read_text()) for own in (True, False))
        # Two buckets are on their way, of each of which this rank gets half; others are made and waited for.
        assert saved - 6 * bucket < theirs - own < saved + bucket, (theirs, own)


def check_rest(out: Path) -> None:
    """What a step does where a gradient is not finite, and in which precision gradients are summed."""
    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    engine = wide_engine(make_engine, 64, 3)
    optimizer = engine.optimizer
    x = torch.ones(1, 64) * (1 + rank)
    engine.backward(engine(x))
    engine.step()
    states = {kind: whole_state(engine, kind) for kind in ("weight", "exp_avg", "exp_avg_sq")}
    engine.backward(engine(x * (torch.nan if rank == 1 else 1)))
    engine.step()
    assert not engine.was_step_applied()
    assert optimizer.overflow
    for kind, before in states.items():
        for name, value in whole_state(engine, kind).items():
            assert torch.equal(value, before[name]), (kind, name)
    assert all(not bucket.gradient.any() for bucket in optimizer._buckets), "nothing is left of the bad step"
    engine.backward(engine(x))
    engine.step()
    assert engine.was_step_applied()
    for dtypes in ({}, {"communication_data_type": "fp32"}):
        engine = wide_engine(make_engine, 64, 3, torch.bfloat16, 8, data_types={"grad_accum_dtype": "fp32"}, **dtypes)
        expected = {}
        generator = torch.Generator().manual_seed(0)
        for _ in range(8):
            both = torch.randn(2, 1, 64, generator=generator).bfloat16()
            engine.backward(engine(both[rank]))
            for ranks in range(2):  # what each rank's micro-batch gives, in bf16
                plain = Wide(64, 3).bfloat16()
                plain.load_state_dict(engine.module.state_dict())
                (plain(both[ranks]) / 8).backward()
                for name, parameter in plain.named_parameters():
                    if parameter.grad is not None:
                        expected[name] = expected.get(name, 0) + parameter.grad.float() / 2
        flats = {slot.parameter: (bucket, slot) for bucket in engine.optimizer._buckets for slot in bucket.slots}
        for name, parameter in engine.module.named_parameters():
            bucket, slot = flats[parameter]
            whole = torch.empty(len(bucket.weights))
            dist.all_gather_into_tensor(whole, bucket.gradient)
            wanted = expected.get(name, torch.zeros(parameter.shape)).flatten()
            error = (slot.of(whole) - wanted).norm() / max(wanted.norm(), 1e-30)
            # In bf16 the sum of two ranks is rounded once to 8 bits; in fp32 nothing is.
            assert error < (1e-6 if dtypes else 4e-3), (name, error)
            if not dtypes and name == "layers.0.weight":
                assert error > 1e-5, "bf16 is summed in bf16"
    (out / f"done-{rank}").touch()


def test_a_bad_gradient_changes_nothing_and_sums_have_the_precision_asked_for(tmp_path: Path):
    run_ranks(2, check_rest, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
