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
from mugv_ds.models.text import PUBLISHED_T5, HashTextEncoder, T5TextEncoder, load_text_encoder
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


def rewrite(folder, change) -> None:
    """Changes the weights of a folder."""
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors", {"format": "pt"})


def test_the_info_names_the_encoder(t5):
    info = t5.info
    assert (info.kind, info.name, info.revision, info.dtype, info.max_tokens) == ("t5", "tiny_t5", None, "float32", 300)
    half = T5TextEncoder(TINY, dtype=torch.bfloat16, max_tokens=20).info
    assert (half.dtype, half.max_tokens, half.fingerprint) == ("bfloat16", 20, info.fingerprint)


@pytest.mark.long
def test_an_encoder_of_the_hubs_cache_is_called_as_there(tmp_path, t5, monkeypatch):
    commit = "0123456789abcdef" * 2 + "01234567"
    folder = shutil.copytree(TINY, tmp_path / f"models--someone--t5-tiny/snapshots/{commit}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for source in ((folder,), ("someone/t5-tiny", commit)):
        info = T5TextEncoder(*source).info
        assert (info.name, info.revision) == ("someone/t5-tiny", commit) and info.makes_same(t5.info)


def test_the_fingerprint_is_that_of_what_is_computed(folder, t5):
    """Where the files lie, their cut and dtype, the tied embedding's name and a decoder beside do not matter."""
    weights = load_file(folder / "model.safetensors")
    embedding = weights.pop("shared.weight", None)
    embedding = weights.pop("encoder.embed_tokens.weight", embedding)
    weights = {name: value.bfloat16() for name, value in weights.items()} | {"decoder.x": torch.zeros(3)}
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, folder / file, {"format": "pt"})
    save_file({"shared.weight": embedding.bfloat16()}, folder / "model-00003-of-00003.safetensors", {"format": "pt"})
    placed = {name: file for file, held in shards.items() for name in held}
    placed["shared.weight"] = "model-00003-of-00003.safetensors"
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    info = T5TextEncoder(folder).info
    assert info.fingerprint == t5.info.fingerprint and info.dtype == "bfloat16", "fp32 of weights that were rounded"


def test_another_model_has_another_fingerprint(folder, t5):
    key = "encoder.block.1.layer.0.SelfAttention.q.weight"
    rewrite(folder, lambda weights: weights | {key: weights[key] * 1.01})
    assert not T5TextEncoder(folder).info.makes_same(t5.info)
    shutil.copy(TINY / "model.safetensors", folder)
    assert T5TextEncoder(folder).info.makes_same(t5.info)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"relative_attention_max_distance": 64}))
    assert not T5TextEncoder(folder).info.makes_same(t5.info)


def test_the_encoder_of_a_model_is_loaded_by_its_width(t5):
    loaded = load_text_encoder(TINY, channels=32, max_tokens=20, dtype=torch.bfloat16)
    assert isinstance(loaded, T5TextEncoder) and loaded.max_tokens == 20 and loaded.info.dtype == "bfloat16"
    demo = load_text_encoder("hash", channels=64, max_tokens=40)
    assert isinstance(demo, HashTextEncoder) and (demo.channels, demo.max_tokens) == (64, 40)
    with pytest.raises(InputError, match="tiny_t5: makes features of width 32, and the model takes 4096"):
        load_text_encoder(TINY, channels=4096, max_tokens=300)
    with pytest.raises(InputError, match="needs a revision"):
        load_text_encoder(PUBLISHED_T5[0], channels=4096, max_tokens=300)
