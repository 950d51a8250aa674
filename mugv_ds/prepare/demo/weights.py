"""Small weights for the demo of a preparation: a codec that is fitted on its footage, and a T5 that is drawn."""

import string
from pathlib import Path

import cv2
import numpy as np
import torch

from mugv_ds.models.codec import LinearCodec
from mugv_ds.prepare.demo.footage import shot

CHANNELS = 64  # of the text features

_SHOTS, _FRAMES, _SIZE = range(1, 13), 48, (96, 160)
_WORDS = (
    "a",
    "the",
    "of",
    "in",
    "video",
    "picture",
    "person",
    "walking",
    "scene",
    "drawn",
    "colours",
    "drift",
    "over",
    "it",
)


def write_codec(path: Path) -> None:
    """Fits a `LinearCodec` on drawn shots and writes it."""
    height, width = _SIZE
    shots = [
        [cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in shot(seed, _FRAMES)]
        for seed in _SHOTS
    ]
    pixels = torch.from_numpy(np.array(shots)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    LinearCodec.fit(pixels).save(path)


def write_t5(folder: Path) -> None:
    """Writes a T5 encoder of two layers with random weights, and a tokenizer of letters and a few words."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    letters = [*string.ascii_letters, *string.digits, *string.punctuation]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces = [(f"▁{word}", -2.0) for word in _WORDS] + [("▁", -4.0), *((letter, -5.0) for letter in letters)]
    tokenizer = T5Tokenizer(vocab=special + pieces, extra_ids=0)
    tokenizer.save_pretrained(folder)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=CHANNELS,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        T5EncoderModel(config).save_pretrained(folder)
