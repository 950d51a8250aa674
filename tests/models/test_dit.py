"""The model against what the published code computed."""

import json
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.testing import CompileCounterWithBackend

from mugv_ds.models import PRESETS, DiT, DiTConfig
from mugv_ds.models.attention import sdpa
from mugv_ds.models.dit import init_weights
from mugv_ds.models.kept_attention import ON_CPU, KeptAttention
from mugv_ds.models.layers import sinusoid
from tests.helpers.records import GOLDEN, load_record, relative, run

RECORDS = ["dit_t2v", "dit_i2v_batch"]


def record_loss(prediction: torch.Tensor, r: dict[str, torch.Tensor]) -> torch.Tensor:
    """The records' loss: one mean over all noised elements of the batch, against the target as it is."""
    weight = r["in.x_mask"][:, None, :, None, None].expand_as(r["in.target"])
    return (prediction[:, :24] - r["in.target"])[weight].square().mean()


@pytest.mark.parametrize("recompute", ["off", "light", "selective", "attention", "full"])
@pytest.mark.parametrize("name", RECORDS)
def test_output_and_every_gradient_match_the_published_code(name, recompute):
    model, r = load_record(name)
    attention = KeptAttention(ON_CPU["sdpa"]) if recompute == "attention" else sdpa
    prediction = run(model, r, recompute=recompute, attention=attention)
    assert prediction.dtype == torch.float32
    assert relative(prediction, r["out.pred"]) <= 2e-5
    loss = record_loss(prediction, r)
    assert relative(loss, r["out.loss"][0]) <= 2e-5
    loss.backward()
    gradients = {key[5:] for key in r if key.startswith("grad.")}
    assert gradients == {name for name, _ in model.named_parameters()}
    errors = {name: relative(p.grad, r[f"grad.{name}"]) for name, p in model.named_parameters()}
    assert max(errors.values()) <= 2e-5, max(errors.items(), key=lambda item: item[1])


def test_10b_has_the_published_keys_shapes_and_size():
    with torch.device("meta"):
        model = DiT(PRESETS["mugdit_10b"])
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == json.loads((GOLDEN / "dit_10b_keys.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == 10_830_321_984


@pytest.mark.parametrize(("preset", "count"), [("mugdit_2b", 2_712_853_632), ("mugdit_debug", 4_828_512)])
def test_parameter_counts_of_the_other_presets(preset, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in DiT(PRESETS[preset]).parameters()) == count


@pytest.mark.parametrize("name", RECORDS)
def test_bf16_error_is_that_of_rounding(name):
    """No further from the fp32 record than 1.5 × a run of plain PyTorch modules under bf16 autocast is."""
    model, r = load_record(name)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            plain = relative(run(model, r), r["out.pred"])
        ours = relative(run(model.bfloat16(), r), r["out.pred"])
    assert 1e-4 < ours <= 1.5 * plain


def test_timesteps_are_embedded_in_fp32():
    """In bf16, 998 and 1000 are the same number; the embedding must tell them apart."""
    a, b = sinusoid(torch.tensor([998.0, 1000.0]))
    assert (a - b).abs().max() > 0.5
    model, r = load_record("dit_t2v")
    model, outputs = model.bfloat16(), []
    for t in (998.0, 1000.0):
        outputs.append(run(model, r | {"in.timestep": torch.tensor([t])}))
    assert not torch.equal(*outputs)


def test_null_caption_of_training_checkpoints_is_accepted():
    model, _ = load_record("dit_t2v")
    state = model.state_dict() | {"y_embedder.y_embedding": torch.zeros(300, 32)}
    model.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="unexpected_name"):
        model.load_state_dict(state | {"y_embedder.unexpected_name": torch.zeros(1)}, strict=True)


@pytest.mark.parametrize("shape", [(1, 3, 3), (2, 4, 5), (3, 5, 4)])
def test_odd_sides_are_padded_with_zeros_and_cropped(shape):
    model, r = load_record("dit_t2v")
    x = torch.randn(1, 24, *shape, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, (0, shape[2] % 2, 0, shape[1] % 2))
    with torch.no_grad():
        out = model(x, r["in.timestep"], r["in.text"][:, 0])
        whole = model(padded, r["in.timestep"], r["in.text"][:, 0])
    assert out.shape == (1, 48, *shape)
    assert torch.equal(out, whole[..., : shape[1], : shape[2]])


def test_padding_text_takes_no_part():
    model, r = load_record("dit_t2v")
    text = r["in.text"][:, 0]
    padded = torch.cat([text, torch.full((1, 5, 32), 7.0)], dim=1)
    mask = torch.arange(12)[None] < 7
    with torch.no_grad():
        assert relative(run(model, r | {"in.text": padded[:, None], "in.text_mask": mask}), run(model, r)) < 1e-6


def test_compiles_without_graph_breaks_or_complex_numbers():
    """One graph, forward and backward, whose gradients are the record's."""
    model, r = load_record("dit_i2v_batch")
    operators = set()

    def inspect(graph, inputs):
        operators.update(str(node.target) for node in graph.graph.nodes)
        return aot_eager(graph, inputs)

    prediction = run(torch.compile(model, fullgraph=True, backend=inspect), r)
    assert relative(prediction, r["out.pred"]) <= 2e-5
    record_loss(prediction, r).backward()
    errors = {name: relative(p.grad, r[f"grad.{name}"]) for name, p in model.named_parameters()}
    assert max(errors.values()) <= 2e-5, max(errors.items(), key=lambda item: item[1])
    assert operators and not any("complex" in name or name == "cpu" for name in operators)


def test_initial_weights_do_not_depend_on_how_the_model_is_split():
    config = DiTConfig(144, 2, 2, caption_channels=32)
    whole, part = DiT(config), DiT(config).blocks[1]
    init_weights(whole, "", seed=3)
    init_weights(part, "blocks.1.", seed=3)
    for name, value in part.state_dict().items():
        assert torch.equal(value, whole.state_dict()[f"blocks.1.{name}"]), name
    init_weights(part, "blocks.1.", seed=4)
    assert not torch.equal(part.mlp.fc1.weight, whole.blocks[1].mlp.fc1.weight)


@pytest.mark.regression
def test_bf16_starts_from_the_weights_of_fp32_rounded():
    """A generator in bf16 draws other numbers, whose mean and spread are 18% off."""
    config = DiTConfig(144, 2, 1, caption_channels=32)
    single, half = DiT(config), DiT(config).bfloat16()
    for model in (single, half):
        init_weights(model, "", seed=3)
    for name, value in single.state_dict().items():
        assert half.state_dict()[name].dtype == torch.bfloat16, name
        assert torch.equal(half.state_dict()[name], value.bfloat16()), name


def test_blocks_share_compiled_code_and_shapes_are_compiled_once():
    """Three blocks, three shapes met twice: one compilation for each shape, nothing more."""
    counter = CompileCounterWithBackend("eager")
    model = DiT(DiTConfig(144, 2, 3, caption_channels=16))
    with patch("torch.compile", partial(torch.compile, backend=counter)):
        for block in model.blocks:
            block.compile_segments()
    for _ in range(2):
        for shape in [(1, 4, 4), (2, 4, 6), (3, 6, 6)]:
            text = torch.randn(1, 7, 16)
            model(torch.randn(1, 24, *shape), torch.tensor([5.0]), text, recompute="selective").sum().backward()
    assert counter.frame_count == 3
