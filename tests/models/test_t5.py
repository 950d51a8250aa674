"""The T5 encoder against what the published code computed."""

import json
import logging
import shutil
import socket

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mugv_ds.config.errors import InputError
from mugv_ds.models.text import PUBLISHED_T5, T5TextEncoder
from tests.helpers.records import GOLDEN, relative

TINY = GOLDEN / "tiny_t5"


@pytest.fixture(scope="module")
def record() -> tuple[list[str], dict[str, torch.Tensor]]:
    """The texts, and the published ids, features and mask."""
    with safe_open(GOLDEN / "text.safetensors", "pt") as file:
        return json.loads(file.metadata()["texts"]), {key[4:]: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def t5() -> T5TextEncoder:
    return T5TextEncoder(TINY)


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny encoder that a test may damage."""
    return shutil.copytree(TINY, tmp_path / "t5")


def test_ids_features_and_mask_match_the_published_code(t5, record, caplog):
    texts, r = record
    with caplog.at_level(logging.WARNING):
        features, mask = t5(texts)
    assert [warning.message for warning in caplog.records] == ["1 of 4 texts are cut to 300 tokens"]
    for ids, expected in zip(t5.tokens(texts), r["ids"], strict=True):
        assert ids + [0] * (300 - len(ids)) == expected.tolist()
    assert mask.dtype == torch.bool and torch.equal(mask, r["mask"].bool())
    assert mask.sum(1).max() == 300 > mask.sum(1).min()
    assert features.dtype == torch.float32 and features.shape == (4, t5.max_tokens, t5.channels) == (4, 300, 32)
    assert relative(features[mask], r["y"][:, 0][mask]) <= 2e-5
    assert not features[~mask].any()


def test_batches_change_neither_order_nor_features(t5, record):
    texts = [text for text in record[0] for _ in range(3)]
    features, mask = T5TextEncoder(TINY, batch_size=2)(texts)
    alone = [t5([text]) for text in texts]
    assert torch.equal(mask, torch.cat([one[1] for one in alone]))
    assert relative(features, torch.cat([one[0] for one in alone])) <= 2e-5


def test_bf16_is_within_its_rounding(record):
    texts, r = record
    features, mask = T5TextEncoder(TINY, dtype=torch.bfloat16)(texts)
    assert features.dtype == torch.float32
    assert 1e-4 < relative(features[mask], r["y"][:, 0][mask]) < 0.05


def test_offloading_changes_nothing(t5, record, tmp_path):
    texts, _ = record
    features, _ = T5TextEncoder(TINY, device_map="auto", offload_folder=tmp_path)(texts)
    assert torch.equal(features, t5(texts)[0])


def test_nothing_is_asked_of_the_network(monkeypatch, record):
    def refuse(*args):
        raise AssertionError(f"connects to {args[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    T5TextEncoder(TINY)(record[0])
    with pytest.raises(InputError, match=r"nothing is downloaded .*hf download"):
        T5TextEncoder(*PUBLISHED_T5)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_text_is_an_error(t5, text):
    with pytest.raises(InputError, match="text 1 is empty"):
        t5(["a", text])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((TINY,), {"dtype": torch.float16}, "float16: must be float32 or bfloat16"),
        (("DeepFloyd/t5-v1_1-xxl",), {}, "is no folder, and a name needs a revision"),
        ((TINY / "missing",), {}, "is no folder"),
        (("/no/such/folder",), {}, "is no folder"),
        ((TINY,), {"max_tokens": 1}, "max_tokens = 1"),
    ],
)
def test_arguments_that_are_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        T5TextEncoder(*arguments, **options)


def test_pickled_weights_are_refused(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="not a T5 encoder with safetensors"):
        T5TextEncoder(folder)


def test_weights_that_are_not_whole_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights.pop("encoder.block.1.layer.0.SelfAttention.q.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"has no encoder.block.1.layer.0.SelfAttention.q.weight .*not whole"):
        T5TextEncoder(folder)
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(InputError, match="not a T5 encoder"):
        T5TextEncoder(folder)


def test_another_kind_of_model_is_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(InputError, match="a bert model, expected one of t5"):
        T5TextEncoder(folder)


def test_code_in_a_folder_is_not_run(folder):
    (folder / "evil.py").write_text("raise AssertionError('was run')\nclass Config: pass\n")
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(InputError, match="not a T5 encoder"):
        T5TextEncoder(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(folder):
    (folder / "spiece.model").unlink()
    with pytest.raises(InputError, match=r"4 tokens, none for common words, and the model 320; put .* spiece\.model"):
        T5TextEncoder(folder)


def test_features_that_are_not_finite_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["encoder.final_layer_norm.weight"][3] = torch.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"not finite in torch.float32 for 'a red circle'"):
        T5TextEncoder(folder)(["a red circle"])
