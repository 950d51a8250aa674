"""The VideoVAE's pass in training against its own encode and decode, and what surrounds it."""

import pytest
import torch

from mugv_ds.config import CheckpointError, InputError
from mugv_ds.models.videovae import UNUSED_PARAMETERS, VideoVAE, VideoVAEConfig
from mugv_ds.models.videovae.discriminator import PatchDiscriminator
from mugv_ds.models.videovae.statistics import LatentStatistics
from mugv_ds.models.videovae.training import autoencode, freeze, initial_video_vae, last_layer, load_image_vae
from tests.helpers.records import relative

TINY = VideoVAEConfig((8, 8, 8, 8), 1, 4, 8, 1, 4)


def video(frames: int, side: int = 16, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize(("frames", "window"), [(1, 1), (8, 4), (16, 1), (17, 2), (24, 2), (41, 4)])
def test_the_pass_is_encoding_drawing_and_decoding(frames, window):
    vae, x = initial_video_vae(TINY, seed=0), video(frames)
    latents = -(-frames // 8)
    noise = torch.randn(2, 24, latents, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        made = autoencode(vae, x, noise, window, with_pixels=True)
        mean, logvar = vae.posterior(x)
        drawn = mean + (0.5 * logvar).exp() * noise
        expected = vae.decode(drawn, window=window)  # shift and scale of a new one are 0 and 1
    for found, wanted in ((made.mean, mean), (made.logvar, logvar), (made.latent, drawn), (made.video, expected)):
        assert found.shape == wanted.shape and relative(found, wanted) <= 2e-5


def test_features_of_a_still_are_repeated_and_other_lengths_refused():
    vae = initial_video_vae(TINY, seed=0)
    made = autoencode(vae, video(9), torch.zeros(2, 24, 2, 2, 2), 1, with_pixels=False)
    assert made.video is None and made.feature.shape == made.decoded.shape == (2, 8, 16, 2, 2)
    assert all(torch.equal(made.feature[:, :, 0], made.feature[:, :, copy]) for copy in range(1, 8))
    with pytest.raises(InputError, match="must be 8n or 8n"):
        autoencode(vae, video(10), torch.zeros(2, 24, 2, 2, 2), 1, with_pixels=False)


def gradients(vae: VideoVAE, recompute: bool) -> dict[str, torch.Tensor]:
    vae.spatial_vae.recompute = recompute
    vae.zero_grad()
    made = autoencode(vae, video(9), torch.zeros(2, 24, 2, 2, 2), 1, with_pixels=True)
    (made.video.square().mean() + made.mean.mean()).backward()
    return {name: p.grad.clone() for name, p in vae.named_parameters() if p.grad is not None}


def test_recomputing_the_spatial_blocks_changes_no_bit_and_saves_less():
    """Bytes that autograd keeps are counted as it saves them."""
    vae, kept = initial_video_vae(TINY, seed=0), []
    found = []
    for recompute in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t):
            found.append(gradients(vae, recompute))
        kept.append(sum(sizes))
    assert found[0].keys() == found[1].keys() == {n for n, _ in vae.named_parameters()} - set(UNUSED_PARAMETERS)
    assert not [name for name, value in found[0].items() if not torch.equal(value, found[1][name])]
    assert kept[1] < 0.6 * kept[0]


def test_freezing_leaves_what_learns():
    vae = initial_video_vae(TINY, seed=0)
    unused = set(UNUSED_PARAMETERS) - {"logvar"}
    freeze(vae, spatial=False)
    assert {name for name, p in vae.named_parameters() if not p.requires_grad} == unused
    freeze(vae, spatial=True)
    assert {n for n, p in vae.named_parameters() if p.requires_grad} == {
        n for n, _ in vae.named_parameters() if n.startswith("temporal_vae.") or n == "logvar"
    }
    assert last_layer(vae) is dict(vae.named_parameters())["temporal_vae.decoder.conv_out.conv.weight"]


def test_initial_weights_follow_from_the_seed_alone():
    torch.manual_seed(5)
    first = initial_video_vae(TINY, seed=0).state_dict()
    before = torch.get_rng_state()
    assert all(torch.equal(value, first[name]) for name, value in initial_video_vae(TINY, seed=0).state_dict().items())
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(
        last_layer(initial_video_vae(TINY, seed=1)), first["temporal_vae.decoder.conv_out.conv.weight"]
    )


def test_an_image_vae_of_another_size_is_refused(tmp_path):
    from diffusers import AutoencoderKL

    vae = initial_video_vae(TINY, seed=0)
    with pytest.raises(CheckpointError, match="nowhere: no such folder"):
        load_image_vae(vae, tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="not an image VAE"):
        load_image_vae(vae, tmp_path)
    sizes = {"block_out_channels": (8, 8, 8, 16), "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(**sizes, **blocks).save_pretrained(tmp_path / "wide")
    with pytest.raises(CheckpointError, match=r"not an image VAE for a spatial half of these sizes.*size mismatch"):
        load_image_vae(vae, tmp_path / "wide")


def test_statistics_are_those_of_drawn_latents():
    """Two values of μ in each channel, ±c around c, and σ = 2: mean c, variance c² + 4."""
    statistics, c = LatentStatistics(), torch.arange(1.0, 25).view(1, 24, 1, 1, 1)
    for sign in (0.0, 2.0):
        mean = (sign * c).expand(3, 24, 2, 2, 2)
        statistics.add(mean, torch.full_like(mean, 2 * torch.log(torch.tensor(2.0)).item()))
    shift, scale = statistics.shift_and_scale()
    torch.testing.assert_close(shift, c)
    torch.testing.assert_close(scale, (c.square() + 4).sqrt())
    with pytest.raises(InputError, match="no clips"):
        LatentStatistics().shift_and_scale()
    constant = LatentStatistics()
    constant.add(torch.ones(1, 24, 1, 2, 2), torch.full((1, 24, 1, 2, 2), -1e4))
    with pytest.raises(InputError, match="does not vary"):
        constant.shift_and_scale()


def test_a_clip_is_judged_by_itself():
    """Norms within a clip: a batch equals its clips one by one; and the weights follow from the seed."""
    critic = PatchDiscriminator(8, seed=0)
    x = video(16, side=32)
    with torch.no_grad():
        logits = critic(x)
        alone = torch.cat([critic(x[:1]), critic(x[1:])])
        assert critic(video(1, side=24)).shape[:2] == (2, 1)
    torch.testing.assert_close(logits, alone)
    assert torch.equal(PatchDiscriminator(8, seed=0).layers[0].weight, critic.layers[0].weight)
    assert sum(isinstance(layer, torch.nn.Conv3d) for layer in critic.layers) == 5
