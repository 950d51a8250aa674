"""Rates, initial weights and decay follow the width by µP, under every layout; a widened model learns as before."""

import json
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mugv_ds.cli import sweep
from mugv_ds.config.model import PRESETS, DiTConfig
from mugv_ds.config.schema import OptimizerSection, TrainConfig
from mugv_ds.engine.build import build_engine, make_optimizer
from mugv_ds.engine.distributed_optimizer import DistributedOptimizer
from mugv_ds.engine.process import alone, start_process
from mugv_ds.models import DiT
from mugv_ds.models.dit import init_weights, keyed_generator
from mugv_ds.models.matrices import rate_multiplier
from mugv_ds.objectives.flow import flow_loss
from mugv_ds.weights.base import meta_state
from mugv_ds.weights.widen import Noise, Widened, widened_sizes
from tests.engine.test_demo import command
from tests.engine.test_muon import step_on
from tests.helpers.distributed import run_ranks, whole_state
from tests.helpers.launcher import ROOT
from tests.parallel.test_layouts import SHAPE
from tests.parallel.test_layouts import config as layout_config

# What reads a hidden vector and makes one, written out by hand; `final_layer.linear.weight` reads one as well.
BLOCK = (
    *("attn.qkv.weight", "attn.proj.weight", "cross_attn.q_linear.weight", "cross_attn.kv_linear.weight"),
    *("cross_attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"),
)
EMBEDDERS = ("t_embedder.mlp.2.weight", "fps_embedder.mlp.2.weight", "y_embedder.y_proj.fc2.weight")
HIDDEN = {*(f"blocks.{block}.{name}" for block in range(56) for name in BLOCK), "t_block.1.weight", *EMBEDDERS}
OUTPUT = "final_layer.linear.weight"


@pytest.mark.parametrize(
    ("name", "mover", "from_1728_to_3456", "from_216_to_72"),
    [
        ("blocks.55.attn.qkv.weight", "adamw", 0.5, 3.0),
        ("blocks.0.mlp.fc2.weight", "rms", 0.7071068, 1.7320508),
        ("blocks.0.mlp.fc1.weight", "spectral", 1.0, 1.0),
        ("t_block.1.weight", "adamw", 0.5, 3.0),
        ("t_block.1.weight", "rms", 0.7071068, 1.7320508),
        ("y_embedder.y_proj.fc2.weight", "adamw", 0.5, 3.0),
        ("final_layer.linear.weight", "adamw", 0.5, 3.0),
        ("final_layer.linear.bias", "adamw", 1.0, 1.0),
        ("final_layer.scale_shift_table", "adamw", 1.0, 1.0),
        ("x_embedder.proj.weight", "adamw", 1.0, 1.0),
        ("t_embedder.mlp.0.weight", "adamw", 1.0, 1.0),
        ("y_embedder.y_proj.fc1.weight", "adamw", 1.0, 1.0),
        ("start_token", "adamw", 1.0, 1.0),
        ("blocks.7.attn.qkv.bias", "adamw", 1.0, 1.0),
        ("blocks.7.attn.q_norm.weight", "adamw", 1.0, 1.0),
        ("blocks.7.cross_attn_norm.weight", "adamw", 1.0, 1.0),
        ("blocks.7.scale_shift_table", "adamw", 1.0, 1.0),
    ],
)
def test_rates_by_hand(name, mover, from_1728_to_3456, from_216_to_72):
    assert rate_multiplier(name, mover, width=3456, reference=1728) == pytest.approx(from_1728_to_3456)
    assert rate_multiplier(name, mover, width=72, reference=216) == pytest.approx(from_216_to_72)
    assert rate_multiplier(name, mover, width=1728, reference=1728) == 1.0


def test_every_parameter_of_the_10b_is_of_the_kind_that_its_name_says():
    halved = {n for n in meta_state(PRESETS["mugdit_10b"]) if rate_multiplier(n, "adamw", 3456, 1728) == 0.5}
    assert halved == HIDDEN | {OUTPUT}


