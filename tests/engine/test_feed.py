"""The flow-matching batches made of a data set."""

import pytest
import torch

from mugv_ds.config import load_config
from mugv_ds.data.manifest import open_index
from mugv_ds.data.plan import SampleRef
from mugv_ds.data.readers import Batch, FlowSamples, Sources
from mugv_ds.data.sample import read_text
from mugv_ds.engine.feed import empty_batch
from mugv_ds.objectives.flow import interpolate, resolution_shift
from tests.helpers.dataset import CHANNELS, TEXT_TOKENS, write_config, write_dataset

SHAPE = (3, 4, 6)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    write_config(root, write_dataset(root, [SHAPE] * 4))
    return root


def samples(root, **flow) -> Sources:
    config = load_config(root / "config.json", [f"flow.{name}={value}" for name, value in flow.items()])
    return Sources((FlowSamples(open_index(config.data.manifest), config.data, config.flow, CHANNELS),))


def visits(count: int) -> list[SampleRef]:
    return [SampleRef(0, i % 4, i // 4) for i in range(count)]


def test_a_batch_is_the_flow_at_its_timestep(root):
    make = samples(root, caption_drop=0.0, first_frame_share=0.0)
    batch = make(visits(4))
    for i in range(4):
        x0 = torch.load(root / f"latents/train-{i}.pt", weights_only=True)
        noise = x0 - batch.target[i]
        torch.testing.assert_close(interpolate(x0[None], noise[None], batch.timestep[i : i + 1])[0], batch.x[i])
        assert abs(noise.mean()) < 0.15 and abs(noise.std() - 1) < 0.1
    assert batch.x_mask.all() and batch.weight.eq(1).all() and batch.fps.eq(30).all()


def test_the_same_visit_gives_the_same_numbers_and_another_does_not(root):
    """Whatever else is in the micro-batch, and whatever was drawn before."""
    torch.manual_seed(1)
    a = samples(root)([SampleRef(0, 0, 0), SampleRef(0, 1, 5), SampleRef(0, 2, 1)])
    torch.manual_seed(2)
    b = samples(root)([SampleRef(0, 1, 5)])
    for name, one, other in zip(Batch._fields, a, b, strict=True):
        assert torch.equal(one[1], other[0]), name
    c = samples(root)([SampleRef(0, 1, 6)])
    assert not torch.equal(b.target, c.target) and not torch.equal(b.timestep, c.timestep)


def test_first_frames_are_given_clean_for_their_share(root):
    batch = samples(root, first_frame_share=0.5)(visits(200))
    given = ~batch.x_mask[:, 0]
    assert 0.38 < given.float().mean() < 0.62 and batch.x_mask[:, 1:].all()
    for i in given.nonzero().flatten().tolist()[:5]:
        x0 = torch.load(root / f"latents/train-{i % 4}.pt", weights_only=True)
        assert torch.equal(batch.x[i, :, 0], x0[:, 0]) and not torch.equal(batch.x[i, :, 1], x0[:, 1])


def test_captions_are_dropped_for_their_share(root):
    batch = samples(root, caption_drop=0.25)(visits(200))
    null, null_mask = read_text(root / "text_features/negative.pt", CHANNELS, TEXT_TOKENS)
    dropped = (batch.text == null).flatten(1).all(dim=1)
    assert 0.15 < dropped.float().mean() < 0.35
    assert (batch.text_mask[dropped] == null_mask).all()


def test_the_shift_is_that_of_the_resolution_or_the_number_given(root):
    plain = samples(root, shift=1.0)(visits(8)).timestep / 1000
    r = resolution_shift(32, 48, 3)
    shifted = samples(root, shift="resolution")(visits(8)).timestep / 1000
    torch.testing.assert_close(shifted, r * plain / (1 + (r - 1) * plain))


def test_a_batch_can_be_received_in_what_is_made_for_it(root):
    batch = samples(root)(visits(2))
    empty = empty_batch(2, SHAPE, TEXT_TOKENS, CHANNELS, "cpu")
    for name, one, other in zip(Batch._fields, batch, empty, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype, name


def test_fillers_count_nowhere(root):
    assert samples(root)([SampleRef(0, 0, 0), SampleRef(0, 0, None)]).weight.tolist() == [1, 0]
