"""The loss of a micro-batch against its formula, the GAN's weight, and what a step draws."""

import math

import pytest
import torch
from torch import Tensor

from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.engine.vae.objective import (
    DiscriminatorObjective,
    StepDraws,
    VaeObjective,
    drawn_frames,
    identity_projection,
)
from mugv_ds.models.videovae import VideoVAEConfig
from mugv_ds.models.videovae.discriminator import PatchDiscriminator
from mugv_ds.models.videovae.perceptual import Lpips
from mugv_ds.models.videovae.training import autoencode, freeze, initial_video_vae, last_layer
from mugv_ds.objectives.reconstruction import motion_weight
from tests.helpers.records import relative

SIZES = VideoVAEConfig((8, 8, 8, 8), 1, 4, 8, 1, 4)
PLAIN = StepDraws(window=1, perceptual_seed=0, adaptive=False, gan_weight=0.0)


def config(**sections: dict) -> VaeTrainConfig:
    values = {
        "data": {"manifest": "m", "size": (24, 24), "lengths": ({"frames": 8, "share": 1.0},), "global_batch_size": 2},
        "loss": {"mse": 2.0, "l1": 0.5, "perceptual": 0.0, "kl": 1e-3},
        "schedule": {"steps": 9},
        "checkpoint": {"dir": "c"},
        "logging": {"dir": "l"},
    }
    merged = {name: values.get(name, {}) | sections.get(name, {}) for name in values | sections}
    return VaeTrainConfig.model_validate(merged)


def objective(settings: VaeTrainConfig, perceptual=None, discriminator=None) -> VaeObjective:
    vae = initial_video_vae(SIZES, seed=0)
    freeze(vae, spatial=settings.model.train == "temporal")
    return VaeObjective(vae, settings, perceptual, discriminator, lambda value: value)