# A step of a run at the width 144, with its rate tuned at 72 and without a rule.
LAYOUTS, LR, ADAMW_LR = [(1, 1, 1), (1, 1, 2)], 2e-3, 1e-3


def config(layout: tuple[int, int, int], kind: str, **optimizer: object) -> TrainConfig:
    given = layout_config(layout).model_dump()
    given["optimizer"] |= {"kind": kind, "lr": LR, **({"adamw_lr": ADAMW_LR} if kind == "muon" else {}), **optimizer}
    given["schedule"]["warmup_steps"] = 0
    return TrainConfig.model_validate(given)


@torch.no_grad()
def set_weights(layers: list[tuple[str, nn.Module]]) -> None:
    """The same weights whatever the initial ones are, none of them zero."""
    for prefix, layer in layers:
        for name, parameter in layer.named_parameters():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=keyed_generator(0, prefix + name)))


def step_both(layouts: list[tuple[int, int, int]], out: Path) -> None:
    """Saves how far a step moves every weight of the stage, with the rule and without."""
    process = None
    for layout in layouts:
        for kind in ("adamw", "muon"):
            moves = []
            for reference in (None, 72):
                settings = config(layout, kind, width_reference=reference)
                process = process or start_process(settings)
                engine = build_engine(settings, process, SHAPE, weights=set_weights)
                before = whole_state(engine, "weight")
                step_on(engine, process, settings, 0)
                moves.append({name: w - before[name] for name, w in whole_state(engine, "weight").items()})
            torch.save(moves, out / "{}-dp{}-sp{}-pp{}-{}.pt".format(kind, *layout, process.rank))
            dist.barrier()


@pytest.fixture(scope="module")
def moves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("width")
    for layout in LAYOUTS:
        run_ranks(layout[0] * layout[1] * layout[2], step_both, [layout], out)
    return out


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "dp{}-sp{}-pp{}".format(*layout))
def test_a_step_moves_every_weight_as_far_as_its_rate_says(moves: Path, layout, kind):
    """The first step from the same weights, and so from the same gradients: moves differ by the rates alone."""
    seen: set[str] = set()
    for file in moves.glob("{}-dp{}-sp{}-pp{}-*.pt".format(kind, *layout)):
        plain, ruled = torch.load(file, weights_only=True)
        for name, move in plain.items():
            expected = 0.5 if name in HIDDEN or name == OUTPUT else 1.0
            if kind == "muon" and name in HIDDEN and name not in EMBEDDERS:
                expected = 0.5**0.5
            assert move.abs().max() > 1e-4, f"{name}: nothing moved"
            torch.testing.assert_close(ruled[name], expected * move, rtol=1e-3, atol=1e-6, msg=name)
        seen |= plain.keys()
    assert seen == DiT(config(layout, kind).model.dit()).state_dict().keys()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_groups(kind):
    """One without the rule or at the reference; else one a rate, that of the embedders last, and one decay for all."""
    model, device = DiT(DiTConfig(144, 2, 2, caption_channels=16)), torch.device("cpu")
    section = OptimizerSection(kind=kind, lr=LR, weight_decay=0.3)

    def groups(widths: tuple[int, int] | None) -> list[dict]:
        return make_optimizer([("", model)], section, widths, device).param_groups

    for widths in (None, (144, 144)):
        assert [group["lr"] for group in groups(widths)] == [LR] * (2 if kind == "muon" else 1)
    ruled = groups((144, 72))
    assert [group["lr"] / LR for group in ruled] == pytest.approx(
        [0.5**0.5, 0.5, 1.0] if kind == "muon" else [0.5, 1.0]
    )
    assert [group["lr"] * group["weight_decay"] for group in ruled] == pytest.approx([0.3 * LR] * len(ruled))
    assert [("chunks" in group) for group in ruled] == [kind == "muon", *[False] * (len(ruled) - 1)]
    assert sum(len(group["params"]) for group in ruled) == len(list(model.parameters()))


