"""FLOPs of the model in closed form, for MFU, HFU and the balance of pipeline stages. A multiply-add counts as two.

Model FLOPs (MFU) count no recomputation. Hardware FLOPs (HFU) also count the parts of the forward pass that
`parallel.activation_checkpointing` runs again, KTO's forward pass for its reference point, and that for the losses of
the reference of a run with adapters; neither counts what a fused attention kernel recomputes inside itself.

With adapters (`lora`) a frozen linear takes two thirds of what a trained one does, since the gradient of its weight is
not computed, and the embedders a third. The first block is counted as the others, though its input has no gradient.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mugv_ds.config.model import DiTConfig
from mugv_ds.config.post_training_schema import LoraSection
from mugv_ds.config.schema import TrainConfig
from mugv_ds.models.lora import block_adapter_shapes
from mugv_ds.models.rope import patch_grid

# The parts of a block (`block_parts`) that the backward pass runs again, by `parallel.activation_checkpointing`. They
# are the segments into which `layers.Block.forward` cuts a block.
RECOMPUTED = {
    "off": (),
    "light": ("between", "cross_attention"),
    "selective": ("between", "cross_attention", "qkv", "feed_forward"),
    "attention": ("between", "cross_attention", "qkv", "feed_forward"),
    "full": ("between", "cross_attention", "qkv", "feed_forward", "self_attention"),
}


# The part that a linear over the tokens is in.
_PART_OF = {
    "attn.qkv": "qkv",
    "attn.proj": "between",
    "cross_attn.q_linear": "between",
    "cross_attn.proj": "between",
    "mlp.fc1": "feed_forward",
    "mlp.fc2": "feed_forward",
}
# Dense bf16 peak in TFLOP/s by a part of the device's name, the first that fits: half of the peaks with sparsity in
# NVIDIA's data sheets, H100 (SXM 1,979, PCIe 1,513, NVL 1,671) and H200 (SXM 1,979, NVL 1,671).
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H200 NVL": 835.0, "H100": 989.0, "H200": 989.0}

_ATTENTIONS = ("cross_attention", "self_attention")


def card_peak_tflops(name: str) -> float | None:
    """Returns the dense bf16 peak of a device of this name; None for an unknown one, and for a shared one (MIG)."""
    return next((peak for chip, peak in PEAK_TFLOPS.items() if chip in name and "MIG" not in name), None)


def block_parts(config: DiTConfig, tokens: int, text_tokens: int, lora: LoraSection | None = None) -> dict[str, float]:
    """Returns the forward FLOPs of one block for one sample by part, without the keys and values of the text.

    Args:
        tokens: N, the length of the sequence. text_tokens: L. lora: adapters, whose products are counted with their
            linears'.
    """
    width = config.hidden_size
    adapters = adapter_parts(config, tokens, lora)
    parts = {
        "qkv": 6.0 * tokens * width**2,
        "between": 6.0 * tokens * width**2,  # self-attention's o 2, cross-attention's q 2 and o 2
        "cross_attention": 4.0 * tokens * text_tokens * width,
        "feed_forward": 16.0 * tokens * width**2,
        "self_attention": 4.0 * tokens**2 * width,
    }
    return {name: flops + adapters.get(name, 0.0) for name, flops in parts.items()}


def adapter_parts(config: DiTConfig, tokens: int, lora: LoraSection | None) -> dict[str, float]:
    """Returns the forward FLOPs of one block's adapters for one sample by part of the block: 2·N·r·(in + out) each."""
    parts: dict[str, float] = {}
    for name, (rows, columns) in (block_adapter_shapes(config, lora) if lora is not None else {}).items():
        part = _PART_OF.get(name.rsplit(".", 2)[0])  # that of the text's keys and values is left out, as they are
        if part is not None:
            parts[part] = parts.get(part, 0.0) + 2.0 * tokens * rows * columns
    return parts


def block_flops(config: DiTConfig, tokens: int, text_tokens: int) -> float:
    """Returns the forward FLOPs of one block for one sample: N · (28·D² + 4·N·D + 4·L·D)."""
    return sum(block_parts(config, tokens, text_tokens).values())


