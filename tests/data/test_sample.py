import os
import pickle
import re
import zipfile
from pathlib import Path

import pytest
import torch

from mugv_ds.data.manifest import PathError, open_index
from mugv_ds.data.sample import (
    LATENT_SCALE,
    LATENT_SHIFT,
    SampleError,
    UnsafeFileError,
    read_latent,
    read_row,
    read_text,
)

SHAPE = (2, 4, 6)
CHANNELS, TOKENS = 8, 5


def latent(dtype=torch.float32):
    return torch.randn(24, *SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def text(length=3, channels=CHANNELS, dtype=torch.float32):
    y = torch.arange(length * channels, dtype=dtype).reshape(1, 1, length, channels)
    return {"y": y, "mask": torch.tensor([[1] * (length - 1) + [0]])}


def with_value(value):
    z = latent()
    z[3, 1, 2, 2] = value
    return z


def compressed(path):
    """Writes a good latent as a compressed archive, in which 1 MB can stand for 1 GB."""
    torch.save(latent(), path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


def cut(path, share):
    torch.save(latent(), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def bomb():
    return torch.zeros(1).as_strided((24, 1000, 1000, 1000), (0, 0, 0, 0))


LATENTS = {
    "missing": (lambda path: None, "missing"),
    "0 bytes": (lambda path: path.touch(), "0 bytes"),
    "cut in the middle": (lambda path: cut(path, 0.5), "truncated"),
    "cut at the end": (lambda path: cut(path, 0.99), "truncated"),
    "cut at the start": (lambda path: cut(path, 0.001), "not a file of torch.save|truncated"),
    "lfs": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "Git LFS"),
    "html": (lambda path: path.write_text("\n<!DOCTYPE html><html>404</html>"), "HTML"),
    "text": (lambda path: path.write_text("hello"), "not a file of torch.save"),
    "other archive": (lambda path: zipfile.ZipFile(path, "w").writestr("a", "b"), "not an archive of torch.save"),
    "dict": ({"z": torch.zeros(24, *SHAPE)}, "a dict, expected a tensor"),
    "list": ([1, 2], "a list, expected a tensor"),
    "rank 5": (torch.zeros(1, 24, *SHAPE), r"shape \[1, 24, 2, 4, 6\], expected \[24, T, H, W\]"),
    "rank 3": (torch.zeros(24, 4, 6), r"shape \[24, 4, 6\]"),
    "C = 16": (torch.zeros(16, *SHAPE), r"shape \[16, 2, 4, 6\]"),
    "T = 0": (torch.zeros(24, 0, 4, 6), r"shape \[24, 0, 4, 6\]"),
    "other shape": (torch.zeros(24, 2, 4, 7), r"\[2, 4, 7\], but the manifest means \[2, 4, 6\]"),
    "NaN": (with_value(float("nan")), "1 NaN and 0 Inf of 1152"),
    "Inf": (with_value(float("-inf")), "0 NaN and 1 Inf of 1152"),
    "int8": (torch.zeros(24, *SHAPE, dtype=torch.int8), "dtype torch.int8"),
    "float64": (torch.zeros(24, *SHAPE, dtype=torch.float64), "dtype torch.float64"),
    "float8": (torch.zeros(24, *SHAPE).to(torch.float8_e4m3fn), "float8|not a plain dense tensor"),
    "complex": (torch.zeros(24, *SHAPE, dtype=torch.complex64), "complex|not a plain dense tensor"),
    "sparse": (torch.zeros(24, *SHAPE).to_sparse(), "not a plain dense tensor"),
    "meta": (torch.zeros(24, *SHAPE, device="meta"), "not a plain dense tensor"),
    "parameter": (torch.nn.Parameter(torch.zeros(24, *SHAPE)), "not a plain dense tensor"),
    "shape bomb": (bomb(), "claims 96000000000 bytes but the file stores 4"),
    "small view": (torch.zeros(100, 24, *SHAPE)[7], "a view of 4608 bytes into a stored tensor of 460800"),
    "compressed": (compressed, "compressed"),
}


def put(content, path):
    content(path) if callable(content) else torch.save(content, path)


@pytest.mark.parametrize(("content", "message"), LATENTS.values(), ids=LATENTS)
def test_bad_latent(tmp_path, content, message):
    path = tmp_path / "x.pt"
    put(content, path)
    with pytest.raises(SampleError) as error:
        read_latent(path, SHAPE)
    file, _, reason = str(error.value).partition(": ")
    assert file == str(path)
    assert re.search(message, reason)
    assert not isinstance(error.value, UnsafeFileError)


TEXTS = {
    "missing": (lambda path: None, "missing"),
    "tensor": (torch.zeros(1, 1, 3, CHANNELS), "a Tensor, expected a dict"),
    "no mask": ({"y": text()["y"]}, "no 'mask'"),
    "no y": ({"mask": text()["mask"]}, "no 'y'"),
    "mask is a list": (text() | {"mask": [1, 1, 0]}, "mask: a list"),
    "wrong width": (text(channels=CHANNELS - 1), r"y has shape \[1, 1, 3, 7\], expected \[1, 1, L, 8\]"),
    "rank 3": (text() | {"y": text()["y"][0]}, r"y has shape \[1, 3, 8\]"),
    "batch of 2": (text() | {"y": torch.zeros(2, 1, 3, CHANNELS)}, r"y has shape \[2, 1, 3, 8\]"),
    "L = 0": ({"y": torch.zeros(1, 1, 0, CHANNELS), "mask": torch.zeros(1, 0)}, "all zero"),
    "mask too short": (text() | {"mask": torch.ones(1, 2)}, r"mask has shape \[1, 2\], y has 3 tokens"),
    "mask of rank 1": (text() | {"mask": torch.ones(3)}, r"mask has shape \[3\]"),
    "all-zero mask": (text() | {"mask": torch.zeros(1, 3)}, "all zero"),
    "mask of 2": (text() | {"mask": torch.tensor([[1, 2, 0]])}, "other than 0 and 1"),
    "mask of NaN": (text() | {"mask": torch.tensor([[1, float("nan"), 0]])}, "other than 0 and 1"),
    "complex mask": (text() | {"mask": torch.ones(1, 3, dtype=torch.complex64)}, "complex|not a plain dense"),
    "too long": (text(TOKENS + 1), "6 tokens, at most 5"),
    "integer": (text() | {"y": text()["y"].long()}, "y: dtype torch.int64"),
    "NaN": (text() | {"y": torch.full((1, 1, 3, CHANNELS), torch.nan)}, "y: 24 NaN"),
    "shape bomb": (
        text() | {"y": torch.zeros(1).as_strided((1, 1, 10**10, CHANNELS), (0, 0, 0, 0))},
        "claims 320000000000 bytes but the file stores 4",
    ),
    "bomb as mask": (text() | {"mask": torch.ones(1).as_strided((1, 10**10), (0, 0))}, "mask: shape .* claims"),
    "small view": (text() | {"y": torch.zeros(1, 1, 100, CHANNELS)[:, :, :3]}, "y: a view"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
def test_bad_text(tmp_path, content, message):
    path = tmp_path / "x_text.pt"
    put(content, path)
    with pytest.raises(SampleError) as error:
        read_text(path, CHANNELS, TOKENS)
    file, _, reason = str(error.value).partition(": ")
    assert file == str(path)
    assert re.search(message, reason)


def save_protocol_4(value, path):
    torch.save(value, path, pickle_protocol=4)


PAYLOADS = {
    "torch.save": torch.save,
    "inside a dict": lambda payload, path: torch.save(text() | {"note": payload}, path),
    "protocol 4": save_protocol_4,
    "bare pickle": lambda payload, path: path.write_bytes(pickle.dumps(payload)),
    "legacy format": lambda payload, path: torch.save(payload, path, _use_new_zipfile_serialization=False),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("read", [lambda p: read_latent(p, SHAPE), lambda p: read_text(p, CHANNELS, TOKENS)])
@pytest.mark.parametrize("save", PAYLOADS.values(), ids=PAYLOADS)
@pytest.mark.parametrize("function", [os.system, eval, torch.hub.load, bytearray])
def test_no_code_runs(tmp_path, function, save, read):
    sentinel, path = tmp_path / "sentinel", tmp_path / "x.pt"
    argument = 10**14 if function is bytearray else f"touch {sentinel}"
    save(Call(function, argument), path)
    with pytest.raises(UnsafeFileError, match=str(path)):
        read(path)
    assert not sentinel.exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_latent_is_read_as_it_is_stored(tmp_path, dtype):
    path = tmp_path / "x.pt"
    torch.save(latent(dtype), path)
    got = read_latent(path, SHAPE)
    assert got.dtype == torch.float32
    assert got.is_contiguous()
    assert torch.equal(got, latent(dtype).float())
    assert str(path) not in Path("/proc/self/maps").read_text()  # the result does not hold the file


def test_latent_of_any_memory_order(tmp_path):
    torch.save(latent().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0), tmp_path / "x.pt")
    got = read_latent(tmp_path / "x.pt", SHAPE)
    assert torch.equal(got, latent())
    assert got.is_contiguous()


@pytest.mark.parametrize("mask_dtype", [torch.int64, torch.bool, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_text_is_padded(tmp_path, dtype, mask_dtype):
    features = text(dtype=dtype)
    torch.save(features | {"mask": features["mask"].to(mask_dtype)}, tmp_path / "x.pt")
    y, mask = read_text(tmp_path / "x.pt", CHANNELS, TOKENS)
    assert (y.dtype, y.shape) == (torch.float32, (TOKENS, CHANNELS))
    assert torch.equal(y[:3], features["y"][0, 0].float())
    assert y[3:].count_nonzero() == 0
    assert mask.tolist() == [True, True, False, False, False]


def test_text_may_be_a_view_of_its_padded_form(tmp_path):
    features = text(TOKENS)
    torch.save({"y": features["y"][:, :, :2], "mask": features["mask"][:, :2]}, tmp_path / "x.pt")
    assert torch.equal(read_text(tmp_path / "x.pt", CHANNELS, TOKENS)[0][:2], features["y"][0, 0, :2])


def dataset(folder, source):
    torch.save(latent(), folder / "a.pt")
    torch.save(text(), folder / "t.pt")
    csv = folder / "train.csv"
    csv.write_text(f"sample_id,source,latent_path,text_feat_path\na,{source},a.pt,t.pt\n")
    return open_index(csv)


def test_generated_is_not_normalised_and_real_is_once(tmp_path):
    for source in ("generated", "real"):
        (tmp_path / source).mkdir()
    sizes = {"channels": CHANNELS, "max_text_tokens": TOKENS}
    generated = read_row(dataset(tmp_path / "generated", "generated"), 0, **sizes)
    real = read_row(dataset(tmp_path / "real", "real"), 0, **sizes)
    assert torch.equal(generated.latent, latent())
    for channel in (0, 4, 23):
        expected = (latent()[channel] - LATENT_SHIFT[channel]) / LATENT_SCALE[channel]
        torch.testing.assert_close(real.latent[channel], expected, rtol=0, atol=0)
    assert real.latent.dtype == torch.float32
    assert (real.row.sample_id, real.text.shape, real.text_mask.sum()) == ("a", (TOKENS, CHANNELS), 2)


def test_published_statistics():
    """The buffers `shift` and `scale` in the record of the published VideoVAE, channel by channel."""
    shift = [
        -0.0194091796875, 0.09619140625, -0.796875, 0.1591796875, -0.2578125, 0.359375, -0.3203125, -0.287109375,
        -0.0069580078125, 0.3046875, 0.310546875, -0.451171875, -0.1728515625, 0.369140625, 0.2177734375,
        -3.075599670410156e-05, 0.1630859375, -0.267578125, -0.1962890625, -0.1298828125, -0.28515625, -0.515625,
        0.5859375, -0.34375,
    ]  # fmt: skip
    scale = [
        0.8817, 0.6523, 0.9152, 1.2117, 3.3516, 0.7528, 0.8177, 0.8637, 0.9075, 2.8875, 0.898, 1.1202, 1.0003, 2.5163,
        0.6652, 1.2573, 0.7279, 1.0777, 1.5159, 0.868, 1.1859, 1.0484, 2.475, 1.5881,
    ]  # fmt: skip
    assert LATENT_SHIFT.tolist() == torch.tensor(shift).tolist()
    assert LATENT_SCALE.tolist() == torch.tensor(scale).tolist()


def test_text_can_be_left_unread(tmp_path):
    index = dataset(tmp_path, "real")
    (tmp_path / "t.pt").unlink()
    sample = read_row(index, 0, channels=CHANNELS, max_text_tokens=TOKENS, with_text=False)
    assert sample.text is None
    assert sample.text_mask is None
    with pytest.raises(SampleError, match=r"t\.pt: missing"):
        read_row(index, 0, channels=CHANNELS, max_text_tokens=TOKENS)


def test_path_is_checked_again_when_read(tmp_path):
    root = tmp_path / "root"
    root.mkdir()
    index = dataset(root, "real")
    (root / "a.pt").rename(tmp_path / "outside.pt")
    (root / "a.pt").symlink_to(tmp_path / "outside.pt")
    with pytest.raises(PathError, match="leads out"):
        read_row(index, 0, channels=CHANNELS, max_text_tokens=TOKENS)


def test_failing_file_system_is_not_a_bad_sample(tmp_path, monkeypatch):
    torch.save(latent(), tmp_path / "x.pt")

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match="Input/output error"):
        read_latent(tmp_path / "x.pt", SHAPE)