def drawn(width: int, widths: tuple[int, int] | None) -> dict[str, torch.Tensor]:
    model = DiT(DiTConfig(width, width // 72, 1, caption_channels=64))
    init_weights(model, "", 0, widths)
    return model.state_dict()


def test_initial_weights_stay_where_there_is_no_rule_or_the_width_is_the_reference():
    plain, ruled = drawn(216, None), drawn(216, (216, 216))
    assert all(torch.equal(value, ruled[name]) for name, value in plain.items())


def test_initial_spreads_by_hand():
    """At the width 864, of a rate that was tuned at 216."""
    expected = {
        "blocks.0.attn.qkv.weight": (2 / (864 + 3 * 864)) ** 0.5,
        "blocks.0.mlp.fc2.weight": (2 / (4 * 864 + 864)) ** 0.5,
        "t_block.1.weight": 0.02 / 2,
        "t_embedder.mlp.2.weight": 0.02 / 2,
        "fps_embedder.mlp.2.weight": 0.02 / 2,
        "y_embedder.y_proj.fc2.weight": 0.02 / 2,
        "y_embedder.y_proj.fc1.weight": 0.02,
        "t_embedder.mlp.0.weight": 0.02,
        "x_embedder.proj.weight": (2 / (96 + 216)) ** 0.5,
        "blocks.0.scale_shift_table": 216**-0.5,
        "final_layer.scale_shift_table": 216**-0.5,
        "final_layer.linear.weight": 0.0,
        "blocks.0.cross_attn.proj.weight": 0.0,
    }
    found = drawn(864, (864, 216))
    for name, spread in expected.items():
        assert found[name].std().item() == pytest.approx(spread, rel=0.05), name


# The narrow model, its batches, and how far it is trained.
NARROW, STEPS = DiTConfig(72, 1, 2, caption_channels=16), 4


def train(model: DiT, section: OptimizerSection, widths: tuple[int, int] | None, group) -> list[float]:
    """Trains a model on the same batches as any other; returns its losses."""
    stepper = DistributedOptimizer(
        make_optimizer([("", model)], section, widths, torch.device("cpu")),
        group=group,
        bucket_size=10**8,
        gradient_dtype=torch.float32,
        communication_dtype=torch.float32,
        clipping=0.0,
    )
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(step)
        x, target = torch.randn(2, 2, 24, 2, 4, 4, generator=generator)
        text = torch.randn(2, 5, 16, generator=generator)
        prediction = model(x, torch.tensor([300.0, 700.0]), text)
        loss = flow_loss(prediction, target, torch.ones(2, 2, dtype=torch.bool)).mean()
        loss.backward()
        stepper.step()
        stepper.zero_grad()
        losses.append(loss.item())
    return losses


def train_narrow_and_wide(out: Path) -> None:
    """Trains the narrow model and, from the same function, the one three times as wide, by the rule and without."""
    torch.set_num_threads(1)  # so small a model takes no longer, and does not wait for cores that others use
    losses = {}
    with alone() as group:
        for name, given in {
            "adamw": {"kind": "adamw", "lr": 1e-3},
            "muon rms": {"kind": "muon", "lr": 4e-3, "muon_scale": "rms", "adamw_lr": 1e-3},
            "muon spectral": {"kind": "muon", "lr": 1e-2, "muon_scale": "spectral", "adamw_lr": 1e-3},
        }.items():
            section = OptimizerSection(eps=1e-15, weight_decay=0.1, **given)
            narrow = DiT(NARROW)
            set_weights([("", narrow)])
            wide = DiT(widened_sizes(NARROW, 3))
            wide.load_state_dict(Widened(StateWeights(narrow.state_dict()), 3, Noise("none")))
            other = deepcopy(wide)
            losses[name] = (
                train(narrow, section, None, group),
                train(wide, section, (216, 72), group),
                train(other, section, None, group),
            )
    out.write_text(json.dumps(losses))


class StateWeights(dict):
    """A state dict as `weights.base.Weights`."""

    path, text_encoder = None, None


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[float], ...]]:
    out = tmp_path_factory.mktemp("widened") / "losses.json"
    run_ranks(1, train_narrow_and_wide, out)
    return json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["adamw", "muon rms", "muon spectral"])
