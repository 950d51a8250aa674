"""The losses of the VideoVAE's training against their formulas written out, and the measures against closed forms."""

import math

import numpy as np
import pytest
import torch

from mugv_ds.objectives import reconstruction as of


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_motion_weights_are_the_formula_written_out():
    x = random(2, 3, 4, 5, 6)
    expected = np.empty((2, 3, 4, 5, 6))
    v = x.numpy()
    laplacian = np.empty_like(v)
    for i in range(5):
        for j in range(6):
            up, down, left, right = max(i - 1, 0), min(i + 1, 4), max(j - 1, 0), min(j + 1, 5)
            around = v[..., up, j] + v[..., down, j] + v[..., i, left] + v[..., i, right]
            laplacian[..., i, j] = around - 4 * v[..., i, j]
    for t in range(4):
        first = min(t, 2)
        expected[:, :, t] = abs(laplacian[:, :, first + 1] - laplacian[:, :, first])
    for clip in range(2):
        expected[clip] /= expected[clip].mean()
    found = of.motion_weight(x.requires_grad_())
    assert not found.requires_grad
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("frames", [1, 5])
def test_where_nothing_moves_all_weights_are_one(frames):
    still = random(1, 3, 1, 6, 6).expand(-1, -1, frames, -1, -1)
    assert torch.equal(of.motion_weight(still), torch.ones_like(still))


def test_the_weighed_error_has_the_gradient_of_the_formula():
    """The weight is a constant to the gradient: sign(x − y)·w/n."""
    x, y = random(2, 3, 4, 5, 6).requires_grad_(), random(2, 3, 4, 5, 6, seed=1)
    weight = of.motion_weight(x)
    of.absolute_error(x, y, weight).sum().backward()
    torch.testing.assert_close(x.grad, (x.detach() - y).sign() * weight / 360)


def test_kl_is_that_of_the_distributions():
    mean, logvar = random(2, 4, 3), random(2, 4, 3, seed=1)
    posterior = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    exact = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(of.kl_divergence(mean, logvar), exact)


def test_the_learned_scale_is_least_at_the_logarithm_of_the_error():
    """d/ds (e·exp(−s) + s) = 0 at s = log e, where the loss is 1 + log e."""
    logvar = torch.tensor(math.log(0.3), dtype=torch.float64, requires_grad=True)
    loss = of.negative_log_likelihood(torch.tensor(0.3, dtype=torch.float64), logvar)
    loss.backward()
    assert loss.item() == pytest.approx(1 + math.log(0.3)) and abs(logvar.grad.item()) < 1e-12


def test_hinge_losses():
    real, fake, weight = torch.tensor([[2.0, 0.0]]), torch.tensor([[-3.0, 1.0]]), torch.tensor([1.0])
    assert of.hinge_discriminator(real, fake, weight).item() == 0.5 * ((0 + 1) / 2 + (0 + 2) / 2)
    assert of.hinge_generator(fake, weight).item() == 1.0
    nothing = torch.zeros(1)
    assert of.hinge_discriminator(real, fake, nothing).item() == of.hinge_generator(fake, nothing).item() == 0


def test_the_gan_weight_makes_gradients_equally_long():
    rest, gan = random(50), 1e3 * random(50, seed=1)
    weight = of.adaptive_gan_weight(rest.norm(), gan.norm())
    assert (weight * gan).norm().item() == pytest.approx(rest.norm().item(), rel=1e-6)
    assert of.adaptive_gan_weight(torch.tensor(1e9), torch.tensor(0.0)).item() == 1e4


def test_the_ramp_of_the_gan():
    values = [of.gan_ramp(step, 0.5, warmup_steps=2, ramp_steps=4) for step in range(8)]
    assert values == [0, 0, 0, 0.125, 0.25, 0.375, 0.5, 0.5]
    assert of.gan_ramp(2, 0.5, warmup_steps=2, ramp_steps=0) == 0 and of.gan_ramp(3, 0.5, 2, 0) == 0.5


def test_psnr_of_a_known_error_and_of_none():
    x = torch.zeros(2, 3, 4, 4)
    y = torch.stack([x[0] + 0.2, x[1]])
    assert of.psnr(x, y).tolist() == pytest.approx([10 * math.log10(4 / 0.04), 100])


def test_ssim_of_flat_frames_is_its_luminance_term():
    """Without variance it is (2ab + c)/(a² + b² + c), c = (0.01·range)²."""
    a, b, c = 0.5, 0.3, (0.01 * 2) ** 2
    found = of.ssim(torch.full((1, 3, 24, 24), a), torch.full((1, 3, 24, 24), b))
    assert found.item() == pytest.approx((2 * a * b + c) / (a * a + b * b + c), rel=1e-4)
    noisy = random(1, 3, 24, 24).float().clamp(-1, 1)
    assert of.ssim(noisy, noisy).item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("frames", "window", "still", "edges"),
    [
        (16, 1, False, [7, 8]),
        (24, 2, False, [15, 16]),
        (17, 1, True, [0, 1, 8, 9]),
        (17, 2, True, [8, 9]),
        (16, 6, False, []),
        (1, 1, True, []),
    ],
)
def test_frames_at_window_edges(frames, window, still, edges):
    assert of.at_edges(frames, window, still).nonzero().flatten().tolist() == edges
