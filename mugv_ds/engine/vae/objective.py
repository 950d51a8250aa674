"""The modules that DeepSpeed's engines run: the VideoVAE with all that its loss compares, and its discriminator.

Shape suffixes: B clips, F video frames, E = 8T frames that are compared, H and W height and width, D feature channels,
C = 24 latent channels, T latent frames, h = H/8 and w = W/8, N frames of all clips.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.noise import generator
from mugv_ds.models.videovae.discriminator import PatchDiscriminator
from mugv_ds.models.videovae.perceptual import Lpips
from mugv_ds.models.videovae.training import Autoencoded, autoencode, last_layer, still_repeated
from mugv_ds.models.videovae.vae import VideoVAE
from mugv_ds.objectives import reconstruction as of

Layers = list[tuple[str, nn.Module]]
TERMS = ("loss", "rec", "mse", "l1", "perceptual", "kl", "identity", "gan", "gan_weight", "discriminator", "logvar")


class StepDraws(NamedTuple):
    """What a step draws and what has come of its schedules; the same on all ranks.

    Attributes:
        window: latent frames decoded together. perceptual_seed: of the frames that LPIPS looks at.
        adaptive: whether the absolute error is weighed by motion. gan_weight: γ; 0 leaves the GAN out.
    """

    window: int
    perceptual_seed: int
    adaptive: bool
    gan_weight: float

    @classmethod
    def of(cls, config: VaeTrainConfig, step: int, position: int) -> "StepDraws":
        """Returns those of the optimizer step after `step` steps, at a position in the data."""
        loss, gan, seed = config.loss, config.gan, config.data.seed
        draw = generator("vae step", seed, position)
        window = loss.windows[int(draw.integers(len(loss.windows)))]
        perceptual_seed = int(draw.integers(1 << 31))
        adaptive = loss.adaptive_after is not None and step >= loss.adaptive_after
        gamma = 0.0 if gan is None else of.gan_ramp(step, gan.weight, gan.warmup_steps, gan.ramp_steps)
        return cls(window, perceptual_seed, adaptive, gamma)


class Outcome(NamedTuple):
    """What a micro-batch gave."""

    loss: Tensor  # that is minimised
    terms: dict[str, Tensor]  # some of TERMS, without gradient
    video: Tensor | None  # fp32 [B, 3, E, H, W], reconstructed, without gradient
    target: Tensor  # fp32 [B, 3, E, H, W]


class VaeObjective(nn.Module):
    """The VideoVAE and its loss; of its parameters those of the VideoVAE alone are this module's.

    Args:
        vae: trained. config: the run. perceptual: LPIPS, or None.
        discriminator: of the GAN, or None.
        mean_over_ranks: averages a tensor over all ranks.
    """

    def __init__(
        self,
        vae: VideoVAE,
        config: VaeTrainConfig,
        perceptual: Lpips | None,
        discriminator: PatchDiscriminator | None,
        mean_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.vae = vae
        self._loss, self._mean_over_ranks = config.loss, mean_over_ranks
        self._others = (perceptual, discriminator)  # in a tuple they do not become submodules
        self._projection = identity_projection(vae.config.block_out_channels[-1], config.data.seed)

    def named_layers(self) -> Layers:
        """Returns the layers with the prefix of their published names."""
        return [("", self.vae)]

    def forward(self, video_B3FHW: Tensor, noise_BCThw: Tensor, weight_B: Tensor, draws: StepDraws) -> Outcome:
        """Returns the loss of a micro-batch and what it is made of.

        Args:
            video_B3FHW: fp32 in [−1, 1]. noise_BCThw: fp32. weight_B: of the clips, 1 or 0.
        """
        pixels = self._loss.target == "pixels"
        made = autoencode(self.vae, video_B3FHW, noise_BCThw, draws.window, with_pixels=pixels)
        target = still_repeated(video_B3FHW)
        found, wanted = (made.video, target) if pixels else (made.decoded, made.feature)
        errors = self._errors(found, wanted, draws)
        rec_B = sum(getattr(self._loss, name) * error for name, error in errors.items())
        kl_B = of.kl_divergence(made.mean, made.logvar) / wanted[0].numel()
        logvar = self.vae.logvar.float().squeeze()
        total_B = of.negative_log_likelihood(rec_B, logvar) + self._loss.kl * kl_B
        terms = {"rec": rec_B, "kl": kl_B, **errors}
        if self._loss.identity and video_B3FHW.shape[2] == 1:
            terms["identity"] = self._identity(made)
            total_B = total_B + self._loss.identity * terms["identity"]
        loss = (weight_B * total_B).mean()
        means = {name: (weight_B * value).detach().mean() for name, value in terms.items()}
        if draws.gan_weight:
            gan, adaptive = self._gan(made.video, loss, weight_B)
            loss = loss + draws.gan_weight * adaptive * gan
            means |= {"gan": gan.detach(), "gan_weight": draws.gan_weight * adaptive}
        means |= {"loss": loss.detach(), "logvar": logvar.detach()}
        return Outcome(loss, means, None if made.video is None else made.video.detach(), target)

    def _errors(self, found: Tensor, wanted: Tensor, draws: StepDraws) -> dict[str, Tensor]:
        """The parts of rec, each [B]."""
        weight = of.motion_weight(found) if draws.adaptive else None
        errors = {"mse": of.squared_error(found, wanted), "l1": of.absolute_error(found, wanted, weight)}
        perceptual, _ = self._others
        if self._loss.target == "pixels" and self._loss.perceptual:
            frames = drawn_frames(found.shape[2], self._loss.perceptual_frames, draws.perceptual_seed)
            looked_at = [rearrange(x[:, :, frames], "b c f h w -> (b f) c h w") for x in (found, wanted)]
            errors["perceptual"] = perceptual(*looked_at).view(len(found), -1).mean(dim=1)
        return errors

    def _identity(self, made: Autoencoded) -> Tensor:
        """The mean squared distance of an image's latent to its projected features, [B]."""
        feature_BDhw = made.feature[:, :, 0]
        projection = self._projection.to(feature_BDhw.device)
        wanted_BChw = torch.einsum("bdhw,cd->bchw", feature_BDhw, projection)
        return of.squared_error(made.latent[:, :, 0], wanted_BChw)

    def _gan(self, video: Tensor, loss: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
        """The generator's loss, and the weight with which its gradient is as long as that of `loss` at one layer."""
        _, discriminator = self._others
        with frozen(discriminator):
            gan = of.hinge_generator(discriminator(video), weight_B)
        layer = last_layer(self.vae)
        norms = [torch.autograd.grad(part, layer, retain_graph=True)[0].float().norm() for part in (loss, gan)]
        return gan, of.adaptive_gan_weight(*self._mean_over_ranks(torch.stack(norms)))


class DiscriminatorObjective(nn.Module):
    """The discriminator and its loss."""

    def __init__(self, discriminator: PatchDiscriminator) -> None:
        super().__init__()
        self.discriminator = discriminator

    def named_layers(self) -> Layers:
        """Returns the layers with the prefix of their names."""
        return [("", self.discriminator)]

    def forward(self, real_B3FHW: Tensor, fake_B3FHW: Tensor, weight_B: Tensor) -> Tensor:
        """Returns the hinge loss of clips and their reconstructions."""
        return of.hinge_discriminator(self.discriminator(real_B3FHW), self.discriminator(fake_B3FHW), weight_B)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """What is computed inside gives no gradient to the module's parameters."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def identity_projection(channels: int, seed: int) -> Tensor:
    """Returns fp32 [C, channels] with orthonormal rows, or columns if there are fewer channels; drawn from the seed."""
    drawn = generator("identity", seed).standard_normal(
        (max(channels, LATENT_CHANNELS), min(channels, LATENT_CHANNELS))
    )
    basis = torch.from_numpy(np.linalg.qr(drawn).Q).float()
    return basis.T if channels >= LATENT_CHANNELS else basis


def drawn_frames(frames: int, count: int | None, seed: int) -> Tensor:
    """Returns `count` of the frames' indices, drawn from the seed and ascending; all where there are no more."""
    if count is None or count >= frames:
        return torch.arange(frames)
    return torch.from_numpy(np.sort(generator("frames", seed).permutation(frames)[:count]))