def test_a_widened_model_learns_as_the_narrow_one_does(learned, kind):
    """Three times as wide, with copies that stay equal, a model computes the same function after every step.

    That holds for the rates of the rule alone, of every parameter: an independent derivation of the table.
    """
    narrow, wide, without = learned[kind]
    moved = abs(narrow[-1] - narrow[0])
    assert moved > 0.01 * narrow[0]
    assert max(abs(a - b) for a, b in zip(narrow, wide, strict=True)) < 2e-3 * moved
    assert abs(without[-1] - narrow[-1]) > 0.1 * moved, "without the rule it must differ"


def test_coordinate_check(tmp_path):
    """Activations keep their size over the widths by the rule alone, with either optimizer."""
    command = [sys.executable, str(ROOT / "tools/coordinate_check.py"), "--widths", "72", "144", "288"]
    command += ["--reference", "72", "--depth", "2", "--steps", "6", "--kinds", "adamw", "muon"]
    done = subprocess.run([*command, "--out", str(tmp_path / "check")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    slopes = json.loads((tmp_path / "check.json").read_text())["slopes"]
    assert slopes.keys() == {"adamw, rule", "adamw, no rule", "muon, rule", "muon, no rule"}
    for name, of_blocks in slopes.items():
        if name.endswith("no rule"):
            assert all(abs(slope) > 0.1 for slope in of_blocks), name
        else:
            assert all(abs(slope) < 0.05 for slope in of_blocks), name
    assert (tmp_path / "check.png").read_bytes().startswith(b"\x89PNG")


PROXY = ("model.hidden_size=216", "model.num_heads=3")
WIDE = ("model.hidden_size=432", "model.num_heads=6", "optimizer.width_reference=216")


def train_on_demo(name: str, steps: int, *settings: str) -> list[float]:
    """Trains on the demo's data at the proxy's rate; returns the held-out losses of every fifth step."""
    folder = Path("runs") / name
    given = ["optimizer.lr=0.00390625", "schedule.kind=constant", f"schedule.steps={steps}", "logging.eval_every=5"]
    given += ["data.global_batch_size=16", "data.micro_batch_size=16", *settings]
    sweep.train(ROOT / "ds_configs/debug.json", given, folder, threads=2)
    curve = sweep.held_out(folder)
    return [curve[step] for step in sorted(curve)]


def rise(losses: list[float]) -> float:
    """How far losses come to be above what they were at some time before."""
    return max(loss - min(losses[: number + 1]) for number, loss in enumerate(losses))


@pytest.mark.long
def test_a_widened_proxy_goes_on_falling_at_its_rate(tmp_path, monkeypatch):
    """From where the proxy was, and with no bump larger than the proxy's where it goes on likewise."""
    monkeypatch.chdir(tmp_path)
    command(tmp_path, "tools/make_demo_data.py", "--out", "data/demo")
    proxy = train_on_demo("proxy", 200, *PROXY, "checkpoint.save_every=200")
    command(tmp_path, "tools/convert_hf.py", "--ckpt", "runs/proxy/checkpoints", "--out", "exports/proxy")
    command(tmp_path, "tools/widen.py", "--weights", "exports/proxy", "--out", "exports/wide")
    narrow = train_on_demo("narrow", 100, *PROXY, "checkpoint.init_from=exports/proxy")
    wide = train_on_demo("wide", 100, *WIDE, "checkpoint.init_from=exports/wide")
    without = train_on_demo("without", 20, *WIDE[:2], "checkpoint.init_from=exports/wide")
    print(f"\nproxy {proxy}\nnarrow {narrow}\nwide {wide}\nwithout {without}")
    assert wide[0] == pytest.approx(proxy[-1], rel=1e-3)
    assert wide[-1] < 0.9 * wide[0]
    assert rise(wide) < 1.05 * rise(narrow)
    assert rise(without) > 1.5 * rise(narrow), "without the rule the rate is too high"
