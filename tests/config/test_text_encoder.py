"""What made text features is written, read and compared."""

import json
import logging

import pytest

from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.config.text_encoder import (
    TEXT_ENCODER_NAME,
    TextEncoderInfo,
    agree,
    check_text_encoder,
    read_text_encoder,
    write_text_encoder,
)

XXL = TextEncoderInfo(
    kind="t5", name="a/xxl", revision="23ed28cddf2348992461", dtype="float32", max_tokens=300, fingerprint="a" * 64
)
SHOWN = "t5 a/xxl at 23ed28cddf23 (float32, 300 tokens, fingerprint aaaaaaaaaaaa)"


def changed(**values) -> TextEncoderInfo:
    return XXL.model_copy(update=values)


def test_what_is_written_is_read_and_a_folder_without_it_claims_nothing(tmp_path):
    assert read_text_encoder(tmp_path) is None
    write_text_encoder(tmp_path, XXL)
    assert read_text_encoder(tmp_path) == XXL
    assert json.loads((tmp_path / "text_encoder.json").read_text())["revision"] == XXL.revision


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{", "content: Invalid JSON"),
        ("[]", "content: Input should be an object"),
        (json.dumps(XXL.model_dump() | {"max_tokens": "300"}), "max_tokens: Input should be a valid integer"),
        (json.dumps(XXL.model_dump() | {"fingerprint": "a"}), "fingerprint: String should match"),
        (json.dumps(XXL.model_dump() | {"more": 1}), "more: Extra inputs are not permitted"),
        (" " * 70_000, "larger than 65,536 bytes"),
    ],
)
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, content, complaint):
    (tmp_path / TEXT_ENCODER_NAME).write_text(content)
    with pytest.raises(InputError, match=complaint) as error:
        read_text_encoder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/text_encoder.json: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("values", [{"fingerprint": "b" * 64}, {"max_tokens": 200}, {"kind": "hash"}])
def test_another_encoder_is_refused_with_both_named(values):
    other = changed(**values)
    with pytest.raises(CheckpointError) as error:
        agree({"none": None, "one": XXL, "same": changed(), "two": other}, "use one", CheckpointError)
    assert str(error.value) == f"one: text features of {SHOWN}; two: of {other}; use one"


def test_another_name_is_the_same_encoder_and_another_dtype_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        assert agree({"one": XXL, "two": changed(name="copy", revision=None)}, "") == XXL
        assert not caplog.records
        assert agree({"none": None, "one": XXL, "two": changed(dtype="bfloat16")}, "") == XXL
    (record,) = caplog.records
    assert f"one: text features of {SHOWN}; two: of t5 a/xxl" in record.message and "(bfloat16, 300" in record.message


def test_nobody_says_anything():
    assert agree({"one": None, "two": None}, "") is None


@pytest.mark.parametrize("weights", [".", "dit.pt"])
def test_prompts_are_held_against_what_weights_were_trained_on(tmp_path, weights):
    assert check_text_encoder(tmp_path / weights, XXL) is None
    write_text_encoder(tmp_path, XXL)
    assert check_text_encoder(tmp_path / weights, changed(name="copy")) == XXL
    with pytest.raises(InputError, match=r"prompts: of t5 a/xxl .*200 tokens.*; encode prompts as"):
        check_text_encoder(tmp_path / weights, changed(max_tokens=200))
