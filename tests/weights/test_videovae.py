import json
import os
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import save_file

from mugv_ds.config.errors import CheckpointError, InputError
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.videovae import VideoVAE, VideoVAEConfig, check_conv3d, device
from mugv_ds.weights.codec import load_codec
from mugv_ds.weights.videovae import load_video_vae, read_sizes
from tests.helpers.records import load_vae_record

VAE, RECORD, _ = load_vae_record("vae_lengths")


def state(**changes) -> dict:
    """The record's weights; a change of None takes one away."""
    merged = VAE.state_dict() | {name.replace("__", "."): value for name, value in changes.items()}
    return {name: value for name, value in merged.items() if value is not None}


def load(path, **options):
    return load_video_vae(path, VAE.config, **options)


@pytest.mark.parametrize("name", ["vae.pt", "vae.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_saved_is_loaded(tmp_path, name, dtype):
    write = save_file if name.endswith("safetensors") else torch.save
    write({key: value.clone() for key, value in state().items()}, tmp_path / name)
    vae = load(tmp_path / name, dtype=dtype)
    assert not vae.training and not any(parameter.requires_grad for parameter in vae.parameters())
    assert {parameter.dtype for parameter in vae.parameters()} == {dtype}
    assert torch.equal(vae.scale, VAE.scale) and torch.equal(vae.shift, VAE.shift)
    assert all(torch.equal(p, q.to(dtype)) for p, q in zip(vae.parameters(), VAE.parameters(), strict=True))


def test_scales_of_a_bf16_file_are_taken_as_they_are(tmp_path):
    torch.save({key: value.bfloat16() for key, value in state().items()}, tmp_path / "vae.pt")
    vae = load(tmp_path / "vae.pt")
    assert torch.equal(vae.scale, VAE.scale.bfloat16().float()) and vae.scale.dtype == torch.float32
    assert not torch.equal(vae.scale, VAE.scale)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            state(scale=None),
            "has no scale, without which latents cannot be normalised; take the published vae.pt",
        ),
        (state(shift=None, scale=None), "has no shift, scale"),
        (
            state(temporal_vae__quant_conv__conv__bias=None),
            "has no temporal_vae.quant_conv.conv.bias; it is not a whole",
        ),
        (state(temporal_vae__quant_conv__conv__bias=torch.zeros(47)), r"bias is \[47\], the model wants \[48\]"),
        (state(scale=torch.ones(24)), r"scale is \[24\]"),
        (state(scale=torch.zeros(1, 24, 1, 1, 1)), "scale positive"),
        (state(shift=torch.full((1, 24, 1, 1, 1), torch.nan)), "must be finite"),
        (state(shift=torch.zeros(1, 24, 1, 1, 1, dtype=torch.int64)), "shift is torch.int64"),
        (
            state(shift=torch.zeros(1, 1, 1, 1, 1).expand(1, 24, 1, 1, 1)),
            "shift claims elements that the file does not store",
        ),
        (state(shift="0"), "must hold a dict of tensors"),
        (state(other=torch.zeros(1)), "has other, which a VideoVAE of these sizes has not"),
        ({"state_dict": state()}, "must hold a dict of tensors"),
        ([torch.zeros(1)], "must hold a dict of tensors"),
    ],
)
def test_files_that_are_no_vae(tmp_path, content, message):
    torch.save(content, tmp_path / "vae.pt")
    with pytest.raises(CheckpointError, match=rf"vae.pt: .*{message}"):
        load(tmp_path / "vae.pt")


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.safetensors").write_bytes(b"12345678 no header")
    (tmp_path / "bad.pt").write_bytes(b"PK")
    os.mkfifo(tmp_path / "fifo.pt")
    os.mkfifo(tmp_path / "fifo.safetensors")
    for name in ("bad.safetensors", "bad.pt", "fifo.pt", "fifo.safetensors", "missing.pt", "missing.safetensors", ""):
        with pytest.raises(CheckpointError, match=str(tmp_path)):
            load(tmp_path / name)


def test_fp16_is_refused(tmp_path):
    with pytest.raises(InputError, match="float16: must be float32 or bfloat16"):
        load(tmp_path / "vae.pt", dtype=torch.float16)


def test_sizes_stand_beside_the_file_and_are_the_published_ones_without_it(tmp_path):
    assert read_sizes(tmp_path / "vae.pt") == read_sizes(tmp_path) == VideoVAEConfig()
    for name in ("vae.json", "config.json"):
        (tmp_path / name).write_text(json.dumps(asdict(VAE.config)))
    assert read_sizes(tmp_path / "vae.pt") == read_sizes(tmp_path) == VAE.config
    torch.save(state(), tmp_path / "vae.pt")
    assert load_video_vae(tmp_path / "vae.pt").config == VAE.config


@pytest.mark.parametrize(
    "text", ["[]", "{}", "{", '{"block_out_channels": 4}', '{"block_out_channels": [4], "depth": 1}', "[" * 10_000]
)
def test_sizes_that_are_none_are_refused_with_the_file_named(tmp_path, text):
    (tmp_path / "vae.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"vae\.json: must hold the VideoVAE's sizes"):
        read_sizes(tmp_path / "vae.pt")


def test_a_codec_is_told_by_what_its_file_holds(tmp_path):
    torch.save(state(), tmp_path / "vae.pt")
    (tmp_path / "vae.json").write_text(json.dumps(asdict(VAE.config)))
    LinearCodec().save(tmp_path / "codec.safetensors")
    assert isinstance(load_codec(tmp_path / "vae.pt"), VideoVAE)
    assert isinstance(load_codec(tmp_path / "codec.safetensors"), LinearCodec)
    save_file({name: torch.zeros(2) for name in LinearCodec().state_dict()}, tmp_path / "codec.safetensors")
    with pytest.raises(CheckpointError, match=r"codec.safetensors: not a whole codec"):
        load_codec(tmp_path / "codec.safetensors")
    with pytest.raises(CheckpointError, match=r"missing.pt"):
        load_codec(tmp_path / "missing.pt")


def test_the_device_check_passes_here_and_fails_where_the_convolution_is_wrong(monkeypatch):
    assert 1e-4 < check_conv3d("cpu", height=16, width=24, config=VAE.config) < 0.005
    true = torch.nn.functional.conv3d

    def wrong(x, *args, **kwargs):
        result = true(x, *args, **kwargs)
        if x.dtype == torch.bfloat16 and x.shape[2] == 48:
            result[:, :, -1] = 0
        return result

    monkeypatch.setattr(device.F, "conv3d", wrong)
    with pytest.raises(InputError, match=r"conv3d in bf16 is wrong on cpu.*nvidia-cudnn-cu12>=9.15.*float32"):
        check_conv3d("cpu", height=16, width=24, config=VAE.config)
    monkeypatch.setattr(device.F, "conv3d", lambda x, *args, **kwargs: true(x, *args, **kwargs) * torch.nan)
    with pytest.raises(InputError, match="wrong on cpu"):
        check_conv3d("cpu", height=16, width=24, config=VAE.config)
