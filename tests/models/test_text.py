import os
import subprocess
import sys

import pytest
import torch

from mugv_ds.config.errors import InputError
from mugv_ds.data.sample import read_text
from mugv_ds.models.text import NEGATIVE_PROMPT, HashTextEncoder, save_features

ENCODE = HashTextEncoder(64, 40)


def test_shapes_mask_and_padding():
    features, mask = ENCODE(["a red circle", NEGATIVE_PROMPT])
    assert features.shape == (2, 40, 64) and features.dtype == torch.float32
    assert mask.shape == (2, 40) and mask.dtype == torch.bool
    assert mask[0].tolist() == [True] * 3 + [False] * 37
    assert not features[~mask].any()


def test_words_have_unit_variance_and_little_in_common():
    features, mask = HashTextEncoder(4096, 40)([NEGATIVE_PROMPT])
    words = features[mask]
    assert words.var(dim=1).sub(1).abs().max() < 0.15
    cosine = torch.nn.functional.cosine_similarity(words[0], words[1], dim=0)
    assert cosine.abs() < 0.1


@pytest.mark.parametrize(
    ("text", "other", "same"),
    [
        ("A Red, circle.", "a red circle", True),
        ("a red circle", "a red  circle\n", True),
        ("a red circle", "a blue circle", False),
        ("red circle blue square", "blue circle red square", False),
        ("aesthetic score: 6.0.", "aesthetic score: 6.5.", False),
    ],
)
def test_words_and_their_order_count(text, other, same):
    (first, second), _ = ENCODE([text, other])
    assert torch.equal(first, second) == same


def test_a_word_is_nearly_the_same_at_any_position():
    (features,), _ = ENCODE(["red big red"])
    assert 0 < (features[0] - features[2]).square().mean() < 0.1


@pytest.mark.long
def test_every_process_gives_the_same_features():
    code = (
        "import sys; from mugv_ds.models.text import HashTextEncoder;"
        "sys.stdout.buffer.write(HashTextEncoder(64, 40)(['a red circle moving left'])[0].numpy().tobytes())"
    )
    outputs = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        )
        for seed in ("1", "2")
    ]
    assert outputs[0].stdout == outputs[1].stdout == ENCODE(["a red circle moving left"])[0].numpy().tobytes()


@pytest.mark.parametrize(
    ("text", "message"), [("word " * 41, "1 to 40 words, got 41"), ("", "got 0"), (" … !", "got 0")]
)
def test_texts_that_cannot_be_encoded(text, message):
    with pytest.raises(InputError, match=message):
        ENCODE(["fine", text])


def test_the_info_is_that_of_width_and_length():
    info = HashTextEncoder(64, 40).info
    assert (info.kind, info.name, info.max_tokens) == ("hash", "of width 64", 40) and info == ENCODE.info
    assert not info.makes_same(HashTextEncoder(66, 40).info)
    assert not info.makes_same(HashTextEncoder(64, 41).info)


@pytest.mark.parametrize("channels", [0, 63])
def test_odd_widths(channels):
    with pytest.raises(ValueError, match="channels must be even"):
        HashTextEncoder(channels, 40)


def test_saved_features_are_what_the_loader_reads(tmp_path):
    features, mask = ENCODE(["a red circle moving left"])
    save_features(tmp_path / "x_text.pt", features[0], mask[0])
    stored = torch.load(tmp_path / "x_text.pt", weights_only=True)
    assert stored["y"].shape == (1, 1, 5, 64)
    assert stored["mask"].tolist() == [[1] * 5]
    text, text_mask = read_text(tmp_path / "x_text.pt", 64, 40)
    assert torch.equal(text, features[0])
    assert torch.equal(text_mask, mask[0])
