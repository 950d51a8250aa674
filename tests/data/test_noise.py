import numpy as np
import pytest
import torch

from mugv_ds.data import noise

KEY = (6309, "clip-0001", 2)
PINNED_GAUSSIAN = [[-0.5254934430122375, 0.5502623319625854], [-0.4562658667564392, 0.9599979519844055]]
PINNED_SCALARS = [-0.7006704473071315, 0.8058378655696036, 0.9140284683230023]
SCALARS = [noise.time_normal, noise.caption_uniform, noise.first_frame_uniform]


def test_values_are_pinned():
    """A change here, as by a new release of numpy, changes the noise of resumed runs."""
    assert noise.gaussian(*KEY, (2, 2)).tolist() == PINNED_GAUSSIAN
    assert [draw(*KEY) for draw in SCALARS] == PINNED_SCALARS


@pytest.mark.parametrize("other", [(6310, "clip-0001", 2), (6309, "clip-0002", 2), (6309, "clip-0001", 3)])
def test_each_part_of_the_key_counts(other):
    assert not torch.equal(noise.gaussian(*KEY, (64,)), noise.gaussian(*other, (64,)))
    assert all(draw(*KEY) != draw(*other) for draw in SCALARS)


def test_purposes_do_not_share_a_stream():
    draws = {*(draw(*KEY) for draw in SCALARS), noise.generator("noise", *KEY).random()}
    assert len(draws) == 4


def test_keys_are_not_glued_together():
    assert noise.generator("noise", 1, "2", 3).random() != noise.generator("noise", 1, "2, 3").random()
    assert noise.generator(1, "1").random() != noise.generator("1", 1).random()


def test_ambient_state_is_neither_read_nor_advanced():
    torch.manual_seed(0)
    np.random.seed(0)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = noise.gaussian(*KEY, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)
    torch.manual_seed(1)
    assert torch.equal(noise.gaussian(*KEY, (8,)), first)


def test_moments():
    values = noise.gaussian(*KEY, (24, 6, 45, 80))
    assert values.dtype == torch.float32
    assert abs(values.mean()) < 0.005
    assert abs(values.std() - 1) < 0.005
    uniforms = np.array([noise.caption_uniform(0, str(i), 0) for i in range(2000)])
    assert (uniforms >= 0).all()
    assert (uniforms < 1).all()
    assert abs((uniforms < 0.1).mean() - 0.1) < 0.03


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_device_does_not_change_the_noise():
    values = noise.gaussian(*KEY, (24, 6, 45, 80))
    assert torch.equal(values.cuda().cpu(), values)
