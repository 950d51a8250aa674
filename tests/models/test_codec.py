import pytest
import torch

from mugv_ds.models.codec import LinearCodec

SHAPE = (40, 3, 16, 16, 24)  # 40 · 2·2·3 = 480 blocks


@pytest.fixture(scope="module")
def videos() -> torch.Tensor:
    """Videos whose blocks vary in 24 directions only."""
    generator = torch.Generator().manual_seed(0)
    codec = LinearCodec()
    codec.mean.copy_(0.3 * torch.randn(1536, generator=generator))
    codec.basis.copy_(torch.linalg.qr(torch.randn(1536, 24, generator=generator)).Q.T)
    codec.scale.copy_(torch.linspace(0.5, 5, 24))
    return codec.decode(2 + torch.randn(40, 24, 2, 2, 3, generator=generator))


@pytest.fixture(scope="module")
def codec(videos) -> LinearCodec:
    return LinearCodec.fit(videos)


def test_blocks_of_24_directions_come_back_exactly(codec, videos):
    assert videos.shape == SHAPE
    latent = codec.encode(videos)
    assert latent.shape == (40, 24, 2, 2, 3)
    torch.testing.assert_close(codec.decode(latent), videos, atol=1e-4, rtol=1e-4)


def test_latents_have_zero_mean_and_unit_uncorrelated_channels(codec, videos):
    channels = codec.encode(videos).transpose(0, 1).flatten(1)
    torch.testing.assert_close(channels.mean(dim=1), torch.zeros(24), atol=1e-3, rtol=0)
    torch.testing.assert_close(torch.cov(channels, correction=0), torch.eye(24), atol=2e-3, rtol=0)


def test_channels_are_ordered_by_the_pixels_they_explain(codec):
    assert (codec.scale.diff() < 0).all()


def test_any_latent_survives_decoding(codec):
    latent = torch.randn(2, 24, 2, 1, 3)
    torch.testing.assert_close(codec.encode(codec.decode(latent)), latent, atol=1e-4, rtol=1e-4)


def test_a_latent_position_is_its_block_of_pixels(codec):
    latent = torch.zeros(1, 24, 3, 2, 4)
    changed = latent.clone()
    changed[:, :, 2, 1, 3] = 1
    touched = (codec.decode(changed) != codec.decode(latent)).any(dim=1)[0]
    expected = torch.zeros(24, 16, 32, dtype=torch.bool)
    expected[16:24, 8:16, 24:32] = True
    assert not touched[~expected].any()
    assert touched[expected].float().mean() > 0.99


@pytest.mark.parametrize(
    "shape", [(1, 3, 15, 16, 16), (1, 3, 16, 12, 16), (1, 3, 16, 16, 20), (1, 1, 8, 8, 8), (3, 8, 8, 8)]
)
def test_sizes_that_do_not_divide(codec, shape):
    for function in (codec.encode, LinearCodec.fit):
        with pytest.raises(ValueError, match="multiples of 8"):
            function(torch.zeros(shape))


@pytest.mark.parametrize("few", [torch.zeros(40, 3, 8, 8, 8), torch.rand(20, 3, 8, 8, 8)], ids=["uniform", "20 blocks"])
def test_too_little_to_fit(few):
    with pytest.raises(ValueError, match="give more videos"):
        LinearCodec.fit(few)


def test_saved_codec_is_the_same(codec, videos, tmp_path):
    codec.save(tmp_path / "codec.safetensors")
    loaded = LinearCodec.load(tmp_path / "codec.safetensors")
    assert torch.equal(loaded.encode(videos), codec.encode(videos))
    latent = torch.randn(1, 24, 1, 1, 1)
    assert torch.equal(loaded.decode(latent), codec.decode(latent))
