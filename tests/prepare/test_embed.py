"""Text features are those of the encoder, trimmed; units are all or nothing and give the same bytes again."""

from pathlib import Path

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from mugv_ds.config.prepare_schema import EmbedSection
from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.data.sample import read_text
from mugv_ds.models.text import NEGATIVE_PROMPT, HashTextEncoder, T5TextEncoder
from mugv_ds.prepare.embed import NULL_TEXT_PATH, Embedder, extend_text_plan, text_unit_of, write_null_text
from mugv_ds.prepare.rows import CAPTION, EMBED_PLAN

TINY_T5 = Path(__file__).parents[1] / "golden/tiny_t5"
SECTION = EmbedSection(text_encoder=str(TINY_T5), channels=32, max_tokens=24, suffix=" score: 6.0.", dtype="bfloat16")
CAPTIONS = {
    "a": "A red circle moves left.",
    "b": "One.",
    "c": "  ",
    "d": None,
    "e": "a very long caption of a red circle and a green square that move to the left and right and up and down again",
}


@pytest.fixture(scope="module")
def encoder() -> T5TextEncoder:
    return T5TextEncoder(TINY_T5, dtype=torch.bfloat16, max_tokens=24)


def unit():
    rows = pa.Table.from_pylist([{"clip": clip, "caption": text} for clip, text in CAPTIONS.items()], CAPTION)
    plan = extend_text_plan(EMBED_PLAN.empty_table(), [(3, reversed(CAPTIONS))], SECTION)
    return text_unit_of(plan, lambda step, part, columns: {("caption", 3): rows}[step, part].select(columns))


def test_features_are_the_encoders_without_padding(encoder, tmp_path):
    rows = {row["clip"]: row for row in Embedder(encoder, tmp_path, SECTION)(unit()).to_pylist()}
    assert rows["c"]["error"] == rows["d"]["error"] == "no caption" and rows["c"]["shard"] is None
    stored = load_file(tmp_path / "text_features/u000000.safetensors")
    assert sorted(stored) == ["a", "b", "e"]
    for clip, features in stored.items():
        text = CAPTIONS[clip] + SECTION.suffix
        alone, mask = encoder([text])
        assert features.dtype == torch.bfloat16 and features.shape == (int(mask.sum()), 32)
        torch.testing.assert_close(features.float(), alone[0][mask[0]], rtol=2e-2, atol=2e-2)
        assert rows[clip]["tokens"] == len(features) == min(encoder.length(text), 24)
        assert rows[clip]["cut"] == max(encoder.length(text) - 24, 0)
    assert rows["e"]["cut"] > 0 == rows["b"]["cut"]


def test_a_unit_gives_the_same_bytes_again(encoder, tmp_path):
    outcomes = []
    for name in ("one", "two"):
        rows = Embedder(encoder, tmp_path / name, SECTION)(unit())
        outcomes.append((rows.to_pylist(), (tmp_path / name / unit().shard).read_bytes()))
    assert outcomes[0] == outcomes[1]


def test_a_key_follows_from_captions_suffix_and_encoder(encoder):
    known = unit()
    changed = type(known)(0, (("a", "Another caption."), *known.captions[1:]))
    keys = {
        known.key(encoder.info, SECTION),
        changed.key(encoder.info, SECTION),
        known.key(encoder.info, SECTION.model_copy(update={"suffix": ""})),
        known.key(T5TextEncoder(TINY_T5, dtype=torch.bfloat16, max_tokens=20).info, SECTION),
    }
    assert len(keys) == 4
    assert known.key(encoder.info, SECTION.model_copy(update={"device": "cpu", "shard_mb": 1})) == known.key(
        encoder.info, SECTION
    )


def test_a_plan_is_added_to_and_units_are_as_large_as_asked_for():
    section = SECTION.model_copy(update={"channels": 4096, "max_tokens": 300, "shard_mb": 5})
    first = extend_text_plan(EMBED_PLAN.empty_table(), [(0, ["c", "a"]), (1, ["b"])], section)
    assert first.to_pydict() == {"unit": [0, 0, 1], "clip": ["a", "c", "b"], "part": [0, 0, 1]}
    more = extend_text_plan(first, [(0, ["a", "c", "d"]), (1, ["b", "e"])], section)
    assert more.slice(0, 3).equals(first) and more["clip"].to_pylist()[3:] == ["d", "e"]
    assert more["unit"].to_pylist()[3:] == [2, 2]


def test_the_null_text_is_what_the_trainer_reads(encoder, tmp_path):
    write_null_text(encoder, tmp_path, SECTION)
    first = (tmp_path / NULL_TEXT_PATH).read_bytes()
    text, mask = read_text(tmp_path / NULL_TEXT_PATH, 32, 24)
    expected, expected_mask = encoder([NEGATIVE_PROMPT])
    assert mask.equal(expected_mask[0]) and text.equal(expected[0].bfloat16().float())
    assert read_text_encoder(tmp_path) == encoder.info
    write_null_text(encoder, tmp_path, SECTION)
    assert (tmp_path / NULL_TEXT_PATH).read_bytes() == first


def test_the_encoder_without_weights_cannot_cut_and_says_so(tmp_path):
    encoder = HashTextEncoder(16, 6)
    section = EmbedSection(text_encoder="hash", channels=16, max_tokens=6)
    rows = Embedder(encoder, tmp_path, section)(unit()).to_pylist()
    assert [row["tokens"] for row in rows] == [5, 1, None, None, None]
    assert "at most 6 are taken" in rows[4]["error"]