def recomputed_flops(
    config: DiTConfig, tokens: int, text_tokens: int, recompute: str, lora: LoraSection | None = None
) -> float:
    """Returns the FLOPs of one block that its backward pass runs again, for one sample.

    This counts compiled segments, which run again whole. Eager PyTorch stops before the last linear of cross-attention,
    whose output nothing needs, and so computes 2·D² a token less in "light" and "selective".

    Args:
        recompute: see `layers.Block.forward`. lora: adapters of the blocks.
    """
    parts = block_parts(config, tokens, text_tokens, lora)
    return sum(parts[name] for name in RECOMPUTED[recompute])


def layer_flops(config: DiTConfig, tokens: int, text_tokens: int, lora: LoraSection | None = None) -> list[float]:
    """Returns the forward FLOPs for one sample of the embedders, each block and the final layer: depth + 2 numbers."""
    width, patch = config.hidden_size, 4 * config.in_channels
    embed = 2.0 * tokens * patch * width + 2.0 * text_tokens * width * (config.caption_channels + width)
    final = 2.0 * tokens * width * 2 * patch
    block = sum(block_parts(config, tokens, text_tokens, lora).values())
    return [embed, *[block] * config.depth, final]


def train_flops(
    config: DiTConfig,
    tokens: int,
    text_tokens: int,
    recompute: str | Sequence[str] = "off",
    lora: LoraSection | None = None,
) -> float:
    """Returns the FLOPs of one sample's forward and backward pass, and what is recomputed.

    Without adapters both passes are three times the forward one.

    Args:
        recompute: see `layers.Block.forward`; of all blocks, or of each. With "off" the result is the model FLOPs
            (MFU), whatever the run recomputes; with the run's own levels it is the hardware FLOPs (HFU).
        lora: adapters of the blocks, which alone are trained.
    """
    levels = Counter((recompute,) * config.depth if isinstance(recompute, str) else recompute)
    again = sum(n * recomputed_flops(config, tokens, text_tokens, level, lora) for level, n in levels.items())
    forward = layer_flops(config, tokens, text_tokens, lora)
    if lora is None:
        return 3.0 * sum(forward) + again
    attentions = sum(block_parts(config, tokens, text_tokens)[name] for name in _ATTENTIONS)
    adapters = sum(adapter_parts(config, tokens, lora).values())
    embed, *others = forward
    return embed + 2.0 * sum(others) + config.depth * (attentions + adapters) + again


class StepFlops(NamedTuple):
    """FLOPs of one optimizer step, over all devices: of the model, and with all that the hardware runs beside."""

    model_flops: float
    hardware_flops: float


def step_flops(run: TrainConfig, shape: tuple[int, int, int], *, samples: int, companions: int) -> StepFlops:
    """Counts the FLOPs of an optimizer step.

    Args:
        shape: latent (T, H, W) of its samples.
        samples: of the step, all together. companions: those of them that are of the SFT set of a preference run, over
            which nothing is run forward once more.
    """
    sizes = run.model.dit(), patch_grid(*shape).tokens, run.data.max_text_tokens
    preferred = samples - companions if run.preference is not None else 0
    again = 0.0
    if preferred and run.preference.objective == "kto":
        again += preferred * sum(layer_flops(*sizes, run.lora))
    if run.lora is not None:
        again += preferred * sum(layer_flops(*sizes))  # the reference: adapters off
    return StepFlops(
        samples * train_flops(*sizes, lora=run.lora),
        samples * train_flops(*sizes, run.parallel.levels(sizes[0].depth), run.lora) + again,
    )


@dataclass(frozen=True)
class SampleCost:
    """What one sample asks of a device, by its latent shape (T, H, W), and what it costs, in FLOPs.

    Args:
        config: sizes of the model. text_tokens: length that captions are padded to.
        sequence: ranks that share a sample's tokens. lora: adapters of the blocks, where they alone are trained.
    """

    config: DiTConfig
    text_tokens: int
    sequence: int
    lora: LoraSection | None = None

    @classmethod
    def of(cls, run: TrainConfig) -> "SampleCost":
        """Returns the costs of a run's samples."""
        return cls(run.model.dit(), run.data.max_text_tokens, run.parallel.sequence, run.lora)

    unit = "FLOP"

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """Counts the tokens that one device holds of a sample."""
        return -(-patch_grid(*shape).tokens // self.sequence)

    def cost(self, shape: tuple[int, int, int]) -> float:
        """Counts the model FLOPs of a sample's forward and backward pass, over all devices."""
        return train_flops(self.config, patch_grid(*shape).tokens, self.text_tokens, lora=self.lora)
