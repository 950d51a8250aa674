"""FLOPs of the model in closed form, for MFU, HFU and the balance of pipeline stages. A multiply-add counts as two.

Model FLOPs (MFU) count no recomputation. Hardware FLOPs (HFU) also count the parts of the forward pass that
`parallel.activation_checkpointing` runs again, and KTO's forward pass for its reference point; neither counts what a
fused attention kernel recomputes inside itself.
"""

from dataclasses import dataclass
from typing import NamedTuple

from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.models.rope import patch_grid

# The parts of a block (`block_parts`) that the backward pass runs again, by `parallel.activation_checkpointing`. They
# are the segments into which `layers.Block.forward` cuts a block.
RECOMPUTED = {
    "off": (),
    "light": ("between", "cross_attention"),
    "selective": ("between", "cross_attention", "qkv", "feed_forward"),
    "full": ("between", "cross_attention", "qkv", "feed_forward", "self_attention"),
}


def block_parts(config: DiTConfig, tokens: int, text_tokens: int) -> dict[str, float]:
    """Returns the forward FLOPs of one block for one sample by part, without the keys and values of the text.

    Args:
        tokens: N, the length of the sequence. text_tokens: L.
    """
    width = config.hidden_size
    return {
        "qkv": 6.0 * tokens * width**2,
        "between": 6.0 * tokens * width**2,  # self-attention's o 2, cross-attention's q 2 and o 2
        "cross_attention": 4.0 * tokens * text_tokens * width,
        "feed_forward": 16.0 * tokens * width**2,
        "self_attention": 4.0 * tokens**2 * width,
    }


def block_flops(config: DiTConfig, tokens: int, text_tokens: int) -> float:
    """Returns the forward FLOPs of one block for one sample: N · (28·D² + 4·N·D + 4·L·D)."""
    return sum(block_parts(config, tokens, text_tokens).values())


def recomputed_flops(config: DiTConfig, tokens: int, text_tokens: int, recompute: str) -> float:
    """Returns the FLOPs of one block that its backward pass runs again, for one sample.

    This counts compiled segments, which run again whole. Eager PyTorch stops before the last linear of cross-attention,
    whose output nothing needs, and so computes 2·D² a token less in "light" and "selective".

    Args:
        recompute: see `layers.Block.forward`.
    """
    parts = block_parts(config, tokens, text_tokens)
    return sum(parts[name] for name in RECOMPUTED[recompute])


def layer_flops(config: DiTConfig, tokens: int, text_tokens: int) -> list[float]:
    """Returns the forward FLOPs for one sample of the embedders, each block and the final layer: depth + 2 numbers."""
    width, patch = config.hidden_size, 4 * config.in_channels
    embed = 2.0 * tokens * patch * width + 2.0 * text_tokens * width * (config.caption_channels + width)
    final = 2.0 * tokens * width * 2 * patch
    return [embed, *[block_flops(config, tokens, text_tokens)] * config.depth, final]


def train_flops(config: DiTConfig, tokens: int, text_tokens: int, recompute: str = "off") -> float:
    """Returns the FLOPs of one sample's forward and backward pass: three times the forward, and what is recomputed.

    Args:
        recompute: see `layers.Block.forward`. With "off" the result is the model FLOPs (MFU), whatever the run
            recomputes; with the run's own level it is the hardware FLOPs (HFU).
    """
    again = config.depth * recomputed_flops(config, tokens, text_tokens, recompute)
    return 3.0 * sum(layer_flops(config, tokens, text_tokens)) + again


class StepFlops(NamedTuple):
    """FLOPs of one optimizer step, over all devices: of the model, and with all that the hardware runs beside."""

    model_flops: float
    hardware_flops: float


def step_flops(run: TrainConfig, shape: tuple[int, int, int], *, samples: int, companions: int) -> StepFlops:
    """Counts the FLOPs of an optimizer step.

    Args:
        shape: latent (T, H, W) of its samples.
        samples: of the step, all together. companions: those of them that are of the SFT set of a preference run, over
            which KTO does not run forward once more.
    """
    sizes = run.model.dit(), patch_grid(*shape).tokens, run.data.max_text_tokens
    measured = samples - companions if run.preference is not None and run.preference.objective == "kto" else 0
    again = measured * sum(layer_flops(*sizes))
    return StepFlops(
        samples * train_flops(*sizes),
        samples * train_flops(*sizes, run.parallel.activation_checkpointing) + again,
    )


@dataclass(frozen=True)
class SampleCost:
    """What one sample asks of a device, by its latent shape (T, H, W).

    Args:
        config: sizes of the model. text_tokens: length that captions are padded to.
        sequence: ranks that share a sample's tokens.
    """

    config: DiTConfig
    text_tokens: int
    sequence: int

    @classmethod
    def of(cls, run: TrainConfig) -> "SampleCost":
        """Returns the costs of a run's samples."""
        return cls(run.model.dit(), run.data.max_text_tokens, run.parallel.sequence)

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """Counts the tokens that one device holds of a sample."""
        return -(-patch_grid(*shape).tokens // self.sequence)

    def flops(self, shape: tuple[int, int, int]) -> float:
        """Counts the model FLOPs of a sample's forward and backward pass, over all devices."""
        return train_flops(self.config, patch_grid(*shape).tokens, self.text_tokens)
