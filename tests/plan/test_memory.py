"""The prediction against peaks measured on 4 × H200 (docs/performance.md has the runs) and what a block keeps."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mugv_ds.config import PRESETS, DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.models.attention import flash4_masked
from mugv_ds.models.dit import init_weights
from mugv_ds.models.layers import Block, Condition
from mugv_ds.models.lora import add_adapters
from mugv_ds.models.videovae import VideoVAE, VideoVAEConfig, vae
from mugv_ds.models.videovae.vae import Unit
from mugv_ds.plan.cost import layer_parameters, matrix_parameters
from mugv_ds.plan.memory import (
    BUCKETS,
    DECODING_WORKSPACE,
    EXCHANGED,
    GIB,
    HOST_BASE,
    KEPT,
    SAMPLING,
    WORKING,
    predict_decoding,
    predict_encoding,
    predict_memory,
    predict_sampling,
)
from mugv_kernels.dispatch import use
from mugv_kernels.flash4 import flash4_prefix


def test_adapters_on_one_gpu_take_what_was_measured():
    """The whole 10B under adapters of rank 32, full recomputation, on one H200."""
    config = PRESETS["mugdit_10b"]
    memory = predict_memory(
        config,
        parameters=142_442_496,
        frozen=sum(layer_parameters(config)),
        blocks=56,
        replicas=1,
        tokens_held=54_002,
        in_flight=1,
        recompute="full",
        fp32_accumulation=False,
        averages=0,
    )
    assert memory.peak / GIB == pytest.approx(52.74, rel=0.02)


def test_what_is_recomputed_and_sharded_is_not_held():
    config = PRESETS["mugdit_10b"]
    common = {
        "parameters": 10**10,
        "blocks": 56,
        "tokens_held": 13_501,
        "in_flight": 1,
        "fp32_accumulation": False,
        "averages": 2,
    }
    peaks = [
        predict_memory(config, replicas=4, recompute=recompute, **common).peak
        for recompute in ("full", "attention", "selective", "light", "off")
    ]
    assert peaks == sorted(peaks)
    by_replicas = [predict_memory(config, replicas=n, recompute="full", **common).resident for n in (1, 2, 64)]
    assert by_replicas[0] - by_replicas[1] == pytest.approx(22 * 10**10 / 2)
    assert by_replicas[2] == pytest.approx(2e10 + 22e10 / 64)


SMALL = DiTConfig(144, 2, 3)
PLAIN = {
    "parameters": 0, "blocks": 0, "replicas": 4, "tokens_held": 0, "in_flight": 1, "recompute": "full",
    "fp32_accumulation": False, "averages": 0,
}  # fmt: skip


def memory(**changes) -> dict[str, float]:
    predicted = predict_memory(SMALL, **(PLAIN | changes))
    parts = predicted.parts()
    assert predicted.peak == pytest.approx(sum(parts.values()))
    return parts | {"host": predicted.host - HOST_BASE}


def test_an_empty_device_holds_nothing():
    assert not any(memory().values())


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # A parameter: 2 bytes in bf16; on one of 4 ranks fp32 weight and two moments, 12, and its gradient, 2 or 4.
        ({}, {"weights": 2, "optimizer": 3, "gradients": 0.5}),
        ({"replicas": 1}, {"weights": 2, "optimizer": 12, "gradients": 2}),
        ({"fp32_accumulation": True}, {"weights": 2, "optimizer": 3, "gradients": 1}),
        ({"averages": 3}, {"weights": 2, "optimizer": 3, "gradients": 0.5, "averages": 3}),
        # Ten frozen ones for each, under adapters: their bf16 weights and nothing else.
        ({"frozen": 10_000, "fp32_accumulation": True}, {"weights": 22, "optimizer": 3, "gradients": 1}),
    ],
)
def test_bytes_of_a_parameter(changes, expected):
    parts = memory(parameters=1000, bucket=10, **changes)
    assert parts.pop("buckets") == BUCKETS * 10 * 2
    assert {name: size / 1000 for name, size in parts.items() if size} == expected


@pytest.mark.parametrize(
    ("recompute", "less"), [("off", 1), ("light", 1), ("selective", 1), ("attention", 0), ("full", 0)]
)
def test_o_is_kept_once_where_the_sequence_is_not_sharded(recompute, less):
    sharded, whole = (
        memory(blocks=1, recompute=recompute, tokens_held=10, is_sharded=is_sharded) for is_sharded in (True, False)
    )
    assert sharded["activations"] - whole["activations"] == pytest.approx(less * 10 * 144 * 2)
    assert sharded["working"] - whole["working"] == pytest.approx(EXCHANGED * 10 * 144 * 2)


@pytest.mark.parametrize("recompute", ["off", "light", "selective", "attention", "full"])
def test_keys_and_values_of_the_text_are_kept_or_made_again(recompute):
    common = {"blocks": 5, "in_flight": 2, "recompute": recompute, "tokens_held": 10}
    plain, more = memory(**common), memory(**common, text_held=7)
    text = 7 * 144 * 2
    grown = {name: more[name] - plain[name] for name in more if more[name] != plain[name]}
    assert grown == ({"activations": 10 * text} if recompute == "off" else {"working": text})


def test_buckets_are_no_larger_than_what_there_is_to_reduce():
    assert memory(parameters=1000)["buckets"] == 2 * 2 * 1000


@pytest.mark.parametrize(
    ("recompute", "offload", "kept", "working", "moved"),
    [
        ("full", "none", 1, WORKING["full"], 0),
        ("selective", "none", 7 + 1 / 3, WORKING["selective"], 0),
        ("light", "none", 15 + 1 / 3, WORKING["light"], 0),
        ("off", "none", 20 + 1 / 3, WORKING["off"], 0),
        ("attention", "none", 2 + 1 / 36, WORKING["attention"], 0),
        # o and its log-sum-exp wait in host memory; of two blocks they are on the device too.
        ("attention", "attention_output", 1, WORKING["attention"], 1 + 1 / 36),
        ("attention", "all", 0, WORKING["attention"], 2 + 1 / 36),
    ],
)
def test_bytes_of_a_block_and_of_a_micro_batch_in_flight(recompute, offload, kept, working, moved):
    """Tensors of 10 tokens × 144 in bf16: what the schema counts for a block, times those in flight, and at work."""
    tensor = 10 * 144 * 2
    for blocks in (0, 1, 5):
        for in_flight in (1, 3):
            parts = memory(blocks=blocks, in_flight=in_flight, recompute=recompute, offload=offload, tokens_held=10)
            assert parts["activations"] == pytest.approx(tensor * kept * blocks * in_flight)
            buffers = min(blocks * in_flight, 2) * moved
            assert parts["working"] == pytest.approx(tensor * (working + EXCHANGED + buffers))
            assert parts["host"] == pytest.approx(tensor * moved * blocks * in_flight)


@pytest.mark.parametrize("adapted", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_block_keeps_what_is_counted(formula, adapted):
    """With the kernels, in bf16, the sequence not sharded: o is kept once. Texts and rows of weights do not count.

    A frozen block with adapters keeps the same, which the adapters' gradients need.
    """
    tokens, width, text_tokens = 97, 144, 3
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    block = Block(DiTConfig(width, 2, 1, caption_channels=8)).to(device, torch.bfloat16)
    block.cross_attn.attend = flash4_masked
    if adapted:
        add_adapters(block, LoraSection(rank=4))
        init_weights(block, "", seed=0)
    x, modulation, time, text = (
        torch.randn(1, *shape).to(device, torch.bfloat16).requires_grad_()
        for shape in ((tokens, width), (2, 6 * width), (2, width), (text_tokens, width))
    )
    angles = torch.randn(2, 1, tokens, 36, device=device)
    text_mask, clean = (torch.ones(1, length, dtype=torch.bool, device=device) for length in (text_tokens, tokens))
    condition = Condition(modulation, time, text, text_mask, clean, *angles)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() % (tokens * width) == 0:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flash4_prefix(q, k, v, torch.tensor([tokens], dtype=torch.int32, device=device))

    with use("triton"), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        block(x, condition, attention)
    assert sum(kept.values()) == round((KEPT["off"] - 1) * 2 * tokens * width)


def test_sampling_takes_what_was_measured():
    """On an H200, in bf16: the peak above the weights of one evaluation of two clips of 720p, 15 latent frames."""
    assert predict_sampling(PRESETS["mugdit_10b"], tokens_held=54_002) / GIB == pytest.approx(11.39, rel=0.005)
    assert predict_sampling(SMALL, tokens_held=10) == pytest.approx(2 * SAMPLING * 10 * 144 * 2)


class Live(TorchDispatchMode):
    """Follows how many bytes of what operations gave are held at once."""

    def __init__(self) -> None:
        super().__init__()
        self._held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(given):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)
                self._held[reference.cdata] = reference, storage.nbytes()
        self._held = {key: held for key, held in self._held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._held.values()))
        return given


def test_decoding_holds_what_is_counted(monkeypatch):
    """The published size in bf16, at 360p, on tensors without content: windows of 6 and of 1 latent frames."""
    monkeypatch.setattr(vae, "check_latent", lambda latent: None)  # looks at the content
    with FakeTensorMode(), torch.no_grad():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = VideoVAE()
        finally:
            torch.set_default_dtype(torch.float32)
        for frames in (1, 7):
            latent = torch.randn(1, 24, frames, 45, 80)
            with Live() as live:
                for window in model.decode_windows(latent, frames_at_once=1):
                    del window
            predicted = predict_decoding(model.config, parameters=0, latent=(frames, 45, 80), window=6)
            workspace = DECODING_WORKSPACE * 2 * 256 * 360 * 640
            assert live.peak == pytest.approx(predicted - workspace, rel=0.02)


def test_encoding_holds_what_is_counted():
    """A first frame at 360p, in the published size in fp32, on tensors without content."""
    with FakeTensorMode(), torch.no_grad():
        model, unit = VideoVAE(), Unit(0, 0, 1)
        frame = torch.randn(1, 3, 1, 360, 640)
        with Live() as live:
            model.encode_unit(frame, unit)
        predicted = predict_encoding(model.config, parameters=0, height=360, width=640, itemsize=4)
        assert live.peak == pytest.approx(predicted, rel=0.1)


def test_decoding_takes_what_was_measured():
    """On an H200, PyTorch 2.11, bf16, 720p: with one frame at once beside the weights, and with four in all."""
    shape = {"latent": (15, 90, 160), "window": 6}
    assert predict_decoding(VideoVAEConfig(), parameters=0, **shape) / GIB == pytest.approx(3.23, rel=0.05)
    four = predict_decoding(VideoVAEConfig(), parameters=411_752_900, frames_at_once=4, **shape)
    assert four / GIB == pytest.approx(9.5, rel=0.05)


def test_muon_keeps_one_moment_of_its_matrices():
    dit = PRESETS["mugdit_10b"]
    matrices = matrix_parameters(dit)
    width = dit.hidden_size
    assert matrices == (6 * width**2, *[16 * width**2] * dit.depth, 0)
    common = {
        "parameters": sum(layer_parameters(dit)), "blocks": dit.depth, "replicas": 8, "tokens_held": 100,
        "in_flight": 1, "recompute": "full", "fp32_accumulation": True, "averages": 0,
    }  # fmt: skip
    adamw, muon = (predict_memory(dit, matrices=count, **common).peak for count in (0, sum(matrices)))
    assert adamw - muon == pytest.approx(4 * sum(matrices) / 8)
