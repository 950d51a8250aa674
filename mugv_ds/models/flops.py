"""Model FLOPs by closed form: a multiply and an add count two, recomputation counts nothing."""

from mugv_ds.config.model import DiTConfig


def block_flops(config: DiTConfig, tokens: int, text_tokens: int) -> float:
    """Forward FLOPs of one block for one sample: tokens · (28·D² + 4·N·D + 4·L·D)."""
    width = config.hidden_size
    return tokens * (28.0 * width**2 + 4.0 * tokens * width + 4.0 * text_tokens * width)


def layer_flops(config: DiTConfig, tokens: int, text_tokens: int) -> list[float]:
    """Forward FLOPs for one sample of embedders, each block and the final layer: depth + 2 numbers."""
    width, patch = config.hidden_size, 4 * config.in_channels
    embed = 2.0 * tokens * patch * width + 2.0 * text_tokens * width * (config.caption_channels + width)
    final = 2.0 * tokens * width * 2 * patch
    return [embed, *[block_flops(config, tokens, text_tokens)] * config.depth, final]


def train_flops(config: DiTConfig, tokens: int, text_tokens: int) -> float:
    """FLOPs of one sample's forward and backward pass: three forwards."""
    return 3.0 * sum(layer_flops(config, tokens, text_tokens))
