"""The VideoVAE's pass in training: clips to latents and back, with all that the losses compare.

Shape suffixes: B clips, F video frames, E = 8T frames that are encoded and decoded, H and W video height and width,
D feature channels, C = 24 latent channels, T latent frames, h = H/8 and w = W/8, N frames of all clips.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.errors import CheckpointError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae.temporal import TemporalVAE
from mugv_ds.models.videovae.vae import UNUSED_PARAMETERS, VideoVAE, chunk_units

_INITIAL_LOGVAR = -6.0  # of the posterior: a standard deviation of 0.05


class Autoencoded(NamedTuple):
    """What a pass made of clips.

    Where a clip has 8n + 1 frames, E counts its first one eight times: all eight show it.
    """

    mean: Tensor  # fp32 [B, C, T, h, w]
    logvar: Tensor  # fp32 [B, C, T, h, w]
    latent: Tensor  # fp32 [B, C, T, h, w], drawn
    feature: Tensor  # fp32 [B, D, E, h, w], of the video
    decoded: Tensor  # fp32 [B, D, E, h, w], reconstructed
    video: Tensor | None  # fp32 [B, 3, E, H, W], reconstructed; None where it was not asked for


def autoencode(
    vae: VideoVAE, video_B3FHW: Tensor, noise_BCThw: Tensor, window: int, *, with_pixels: bool
) -> Autoencoded:
    """Encodes clips, draws latents and decodes them in windows, each like `VideoVAE`'s units, all clips at once.

    Args:
        vae: its parameters' dtype is computed in; shift and scale take no part.
        video_B3FHW: in [−1, 1], F = 8n or 8n + 1.
        noise_BCThw: fp32 standard normal.
        window: latent frames that are decoded together; the last ones of a clip may be fewer.
        with_pixels: whether features are decoded to frames.

    Raises:
        InputError: F is neither.
    """
    batch, frames = len(video_B3FHW), video_B3FHW.shape[2]
    chunk_units(batch, frames)
    x_N3HW = rearrange(video_B3FHW.to(vae.logvar.dtype), "b c f h w -> (b f) c h w")
    feature_BDEhw = still_repeated(rearrange(vae.spatial_vae.encode(x_N3HW), "(b f) d h w -> b d f h w", b=batch))
    mean, logvar = encode_features(vae, feature_BDEhw)
    latent = mean + torch.exp(0.5 * logvar) * noise_BCThw
    decoded_BDEhw = decode_latents(vae.temporal_vae, latent.to(vae.logvar.dtype), window)
    video = None
    if with_pixels:
        y_N3HW = vae.spatial_vae.decode(rearrange(decoded_BDEhw, "b d e h w -> (b e) d h w"))
        video = rearrange(y_N3HW.float(), "(b e) c h w -> b c e h w", b=batch)
    return Autoencoded(mean, logvar, latent, feature_BDEhw.float(), decoded_BDEhw.float(), video)


def still_repeated(x_BcFhw: Tensor) -> Tensor:
    """Returns clips or their features with the first of 8n + 1 frames eight times; 8n frames as they are."""
    copies = -x_BcFhw.shape[2] % LATENT_STRIDE
    return torch.cat([x_BcFhw[:, :, :1].expand(-1, -1, copies, -1, -1), x_BcFhw], dim=2) if copies else x_BcFhw


def encode_features(vae: VideoVAE, feature_BDEhw: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and log-variance, each [B, C, T, h, w] in fp32, of the features of 8T frames."""
    batch = len(feature_BDEhw)
    chunks = rearrange(feature_BDEhw, "b d (t s) h w -> (b t) d s h w", s=LATENT_STRIDE)
    moments = vae.temporal_vae.encode(chunks)[:, :, 0]
    return vae.split_moments(rearrange(moments.float(), "(b t) c h w -> b c t h w", b=batch))


def decode_latents(temporal_vae: TemporalVAE, latent_BCThw: Tensor, window: int) -> Tensor:
    """Returns features [B, D, 8T, h, w] of latents, of which windows are decoded by themselves, whole ones together."""
    batch, whole = len(latent_BCThw), latent_BCThw.shape[2] // window * window
    parts = []
    if whole:
        windows = rearrange(latent_BCThw[:, :, :whole], "b c (n t) h w -> (b n) c t h w", t=window)
        parts.append(rearrange(temporal_vae.decode(windows), "(b n) d e h w -> b d (n e) h w", b=batch))
    if whole < latent_BCThw.shape[2]:
        parts.append(temporal_vae.decode(latent_BCThw[:, :, whole:]))
    return torch.cat(parts, dim=2)


def initial_video_vae(config: VideoVAEConfig, seed: int) -> VideoVAE:
    """Returns a new VideoVAE with initial weights drawn from `seed` alone.

    Convolutions keep the variance of what they are given (He et al. 2015, gain 1), and posteriors begin narrow: noise
    of several times what latents differ by would teach the decoder to ignore them. Both are ours.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = VideoVAE(config)
        for layer in vae.modules():
            if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="linear")
    nn.init.constant_(vae.temporal_vae.quant_conv.conv.bias[LATENT_CHANNELS:], _INITIAL_LOGVAR)
    return vae


def load_image_vae(vae: VideoVAE, path: str | Path) -> None:
    """Copies the encoder and the decoder of an image VAE into the spatial half.

    Args:
        path: folder of an `AutoencoderKL`, as diffusers saves it, with safetensors. Layers that the spatial half has no
            place for, such as quant_conv, are left out.

    Raises:
        CheckpointError: it cannot be read, or its encoder or decoder is of another size.
    """
    from diffusers import AutoencoderKL

    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such folder; name a local one, with config.json and safetensors")
    try:
        image_vae = AutoencoderKL.from_pretrained(str(path), local_files_only=True, use_safetensors=True)
        for name, half in vae.spatial_vae.module.items():
            half.load_state_dict(getattr(image_vae, name).state_dict(), strict=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        why = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{path}: not an image VAE for a spatial half of these sizes: {why}") from error


def freeze(vae: VideoVAE, *, spatial: bool) -> None:
    """Switches off gradients of what takes no part in training and, with `spatial`, of the spatial half.

    `logvar` stays: in training it is the learned scale of the loss.
    """
    for name, parameter in vae.named_parameters():
        unused = name in UNUSED_PARAMETERS and name != "logvar"
        parameter.requires_grad_(not unused and not (spatial and name.startswith("spatial_vae.")))


def last_layer(vae: VideoVAE) -> Tensor:
    """Returns the weights at which the GAN's gradient is compared with the others'."""
    return vae.temporal_vae.decoder.conv_out.conv.weight
