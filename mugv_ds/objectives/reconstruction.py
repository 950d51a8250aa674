"""What the VideoVAE's training minimises: pure functions of tensors.

Shape suffixes: B clips, C channels, F frames, H and W height and width; a suffix of one letter is of that size alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_NO_MOTION = 1e-6  # a mean change of the Laplacian far below this is none
_LARGEST_GAN_WEIGHT = 1e4
_SMALLEST_NORM = 1e-4


def squared_error(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each clip, [B], of tensors [B, …]."""
    return (x - target).square().flatten(1).mean(dim=1)


def absolute_error(x: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute error of each clip, [B], of tensors [B, …]; each element weighed by `weight` where it is given."""
    error = (x - target).abs()
    return (error if weight is None else weight * error).flatten(1).mean(dim=1)


def motion_weight(x_BCFHW: Tensor) -> Tensor:
    """w = |Δt ∇² x|, without gradient and of mean 1 over each clip: how much fine detail changes from frame to frame.

    ∇² is the five-point Laplacian with the edge repeated, Δt the forward difference; the last frame has that of the one
    before. A clip in which nothing changes, and a single frame, has weights of 1. Source: the adaptive loss of MUG-V
    (arXiv 2510.17519, §3.1); that it is detached and normalised is ours.
    """
    x_BCFHW = x_BCFHW.detach()
    if x_BCFHW.shape[2] == 1:
        return torch.ones_like(x_BCFHW)
    padded = F.pad(x_BCFHW.flatten(0, 1), (1, 1, 1, 1), mode="replicate").view(*x_BCFHW.shape[:3], *_grown(x_BCFHW))
    sides = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
    change = (sides - 4 * x_BCFHW).diff(dim=2).abs()
    change = torch.cat([change, change[:, :, -1:]], dim=2) + _NO_MOTION
    return change / change.flatten(1).mean(dim=1)[:, None, None, None, None]


def _grown(x: Tensor) -> tuple[int, int]:
    return x.shape[-2] + 2, x.shape[-1] + 2


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)) of each clip, [B], summed over its latents [B, …]."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(dim=1)


def negative_log_likelihood(error: Tensor, logvar: Tensor) -> Tensor:
    """rec/exp(s) + s of errors of any shape, with the learned logarithm s of their scale (Rombach et al. 2022)."""
    return error / logvar.exp() + logvar


def hinge_discriminator(real: Tensor, fake: Tensor, weight: Tensor) -> Tensor:
    """½·(mean max(0, 1 − D(x)) + mean max(0, 1 + D(x̂))) of each clip, weighed and averaged over the clips.

    Args:
        real, fake: logits [B, …]. weight: [B], of each clip.
    """
    per_clip = F.relu(1 - real).flatten(1).mean(dim=1) + F.relu(1 + fake).flatten(1).mean(dim=1)
    return 0.5 * (weight * per_clip).mean()


def hinge_generator(fake: Tensor, weight: Tensor) -> Tensor:
    """−mean D(x̂) of each clip, weighed and averaged over the clips; see `hinge_discriminator`."""
    return -(weight * fake.flatten(1).mean(dim=1)).mean()


def adaptive_gan_weight(rest_norm: Tensor, gan_norm: Tensor) -> Tensor:
    """‖∇rest‖/‖∇gan‖ at one layer, at most 10⁴ (Esser et al. 2021), with which both gradients are equally long."""
    return (rest_norm / (gan_norm + _SMALLEST_NORM)).clamp(max=_LARGEST_GAN_WEIGHT).detach()


def gan_ramp(step: int, weight: float, warmup_steps: int, ramp_steps: int) -> float:
    """γ after `step` steps: 0 during the warm-up, then linearly to `weight` over the ramp."""
    return weight * min(max(step - warmup_steps, 0) / max(ramp_steps, 1), 1.0)


def psnr(x_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each frame, [N]; pixels in [−1, 1]. A perfect frame has 100 dB."""
    error = squared_error(x_NCHW.double(), target_NCHW.double())
    return (10 * torch.log10(4 / error.clamp(min=4e-10))).float()


def ssim(x_NCHW: Tensor, target_NCHW: Tensor) -> Tensor:
    """Structural similarity of each frame, [N]; pixels in [−1, 1] (Wang et al. 2004: Gaussian of 11 × 11, σ 1.5)."""
    from torchmetrics.functional.image import structural_similarity_index_measure

    return structural_similarity_index_measure(x_NCHW, target_NCHW, data_range=(-1.0, 1.0), reduction="none")


def at_edges(frames: int, window: int, still_first: bool) -> Tensor:
    """Tells which frames of a decoded clip are next to another decoder window, bool [frames].

    Args:
        frames: of the clip, 8n, or 8n + 1 with `still_first`, whose first one stands for the eighth of its latent's.
        window: latent frames of a window.
    """
    place_F = torch.arange(frames) + (7 if still_first else 0)
    size, last = 8 * window, frames - 1 + (7 if still_first else 0)
    begins, ends = place_F % size == 0, place_F % size == size - 1
    return (begins & (place_F > 0)) | (ends & (place_F < last))
