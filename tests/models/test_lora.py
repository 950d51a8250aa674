"""Adapters: exact, switched off without a trace, and nothing computed for what is frozen."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager

from mugv_ds.config.post_training_schema import LORA_TARGETS, LoraSection
from mugv_ds.models import DiT, DiTConfig
from mugv_ds.models.dit import init_weights
from mugv_ds.models.lora import (
    adapter_shapes,
    adapters_off,
    add_adapters,
    block_adapter_shapes,
    has_adapter,
    is_factor,
    merged,
)
from mugv_kernels.dispatch import use
from tests.helpers.records import relative

CONFIG = DiTConfig(144, 2, 2, caption_channels=16)
LORA = LoraSection(rank=4, alpha=6.0)
MODULATED = {"attn.qkv", "cross_attn.q_linear", "mlp.fc1", "mlp.fc2"}  # inside our operators


def make_model(lora: LoraSection | None = LORA) -> DiT:
    """A model off its initial zeros, adapters too."""
    model = DiT(CONFIG)
    if lora is not None:
        model.requires_grad_(False)
        for block in model.blocks:
            add_adapters(block, lora)
    init_weights(model, "", seed=0)
    for name, parameter in model.named_parameters():
        generator = torch.Generator().manual_seed(sum(name.encode()))
        parameter.data.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, text = torch.randn(2, 24, 2, 4, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    x_mask = torch.tensor([[True, True], [False, True]])
    return {"x": x, "timestep": torch.tensor([300.0, 800.0]), "text": text, "x_mask": x_mask}


def run(model: DiT, **options) -> Tensor:
    return model(**inputs(), **options)


def gradients(model: DiT, **options) -> dict[str, Tensor]:
    """Of the adapters, for a loss of all outputs."""
    model.zero_grad()
    run(model, **options).square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.fixture(scope="module")
def expected() -> tuple[Tensor, dict[str, Tensor]]:
    """Output and the adapters' gradients of the plain model with W + (alpha / rank) · B·A, in fp64."""
    adapted, plain = make_model().double(), make_model(None).double()
    factors = {name: p.detach().requires_grad_() for name, p in adapted.named_parameters() if is_factor(name)}
    state = {name: p.detach() for name, p in adapted.named_parameters() if not is_factor(name)}
    for block in range(CONFIG.depth):
        for target in LORA_TARGETS:
            linear = f"blocks.{block}.{target}"
            a, b = (factors[f"{linear}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
            state[f"{linear}.weight"] = state[f"{linear}.weight"] + 6.0 / 4 * b @ a
    given = {name: t.double() if t.is_floating_point() and name == "x" else t for name, t in inputs().items()}
    with use("reference"):
        out = torch.func.functional_call(plain, state, kwargs=given)
    out.square().mean().backward()
    return out.detach(), {name: p.grad for name, p in factors.items()}


@pytest.mark.parametrize("recompute", ["off", "light", "selective", "full"])
def test_output_and_gradients_are_those_of_the_sum_of_the_weights(recompute, expected):
    model = make_model()
    assert relative(run(model), expected[0]) < 1e-5
    found = gradients(model, recompute=recompute)
    assert found.keys() == expected[1].keys() == adapter_shapes(CONFIG, LORA).keys()
    errors = {name: relative(found[name], gradient) for name, gradient in expected[1].items()}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])


def test_compiled_segments_take_the_adapters_on_and_off(expected):
    model = make_model()
    torch._dynamo.reset()
    with patch("torch.compile", partial(torch.compile, backend=aot_eager)):
        model.blocks[0].compile_segments()
    found = gradients(model, recompute="light")
    assert max(relative(found[name], gradient) for name, gradient in expected[1].items()) < 1e-5
    with torch.no_grad(), adapters_off(model):
        torch.testing.assert_close(run(model), run(make_model_off()), rtol=0, atol=1e-5)
    torch._dynamo.reset()


def make_model_off() -> DiT:
    """The base of `make_model`, as a model that has never had adapters."""
    base, adapted = DiT(CONFIG), make_model()
    base.load_state_dict({name: value for name, value in adapted.state_dict().items() if not is_factor(name)})
    return base


def test_adapters_off_is_the_base_bit_for_bit_and_only_inside():
    model, base = make_model(), make_model_off()
    with torch.no_grad():
        on = run(model)
        with adapters_off(model):
            off = run(model)
        assert torch.equal(off, run(base)) and relative(on, off) > 1e-2
        with pytest.raises(ZeroDivisionError), adapters_off(model):
            raise ZeroDivisionError
        assert torch.equal(run(model), on)


def test_merged_weights_give_the_adapters_output():
    model, whole = make_model(), make_model_off()
    with torch.no_grad():
        for name, linear in model.named_modules():
            if has_adapter(linear):
                factors = linear.lora_A.weight, linear.lora_B.weight
                whole.get_submodule(name).weight.copy_(merged(linear.weight, *factors, LORA.scaling))
        on = run(model)
        assert relative(run(whole), on) < 1e-5 and relative(run(make_model_off()), on) > 1e-2


def test_a_run_starts_at_its_base():
    """B is zero, A is not, and what it draws does not depend on the other targets."""
    models = []
    for targets in (LORA_TARGETS, ("mlp.fc2",)):
        model = DiT(CONFIG).requires_grad_(False)
        for block in model.blocks:
            add_adapters(block, LoraSection(rank=4, targets=targets))
        init_weights(model, "", seed=0)
        models.append(dict(model.named_parameters()))
    every, one = models
    assert {name for name in one if is_factor(name)} == {
        f"blocks.{i}.mlp.fc2.{factor}.weight" for i in range(2) for factor in ("lora_A", "lora_B")
    }
    assert all(torch.equal(every[name], value) for name, value in one.items())
    assert all(p.any() == ("lora_A" in name) for name, p in every.items() if is_factor(name))
    bound = 1 / 576**0.5  # of Kaiming-uniform with a = √5: 1 / √(columns)
    assert 0.9 * bound < every["blocks.0.mlp.fc2.lora_A.weight"].abs().max() <= bound


def products_of_weight_size(model: DiT) -> int:
    """How many matrix products of a forward and backward pass are as large as a block's weight, as its gradient is."""
    sizes = {tuple(linear.weight.shape) for linear in model.blocks[0].modules() if isinstance(linear, nn.Linear)}
    sizes = {size for size in sizes if LORA.rank not in size}
    with torch.profiler.profile(record_shapes=True) as profile:
        gradients(model)
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    return sum((one[0], other[1]) in sizes for one, other, *_ in shapes)


def test_no_gradient_is_computed_for_what_is_frozen():
    """All seven linears of both blocks have one else. Nothing frozen has a gradient in the end either."""
    model = make_model()
    assert products_of_weight_size(model) == 0
    assert all((p.grad is not None) == is_factor(name) for name, p in model.named_parameters())
    assert products_of_weight_size(make_model(None)) >= 2 * len(LORA_TARGETS)


def test_targets_alone_are_adapted():
    lora = LoraSection(rank=2, targets=("attn.proj", "cross_attn.proj"))
    shapes = block_adapter_shapes(CONFIG, lora)
    assert shapes == {
        f"{target}.{factor}.weight": (2, 144) if factor == "lora_A" else (144, 2)
        for target in lora.targets
        for factor in ("lora_A", "lora_B")
    }
    found = gradients(make_model(lora))
    assert len(found) == 2 * len(shapes) and all(gradient.any() for gradient in found.values())


def test_published_weights_have_the_names_of_the_linears():
    block = DiT(CONFIG).blocks[0]
    linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    assert linears == set(LORA_TARGETS)
