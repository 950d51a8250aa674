"""Rectified flow (Liu et al. 2022, "Flow Straight and Fast"): the path, its velocity, timesteps and the loss.

Timesteps t lie in [0, 1000], and 1000 is pure noise: x_t = (1 − t/1000)·x0 + (t/1000)·ε. The model predicts the
velocity v = x0 − ε, which points from noise to data. The functions are pure, so that training, evaluation and the
sampler share one definition of them.

Shape suffixes: B batch, C latent channels, T latent frames, H and W latent height and width.
"""

import torch
from torch import Tensor

MAX_TIME = 1000.0


def resolution_shift(height: float, width: float, frames: int) -> float:
    """Returns the timestep shift of a resolution, r = sqrt(height·width / 512²) · sqrt(frames).

    More pixels need more noise to be destroyed to the same degree (Esser et al. 2024, section 5.3.2), so large and long
    videos train and sample nearer to pure noise.

    Args:
        height, width: of the video in pixels.
        frames: latent frames.
    """
    return (height * width / 512**2) ** 0.5 * frames**0.5


def shift_time(u: Tensor, shift: Tensor | float) -> Tensor:
    """Shifts times u in [0, 1] towards noise: u' = r·u / (1 + (r − 1)·u) (Esser et al. 2024, eq. 23).

    Args:
        u: any shape.
        shift: r > 0, a number or a tensor that broadcasts with u; 1 changes nothing.
    """
    return shift * u / (1 + (shift - 1) * u)


def draw_time(normal: Tensor, shift: Tensor | float) -> Tensor:
    """Makes training timesteps in (0, 1000) of standard normal numbers.

    The sigmoid makes them logit-normal (Esser et al. 2024, section 3.1, with m = 0 and s = 1); then they are shifted.

    Args:
        normal: any shape. shift: r, see `shift_time`.
    """
    return MAX_TIME * shift_time(normal.sigmoid(), shift)


def sampling_times(steps: int, shift: float) -> Tensor:
    """Returns the sampler's timesteps [steps], falling from 1000: evenly spaced, then shifted, without the final 0.

    In fp32 the shift may round the first above 1000, where nothing was trained.
    """
    return (MAX_TIME * shift_time(torch.linspace(1, 0, steps + 1)[:-1], shift)).clamp(max=MAX_TIME)


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Returns x_t = (1 − t/1000)·x0 + (t/1000)·ε [B, …] of the clean x0 and the noise ε [B, …] at timesteps t [B]."""
    share = (t / MAX_TIME).view(-1, *[1] * (x0.dim() - 1))  # [B, 1, …]
    return (1 - share) * x0 + share * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """Returns what the model predicts, v = x0 − ε; it is −dx_t/d(t/1000) and does not depend on t."""
    return x0 - noise


def loss_weight(x_mask: Tensor, channels: int, height: int, width: int) -> Tensor:
    """Returns the weight of each latent pixel's squared error, such that their weighted sum is the sample's flow loss.

    It is 1 / (channels · height · width · noised frames) where the frame is noised and 0 where it is given clean.

    Args:
        x_mask: bool [B, T], False for frames given clean.
        channels, height, width: of the latent.
    Returns:
        [B, 1, T, H, W], fp32, to broadcast over the channels.
    Raises:
        ValueError: a sample has no noised frame.
    """
    noised_B1 = x_mask.sum(dim=1, keepdim=True)
    if x_mask.device.type == "cpu" and not noised_B1.all():  # a GPU would be waited for; readers give no such sample
        raise ValueError("x_mask: a sample has no noised frame, so it has no loss")
    weight_BT = x_mask / (channels * height * width * noised_B1)
    return weight_BT[:, None, :, None, None].expand(-1, 1, -1, height, width)


def weighted_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Returns Σ weight · (prediction − target)² of each sample, [B].

    It is a sum over elements, so over a part of a sample's elements (a sequence rank's tokens) it is that part's share
    of the loss, and the shares add up to it.

    Args:
        prediction, target: [B, …] of one shape.
        weight: broadcasts to that shape; see `loss_weight`.
    """
    return (weight * (prediction - target).square()).flatten(1).sum(dim=1)


def flow_loss(prediction: Tensor, target: Tensor, x_mask: Tensor) -> Tensor:
    """Returns each sample's flow loss [B]: the mean squared error of the velocity over the elements of noised frames.

    Args:
        prediction: [B, ≥C, T, H, W]; channels beyond the target's are not used.
        target: [B, C, T, H, W], see `velocity`. x_mask: bool [B, T], False for frames given clean.
    Raises:
        ValueError: a sample has no noised frame.
    """
    channels, _, height, width = target.shape[1:]
    return weighted_error(prediction[:, :channels], target, loss_weight(x_mask, channels, height, width))


def loss_by_quartile(loss: Tensor, t: Tensor) -> dict[str, Tensor]:
    """Sums the losses of the samples in each quarter of [0, 1000], because losses at different noise do not compare.

    Args:
        loss: [B]. t: timesteps [B].
    Returns:
        Scalars without gradient: "loss_q0" … "loss_q3" the sums, "count_q0" … "count_q3" the numbers of samples.
    """
    quartile = (t / (MAX_TIME / 4)).long().clamp(0, 3)
    terms = {}
    for q in range(4):
        terms[f"loss_q{q}"] = loss.detach()[quartile == q].sum()
        terms[f"count_q{q}"] = (quartile == q).sum().to(loss.dtype)
    return terms