def clips(frames: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.rand(2, 3, frames, 24, 24, generator=generator) * 2 - 1
    noise = torch.randn(2, 24, -(-frames // 8), 3, 3, generator=generator)
    return video, noise, torch.ones(2)


def test_the_loss_is_its_formula():
    module, (video, noise, weight) = objective(config()), clips(9)
    outcome = module(video, noise, weight, PLAIN)
    made = autoencode(module.vae, video, noise, 1, with_pixels=True)
    target = torch.cat([video[:, :, :1]] * 7 + [video], dim=2)  # all eight frames of latent 0 show the first
    error = made.video - target
    rec = 2 * error.pow(2).mean() + 0.5 * error.abs().mean()
    kl = 0.5 * (made.mean.pow(2) + made.logvar.exp() - 1 - made.logvar).sum() / 2 / (3 * 16 * 24 * 24)
    torch.testing.assert_close(outcome.loss, rec / math.exp(4) + 4 + 1e-3 * kl)
    torch.testing.assert_close(outcome.terms["rec"], rec.detach())
    torch.testing.assert_close(outcome.terms["kl"], kl.detach())
    assert torch.equal(outcome.target, target) and torch.equal(outcome.video, made.video)
    assert not outcome.video.requires_grad and set(outcome.terms) == {"rec", "kl", "mse", "l1", "loss", "logvar"}


def test_motion_weighs_the_absolute_error_when_its_time_has_come():
    module, given = objective(config(loss={"adaptive_after": 3})), clips(8)
    outcome = module(*given, PLAIN._replace(adaptive=True))
    weight = motion_weight(outcome.video)
    torch.testing.assert_close(outcome.terms["l1"], (weight * (outcome.video - given[0]).abs()).mean())
    steps = [StepDraws.of(config(loss={"adaptive_after": 3}), step, step).adaptive for step in range(5)]
    assert steps == [False, False, False, True, True]


def test_lpips_looks_at_the_frames_that_were_drawn():
    lpips = Lpips(((4,), (5,)))
    module = objective(config(loss={"perceptual": 1.0, "perceptual_frames": 3, "perceptual_weights": "w"}), lpips)
    video, noise, weight = clips(8)
    outcome = module(video, noise, weight, PLAIN._replace(perceptual_seed=5))
    frames = drawn_frames(8, 3, 5)
    one_by_one = [lpips(outcome.video[:, :, f], video[:, :, f]) for f in frames]
    torch.testing.assert_close(outcome.terms["perceptual"], torch.stack(one_by_one).mean())
    torch.testing.assert_close(
        outcome.terms["rec"], sum(w * outcome.terms[n] for n, w in (("mse", 2.0), ("l1", 0.5), ("perceptual", 1.0)))
    )
    assert len(module.vae.state_dict()) == len(module.state_dict()), "LPIPS is no part of what is trained"


def test_drawn_frames_are_distinct_and_every_one_comes():
    drawn = [drawn_frames(8, 3, seed).tolist() for seed in range(30)]
    assert all(frames == sorted(set(frames)) and len(frames) == 3 for frames in drawn)
    assert {frame for frames in drawn for frame in frames} == set(range(8))
    assert drawn_frames(8, None, 0).tolist() == drawn_frames(8, 9, 0).tolist() == list(range(8))


def test_features_are_compared_and_a_still_is_held_to_its_projection():
    images = {"lengths": ({"frames": 1, "share": 1.0},)}
    loss = {"target": "features", "identity": 3.0}
    settings = config(model={"train": "temporal"}, data=images, loss=loss)
    module, (video, noise, weight) = objective(settings), clips(1)
    outcome = module(video, noise, weight, PLAIN)
    made = autoencode(module.vae, video, noise, 1, with_pixels=False)
    feature = module.vae.spatial_vae.encode(video[:, :, 0])
    repeated = torch.stack([feature] * 8, dim=2)
    torch.testing.assert_close(outcome.terms["mse"], (made.decoded - repeated).pow(2).mean())
    projection = identity_projection(8, settings.data.seed)
    wanted = torch.stack([torch.stack([projection @ feature[b, :, i, j] for j in range(3)], -1) for b in range(2)
                          for i in range(3)]).view(2, 3, 24, 3).transpose(1, 2)  # fmt: skip
    identity = (made.latent[:, :, 0] - wanted).pow(2).mean()
    torch.testing.assert_close(outcome.terms["identity"], identity)
    likelihood = outcome.terms["rec"] / math.exp(4) + 4 + 1e-3 * outcome.terms["kl"]
    torch.testing.assert_close(outcome.loss, likelihood + 3 * identity)
    outcome.loss.backward()
    assert all(p.grad is None for p in module.vae.spatial_vae.parameters()) and outcome.video is None


@pytest.mark.parametrize("channels", [8, 24, 512])
def test_the_projection_is_orthonormal(channels):
    projection = identity_projection(channels, seed=0)
    assert projection.shape == (24, channels)
    product = projection @ projection.T if channels >= 24 else projection.T @ projection
    torch.testing.assert_close(product, torch.eye(min(channels, 24)), atol=1e-5, rtol=0)
    assert torch.equal(projection, identity_projection(channels, seed=0))


def test_the_gan_has_its_share_of_the_gradient_at_the_last_layer():
    """|∇(loss + γ·w·gan) − ∇loss| there is γ·|∇loss|; the discriminator gets no gradient from it."""
    critic = PatchDiscriminator(8, seed=0)
    module, given = objective(config(gan={"warmup_steps": 1}), discriminator=critic), clips(8)
    layer = last_layer(module.vae)
    found = []
    for gamma in (0.0, 0.25):
        module.vae.zero_grad()
        outcome = module(*given, PLAIN._replace(gan_weight=gamma))
        outcome.loss.backward()
        found.append(layer.grad.clone())
    assert (found[1] - found[0]).norm().item() == pytest.approx(0.25 * found[0].norm().item(), rel=1e-3)
    assert all(p.grad is None and p.requires_grad for p in critic.parameters())
    assert outcome.terms["gan"].item() == pytest.approx(-critic(outcome.video).mean().item(), rel=1e-4)


def test_the_discriminators_loss_is_the_hinge_of_both_and_gives_the_vae_no_gradient():
    critic = PatchDiscriminator(8, seed=0)
    video, _, weight = clips(8)
    fake = video.flip(2)
    loss = DiscriminatorObjective(critic)(video, fake, weight)
    real_part = (1 - critic(video)).clamp(min=0).mean()
    fake_part = (1 + critic(fake)).clamp(min=0).mean()
    torch.testing.assert_close(loss, 0.5 * (real_part + fake_part))


def test_a_filler_counts_nowhere():
    """The gradient of a clip and a filler is half that of the clip alone."""
    module, (video, noise, _) = objective(config()), clips(8)
    module(video, noise, torch.tensor([1.0, 0.0]), PLAIN).loss.backward()
    both = last_layer(module.vae).grad.clone()
    module.vae.zero_grad()
    module(video[:1], noise[:1], torch.ones(1), PLAIN).loss.backward()
    assert relative(2 * both, last_layer(module.vae).grad) <= 1e-4


def test_what_a_step_draws_follows_from_its_position():
    settings = config(loss={"windows": (1, 4, 8)}, gan={"warmup_steps": 2, "ramp_steps": 4, "weight": 0.5})
    draws = [StepDraws.of(settings, step, step + 100) for step in range(60)]
    assert {draw.window for draw in draws} == {1, 4, 8}
    assert draws == [StepDraws.of(settings, step, step + 100) for step in range(60)]
    assert len({draw.perceptual_seed for draw in draws}) == 60
    assert [draw.gan_weight for draw in draws[:8]] == [0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert StepDraws.of(settings, 7, 3)[:2] == StepDraws.of(settings, 5, 3)[:2], "after going back, by the position"
