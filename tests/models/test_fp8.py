"""fp8 linears: ours, and Transformer Engine's: where it and a GPU are there, else a stand-in that rounds alike."""

import copy
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from mugv_ds.config import ConfigError, PeerError, load_config
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.engine import build
from mugv_ds.engine.build import build_engine
from mugv_ds.engine.process import start_process
from mugv_ds.models import DiT, fp8_products
from mugv_ds.models import fp8 as fp8_models
from mugv_ds.models.attention import sdpa
from mugv_ds.models.dit import init_weights
from mugv_ds.models.fp8 import check_fp8, fp8_off, use_fp8
from mugv_ds.models.layers import Block, Condition
from mugv_ds.models.lora import adapters_off, add_adapters, block_adapter_shapes
from mugv_ds.plan.records import read_scalars
from mugv_ds.train import train
from mugv_ds.weights.published import export
from mugv_kernels.fp8 import E4M3, E5M2
from mugv_kernels.modulate import modulate_reference
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.distributed import run_ranks
from tests.helpers.records import relative

CONFIG = DiTConfig(288, 4, 1, caption_channels=16)
N, L, D = 27, 5, CONFIG.hidden_size  # no multiple of 16
FP8_LAYERS = ["attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"]
HAS_LIBRARY = torch.cuda.is_available() and find_spec("transformer_engine") is not None

recipes: list[object] = []  # of the stand-in's autocast regions that are open


class Float8CurrentScaling:
    """Stand-in of the recipe."""


@contextmanager
def autocast(enabled: bool = True, recipe: object = None):
    recipes.append(recipe)
    yield
    recipes.pop()


def rounded(x: Tensor, dtype: torch.dtype, bound: Tensor | None = None) -> Tensor:
    """x through fp8 and back, scaled by its largest value, or by a bound of it."""
    largest = x.abs().max() if bound is None else bound
    scale = torch.finfo(dtype).max / largest.float().clamp(min=1e-30)
    return (x.float() * scale).to(dtype).float() / scale


class Products(torch.autograd.Function):
    """x·Wᵀ + b from E4M3 factors, its gradients from E5M2 ones."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        x8, weight8 = (rounded(tensor, torch.float8_e4m3fn) for tensor in (x, weight))
        ctx.save_for_backward(x8, weight8)
        return (x8 @ weight8.T + bias.float()).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, ...]:
        x8, weight8 = ctx.saved_tensors
        gradient8 = rounded(gradient, torch.float8_e5m2)
        results = (gradient8 @ weight8, gradient8.T @ x8, gradient.float().sum(dim=0))
        return tuple(result.to(gradient.dtype) for result in results)


class Linear(nn.Module):
    """Stand-in of the library's layer, with what of it matters here."""

    def __init__(self, in_features: int, out_features: int, *, params_dtype: torch.dtype, device: str = "cuda") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features, dtype=params_dtype, device=device))
        self.bias = nn.Parameter(torch.empty(out_features, dtype=params_dtype, device=device))

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(recipes[-1], Float8CurrentScaling)
        assert x.dim() == 2 and not any(size % 16 for size in (*x.shape, *self.weight.shape))
        return Products.apply(x, self.weight, self.bias)


def install_stand_in(monkeypatch: pytest.MonkeyPatch, **names: object) -> None:
    forget_kernel(monkeypatch)
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.common.recipe"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", ModuleType("transformer_engine.pytorch"))
    for name, value in names.items():
        place = "common.recipe" if name == "Float8CurrentScaling" else "pytorch"
        setattr(sys.modules[f"transformer_engine.{place}"], name, value)


