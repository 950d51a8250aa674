"""Text features: the prompts' fixed parts, and an encoder that needs no weights.

Shape suffixes: B texts, L text tokens, C width of the features.
"""

import hashlib
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Published sampler defaults: the unconditional branch of guidance, and what is appended to every prompt.
NEGATIVE_PROMPT = (
    "ugly, blurry, lowres, bad anatomy, bad hands, text, error, missing fingers, extra digit, fewer digits, cropped, "
    "worst quality, low quality, normal quality, jpeg artifacts, signature, watermark, username, blurry"
)
PROMPT_SUFFIX = " aesthetic score: 6.0."

_POSITION_SCALE = 0.1  # positions tell word orders apart and must not drown the words


class HashTextEncoder:
    """Encodes texts without weights: each word becomes a fixed random vector, plus a faint sinusoid of its position.

    The same text gives the same features on every machine. It is called as the T5 encoder is.

    Args:
        channels: C, the width of the features; even.
        max_tokens: length that texts are padded to.
    Raises:
        ValueError: `channels` is odd or not positive.
    """

    def __init__(self, channels: int, max_tokens: int) -> None:
        if channels < 2 or channels % 2:
            raise ValueError(f"channels must be even and positive, got {channels}")
        self.channels = channels
        self.max_tokens = max_tokens
        self._positions = _POSITION_SCALE * _sinusoid(max_tokens, channels)

    def __call__(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Encodes a batch of texts.

        Returns:
            features fp32 [B, max_tokens, channels], zero beyond the text; mask bool [B, max_tokens], True on words.

        Raises:
            ValueError: a text has no words, or more than `max_tokens`.
        """
        features_BLC = torch.zeros(len(texts), self.max_tokens, self.channels)
        mask_BL = torch.zeros(len(texts), self.max_tokens, dtype=torch.bool)
        for row, text in enumerate(texts):
            words = re.findall(r"\w+", text.lower())
            if not 1 <= len(words) <= self.max_tokens:
                raise ValueError(f"text must have 1 to {self.max_tokens} words, got {len(words)}: {text!r}")
            vectors = torch.stack([_word_vector(word, self.channels) for word in words])
            features_BLC[row, : len(words)] = vectors + self._positions[: len(words)]
            mask_BL[row, : len(words)] = True
        return features_BLC, mask_BL


def save_features(path: str | Path, y: Tensor, mask: Tensor) -> None:
    """Writes one text's features in the published format, without the padding.

    Args:
        path: file to write.
        y: features [max_tokens, C].
        mask: bool [max_tokens], True on real tokens.
    """
    tokens = y[mask].unsqueeze(0).unsqueeze(0)
    torch.save({"y": tokens, "mask": torch.ones(1, tokens.shape[2], dtype=torch.int64)}, path)


def _word_vector(word: str, channels: int) -> Tensor:
    """Draws a standard normal [channels] from a counter-based generator keyed by the word."""
    key = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=16).digest(), "little")
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(channels, dtype=np.float32))


def _sinusoid(length: int, channels: int) -> Tensor:
    """Returns the sinusoidal positions [length, channels] of Vaswani et al. 2017 (section 3.5), cosines first."""
    frequencies = 10000 ** (-torch.arange(channels // 2) / (channels // 2))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