def forget_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mugv_kernels.fp8_linear` is imported anew, now and after the test."""
    monkeypatch.setitem(sys.modules, "mugv_kernels.fp8_linear", None)
    del sys.modules["mugv_kernels.fp8_linear"]


@pytest.fixture(
    params=[
        "native",
        "stand-in",
        pytest.param(
            "library",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not HAS_LIBRARY, reason="needs a GPU and Transformer Engine")],
        ),
    ]
)
def backend(request, monkeypatch) -> str:
    """What computes in fp8."""
    if request.param == "native":
        return "native"
    if request.param == "stand-in":
        install_stand_in(monkeypatch, Float8CurrentScaling=Float8CurrentScaling, Linear=Linear, autocast=autocast)
    return "te"


@pytest.fixture
def device(request) -> torch.device:
    """Where it runs."""
    on_gpu = request.node.callspec.params.get("backend") == "library" or torch.cuda.is_available()
    return torch.device("cuda" if on_gpu and "stand-in" not in request.node.name else "cpu")


def make_block(device: torch.device) -> Block:
    with device:
        block = Block(CONFIG).bfloat16()
    init_weights(block, "blocks.0.", seed=0)
    nn.init.normal_(block.cross_attn.proj.weight, std=0.02, generator=torch.Generator(device).manual_seed(0))
    return block


def run(block: Block, recompute: str = "off", backward: bool = True) -> dict[str, Tensor]:
    """Output and all gradients for fixed inputs; or the output alone."""
    device, generator = block.scale_shift_table.device, torch.Generator().manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, modulation, time, text = (
        normal(*shape).requires_grad_() for shape in ((1, N, D), (1, 2, 6 * D), (1, 2, D), (1, L, D))
    )
    angles = normal(1, N, 36, dtype=torch.float32)
    mask, clean = torch.ones(1, L, dtype=torch.bool, device=device), torch.arange(N, device=device)[None] < 5
    out = block(x, Condition(modulation, time, text, mask, clean, angles.cos(), angles.sin()), sdpa, recompute)
    if not backward:
        return {"out": out}
    block.zero_grad()
    out.backward(normal(1, N, D))
    gradients = {name: p.grad.clone() for name, p in block.named_parameters() if p.requires_grad}
    return {"out": out.detach(), "x": x.grad, "modulation": modulation.grad, "text": text.grad, **gradients}


def test_a_block_in_fp8_is_that_in_bf16_up_to_its_rounding(device, backend):
    """E4M3 rounds a number by 2.6% in root mean square, E5M2 by 5.2%; four linears deep gradients add that up."""
    block = make_block(device)
    plain = run(block)
    use_fp8(block, backend)
    results = run(block)
    errors = {name: relative(results[name], plain[name]) for name in plain}
    assert 1e-3 < errors.pop("out") < 0.08
    assert errors.keys() == plain.keys() - {"out"}
    assert max(errors.values()) < 0.2, max(errors.items(), key=lambda item: item[1])


def products_of(block: Block, backend: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights of the products of forward passes that follow."""
    shapes = []
    if backend == "native":
        product = fp8_products.product

        def counting(a, b, *args, is_fast, **kwargs):
            if is_fast:  # the forward pass's
                shapes.append(tuple(b.shape))
            return product(a, b, *args, is_fast=is_fast, **kwargs)

        monkeypatch.setattr(fp8_products, "product", counting)
    else:
        for name in FP8_LAYERS:
            block.get_submodule(name).register_forward_hook(lambda of, *_: shapes.append(tuple(of.weight.shape)))
    return shapes


def test_each_linear_over_the_tokens_runs_in_fp8_once(device, backend, monkeypatch):
    block = make_block(device)
    linears = {name: block.get_submodule(name) for name in FP8_LAYERS}
    use_fp8(block, backend)
    assert [name for name, module in block.named_modules() if isinstance(module, nn.Linear)] == ["cross_attn.kv_linear"]
    shapes = products_of(block, backend, monkeypatch)
    run(block)
    assert sorted(shapes) == sorted(tuple(linear.weight.shape) for linear in linears.values())


def test_parameters_and_state_dict_stay_what_they_are(device, backend):
    block = make_block(device)
    names = list(block.state_dict())
    before = dict(block.named_parameters())
    use_fp8(block, backend)
    assert list(block.state_dict()) == names
    after = dict(block.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)
    other = {name: torch.full_like(value, 0.5) for name, value in before.items()}
    block.load_state_dict(other, strict=True)
    assert all(torch.equal(value, other[name]) for name, value in before.items())


def test_adapters_stay_in_bf16_beside_the_frozen_linears(device, backend):
    """Their gradients are those beside bf16 linears up to the rounding of what comes before and after."""
    block = make_block(device)
    add_adapters(block, LoraSection(rank=4, alpha=6.0))
    init_weights(block, "blocks.0.", seed=0)
    for name, parameter in block.named_parameters():
        if name.endswith(("lora_B.weight", "cross_attn.proj.weight")):
            nn.init.normal_(parameter, std=0.02, generator=torch.Generator(device).manual_seed(len(name)))
    plain = run(block)
    assert {name for name in plain if "." in name} == set(block_adapter_shapes(CONFIG, LoraSection(rank=4)))
    use_fp8(block, backend)
    results = run(block)
    errors = {name: relative(results[name], plain[name]) for name in plain}
    assert 1e-3 < errors["out"] < 0.08
    assert max(errors.values()) < 0.2, max(errors.items(), key=lambda item: item[1])
    with torch.no_grad(), adapters_off(block):
        assert relative(run(block, backward=False)["out"], results["out"]) > 1e-2


@pytest.mark.parametrize("recompute", ["light", "selective", "full"])
def test_recomputation_changes_nothing(device, backend, recompute):
    block = make_block(device)
    use_fp8(block, backend)
    plain, again = run(block), run(block, recompute)
    # On a GPU the attention's backward pass adds up in any order.
    limit = 0.0 if device.type == "cpu" else 1e-2
    assert max(relative(again[name], plain[name]) for name in plain) <= limit


def test_compiled_segments_leave_the_products_to_the_library(device, backend):
    block = make_block(device)
    use_fp8(block, backend)
    plain = run(block)
    with patch("torch.compile", partial(torch.compile, backend=aot_eager)):
        block.compile_segments()
    compiled = run(block, "light")
    assert max(relative(compiled[name], plain[name]) for name in plain) < 1e-2


def test_a_missing_library_is_named(monkeypatch):
    forget_kernel(monkeypatch)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(ConfigError, match=r'fp8_backend = "te": needs Transformer Engine.*pip install.*set "native"'):
        check_fp8(torch.device("cpu"), "te")


def test_a_library_without_the_recipe_is_refused(monkeypatch):
    install_stand_in(monkeypatch, Linear=Linear, autocast=autocast)
    with pytest.raises(ConfigError, match=r"with Float8CurrentScaling.*ImportError"):
        check_fp8(torch.device("cpu"), "te")


def test_a_device_without_fp8_is_refused(monkeypatch):
    parts = {"Float8CurrentScaling": Float8CurrentScaling, "Linear": Linear, "autocast": autocast}
    install_stand_in(monkeypatch, **parts, is_fp8_available=lambda return_reason: (False, "too old"))
    with pytest.raises(ConfigError, match="this process runs on cpu"):
        check_fp8(torch.device("cpu"), "te")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match=r"A100 cannot run it \(too old\)"):
        check_fp8(torch.device("cuda"), "te")


def test_widths_that_fp8_cannot_take_are_refused(tmp_path):
    odd = {"num_heads": 3, "hidden_size": 216, "precision": "fp8"}
    config = write_config(tmp_path, tmp_path / "train.csv", model=odd)
    with pytest.raises(ConfigError, match=r'precision = "fp8".*hidden_size is 216; use an even model.num_heads'):
        load_config(config)
    assert load_config(config, ['model.precision="bf16"']).model.dit().num_heads == 3


def refuse_then_train(config_path: str) -> None:
    """Two ranks: what stops them all, then two steps with the stand-in."""
    config = load_config(config_path)
    process = start_process(config)
    failure = ZeroDivisionError() if process.rank == 1 else None
    with pytest.raises(ZeroDivisionError if process.rank == 1 else PeerError):
        process.host.raise_together(failure)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setitem(sys.modules, "transformer_engine", None)
        with pytest.raises(ConfigError, match="needs Transformer Engine"):
            build_engine(config, process, (1, 4, 4))
    with pytest.MonkeyPatch.context() as monkeypatch:
        install_stand_in(monkeypatch, Float8CurrentScaling=Float8CurrentScaling, Linear=Linear, autocast=autocast)
        monkeypatch.setattr(build, "check_fp8", lambda *_: None)
        train(config)


def test_ranks_refuse_together_and_an_fp8_run_writes_ordinary_checkpoints(tmp_path):
    manifest = write_dataset(tmp_path / "data", [(1, 4, 4)] * 4)
    sections = {
        "model": {"precision": "fp8", "fp8_backend": "te", "hidden_size": 288, "num_heads": 4},
        "parallel": {"data": 1, "sequence": 2, "activation_checkpointing": "light"},
        "schedule": {"steps": 2},
    }
    run_ranks(2, refuse_then_train, str(write_config(tmp_path, manifest, **sections)))
    weights = torch.load(export(tmp_path / "checkpoints", tmp_path / "dit", layout="pt"), weights_only=True)
    with torch.device("meta"):
        plain = DiT(replace(CONFIG, depth=2)).bfloat16()
    assert {name: value.dtype for name, value in weights.items()} == {
        name: value.dtype for name, value in plain.state_dict().items()
    }
    assert weights["final_layer.linear.weight"].any(), "the last layer starts at zero: nothing was trained"


def test_the_products_are_the_formula_of_what_is_rounded():
    """Output and gradients of a linear after a modulated LayerNorm, from E4M3 and E5M2 factors in fp64."""
    torch.manual_seed(0)
    rows, width, made = 27, 48, 80
    x, shift, scale = torch.randn(1, rows, width), torch.randn(1, 2, width), torch.randn(1, 2, width)
    clean, weight, bias = torch.arange(rows)[None] < 5, torch.randn(made, width), torch.randn(made)
    leaves = [tensor.requires_grad_() for tensor in (x, shift, scale, weight, bias)]
    dy = torch.randn(1, rows, made)
    y = fp8_products.fp8_modulated_linear(x, shift, scale, clean, fp8_products.Weight(weight), bias)
    got = torch.autograd.grad(y, leaves, dy)

    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    normed = modulate_reference(*wide[:3], clean)
    bound = (width**0.5 * (1 + scale.detach()).abs() + shift.detach().abs()).max()
    normed8, weight8, dy8 = (
        rounded(tensor, dtype, bound).double()
        for tensor, dtype, bound in ((normed.detach(), E4M3, bound), (weight.detach(), E4M3, None), (dy, E5M2, None))
    )
    exact = normed8 @ weight8.T + bias.double()
    d_rows = torch.autograd.grad(normed, wide[:3], dy8 @ weight8)
    expected = [*d_rows, (dy8.flatten(0, 1).T @ normed8.flatten(0, 1)), dy.double().sum((0, 1))]
    assert relative(y.detach(), exact) < 1e-6
    assert max(map(relative, got, expected)) < 1e-5


def test_a_frozen_weight_gets_no_gradient_and_no_product(monkeypatch):
    block = make_block(torch.device("cpu"))
    block.requires_grad_(False)
    use_fp8(block)
    calls = []
    product = fp8_products.product
    monkeypatch.setattr(
        fp8_products, "product", lambda *args, **kwargs: calls.append(kwargs["is_fast"]) or product(*args, **kwargs)
    )
    results = run(block)
    assert results["x"].abs().sum() > 0 and not any("." in name for name in results)
    assert calls.count(True) == len(FP8_LAYERS) and calls.count(False) == len(FP8_LAYERS)


def test_kept_weights_are_those_that_are_made_each_time():
    """They change when the weight does: in place, as an optimizer does, or behind autograd, as the sharded one does."""
    block = make_block(torch.device("cpu"))
    plain = copy.deepcopy(block)
    use_fp8(block, keeps_weights=True)
    use_fp8(plain)
    counted = []
    with patch.object(
        fp8_models, "round_weight", lambda weight: counted.append(1) or fp8_products.round_weight(weight)
    ):
        for change in (None, None, "in place", "behind"):
            for of in (block, plain):
                for parameter in of.parameters() if change else ():
                    with torch.no_grad():
                        (parameter if change == "in place" else parameter.data).mul_(1.5)
                    if change == "behind":
                        torch.autograd.graph.increment_version(parameter)
            a, b = run(block), run(plain)
            assert all(torch.equal(a[name], b[name]) for name in b)
    assert len(counted) == 3 * len(FP8_LAYERS), "the second pass has the first one's"


def test_compiled_segments_see_kept_weights_change_and_are_compiled_once():
    block = make_block(torch.device("cpu"))
    plain, compiled = copy.deepcopy(block), []
    use_fp8(block, keeps_weights=True)
    use_fp8(plain)

    def backend(graph, inputs):
        compiled.append(graph)
        return aot_eager(graph, inputs)

    with patch("torch.compile", partial(torch.compile, backend=backend)):
        block.compile_segments()
    for _ in range(3):
        a, b = run(block), run(plain)
        assert max(relative(a[name], b[name]) for name in b) < 1e-2
        with torch.no_grad():
            for parameter in (*block.parameters(), *plain.parameters()):
                parameter.mul_(1.5)
    assert len(compiled) == 1


def train_and_go_on(config_path: str) -> None:
    """Six steps, or what is left of them."""
    train(load_config(config_path))


@pytest.mark.parametrize("layout", [(1, 2, 1), pytest.param((1, 1, 2), marks=pytest.mark.long)])
def test_a_resumed_fp8_run_is_the_uninterrupted_one(tmp_path, layout):
    """Of several micro-batches, with the outer blocks in bf16: there is no state to lose."""
    manifest = write_dataset(tmp_path / "data", [(1, 4, 4)] * 8)
    data, sequence, pipeline = layout
    sections = {
        "model": {"precision": "fp8", "hidden_size": 288, "num_heads": 4, "depth": 3, "fp8_blocks": [1, 2]},
        "data": {"global_batch_size": 4, "micro_batch_size": 2},
        "parallel": {"data": data, "sequence": sequence, "pipeline": pipeline},
    }
    weights = {}
    for name, runs in {"whole": (4,), "resumed": (2, 4)}.items():
        for steps in runs:
            folder = tmp_path / name
            config = write_config(folder, manifest, schedule={"steps": steps}, checkpoint={"save_every": 2}, **sections)
            run_ranks(2, train_and_go_on, str(config))
        weights[name] = torch.load(export(folder / "checkpoints", folder / "dit", layout="pt"), weights_only=True)
    assert all(torch.equal(value, weights["resumed"][name]) for name, value in weights["whole"].items())


@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapters"])
def test_switched_off_a_block_is_that_in_bf16(device, backend, adapted):
    block = make_block(device)
    if adapted:
        add_adapters(block, LoraSection(rank=4))
        init_weights(block, "blocks.0.", seed=0)
        nn.init.normal_(block.attn.qkv.lora_B.weight, std=0.02, generator=torch.Generator(device).manual_seed(1))
    plain = run(block, backward=False)["out"]
    use_fp8(block, backend)
    rounded_out = run(block, backward=False)["out"]
    assert not torch.equal(rounded_out, plain)
    with pytest.raises(ZeroDivisionError), fp8_off(block):
        assert torch.equal(run(block, backward=False)["out"], plain)
        raise ZeroDivisionError
    assert torch.equal(run(block, backward=False)["out"], rounded_out)


def test_compiled_segments_are_switched_too(device, backend):
    block = make_block(device)
    plain = run(block, backward=False)["out"]
    use_fp8(block, backend)
    with patch("torch.compile", partial(torch.compile, backend=aot_eager)):
        block.compile_segments()
    for _ in range(2):
        off_by = relative(run(block, backward=False)["out"].detach(), plain)
        with fp8_off(block):
            assert relative(run(block, backward=False)["out"].detach(), plain) < off_by / 4


def test_what_an_fp8_run_measures_and_shows_is_of_its_weights_in_bf16(tmp_path):
    """As a run in bf16 does that starts from the weights it leaves; the steps themselves differ."""
    manifest = write_dataset(tmp_path / "data", [(1, 4, 4)] * 4)
    held_out = str(write_dataset(tmp_path / "data", [(1, 4, 4)] * 3, "val"))

    def ran(name: str, precision: str, lr: float, init_from: Path | None = None) -> tuple[dict, bytes]:
        folder = tmp_path / name
        config = write_config(
            folder,
            manifest,
            model={"precision": precision, "hidden_size": 288, "num_heads": 4},
            data={"val_manifest": held_out},
            parallel={"data": 1},
            optimizer={"lr": lr},
            schedule={"steps": 2, "kind": "constant", "warmup_steps": 0},
            checkpoint={"save_every": 2} | ({"init_from": str(init_from)} if init_from else {}),
            logging={"every": 1},
            preview={"every": 2, "manifest": held_out, "count": 1, "steps": 2, "dir": str(folder / "previews")},
        )
        run_ranks(1, train_and_go_on, str(config))
        scalars = {tag: dict(values) for tag, values in read_scalars(folder / "tensorboard").items()}
        (latent,) = (folder / "previews/step-000002").glob("*.safetensors")
        return scalars, latent.read_bytes()

    trained, shown = ran("trained", "fp8", 3e-3)
    weights = export(tmp_path / "trained/checkpoints", tmp_path / "dit", layout="pt")
    exact, shown_exactly = ran("exact", "bf16", 1e-30, weights)
    rounded_run, shown_again = ran("again", "fp8", 1e-30, weights)
    assert trained["validation/loss"][2] == exact["validation/loss"][0] == rounded_run["validation/loss"][0]
    assert shown == shown_exactly == shown_again
    assert rounded_run["train/loss"][1] != exact["train/loss"][1]


def test_blocks_that_are_not_there_are_refused(tmp_path):
    model = {"num_heads": 4, "hidden_size": 288, "depth": 3, "precision": "fp8"}
    for blocks in ([1, 3], [2, 1]):
        config = write_config(tmp_path, tmp_path / "train.csv", model=model | {"fp8_blocks": blocks})
        with pytest.raises(ConfigError, match=rf"model.fp8_blocks = \[{blocks[0]}, {blocks[1]}\].*blocks 0 to 2"):
            load_config(config)


def test_a_card_without_fp8_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "A100")
    with pytest.raises(ConfigError, match='A100 has no fp8 products; set "bf16"'):
        check_fp8(torch.device("cuda"), "native")
