"""Which stream plays when, and which rows belong to a group."""

import csv
import logging

import numpy as np
import pytest

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import GroupSection
from mugv_ds.data.manifest import REQUIRED_COLUMNS, open_index
from mugv_ds.data.mixture import Mixture, group_shapes

STEPS = 3000


def constant(*shares):
    return [((0, share),) for share in shares]


def played(mixture, steps=STEPS):
    """[steps, streams], 1 where a stream plays."""
    streams = np.array([mixture.turn(position)[0] for position in range(steps)])
    return np.eye(streams.max() + 1)[streams]


def shortfall(plays, samples, shares):
    """[steps, streams]: steps that each stream is behind its share of the samples, after each step."""
    wanted = shares / samples
    wanted = wanted / wanted.sum(axis=1, keepdims=True)
    return wanted.cumsum(axis=0) - plays.cumsum(axis=0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("streams", "most"), [(2, 0.51), (3, 1.0), (8, 1.25)])
def test_shares_are_reached_at_any_time(streams, most, seed):
    random = np.random.default_rng(seed)
    shares, samples = random.dirichlet(np.ones(streams)), random.integers(1, 200, streams)
    plays = played(Mixture(constant(*shares), samples))
    assert np.abs(shortfall(plays, samples, np.tile(shares, (STEPS, 1)))).max() < most
    given = plays.sum(axis=0) * samples
    np.testing.assert_allclose(given / given.sum(), shares, atol=0.05)


def test_a_share_changes_linearly_between_its_points():
    shares = [((500, 1.0), (2500, 0.2)), ((500, 0.0), (2500, 0.8))]
    samples = np.array([40, 8])
    plays = played(Mixture(shares, samples))
    wanted = np.interp(np.arange(STEPS), [500, 2500], [1.0, 0.2])
    assert np.abs(shortfall(plays, samples, np.stack([wanted, 1 - wanted], axis=1))).max() < 1
    assert plays[:501, 0].all()
    given = (plays * samples)[2500:].sum(axis=0)
    assert given[0] / given.sum() == pytest.approx(0.2, abs=0.02)


def test_a_stream_pauses_while_its_share_is_zero_and_comes_back():
    pause = ((999, 0.5), (1000, 0.0), (1999, 0.0), (2000, 0.5))
    plays = played(Mixture([pause, ((0, 0.5),)], [4, 4]))
    assert plays[1000:2000, 0].sum() == 0
    for part in (slice(0, 1000), slice(2000, 3000)):
        assert plays[part, 0].sum() == pytest.approx(500, abs=1), "and takes no more than its share afterwards"


def test_a_stream_without_share_never_plays():
    assert played(Mixture(constant(0.0, 1.0), [1, 1]))[:, 0].sum() == 0


def test_any_order_of_lookups_gives_the_same_turns():
    shares, samples = [((0, 0.7), (4000, 0.1)), ((0, 0.3), (2000, 0.9)), ((0, 0.2),)], [9, 3, 5]
    one, other = Mixture(shares, samples), Mixture(shares, samples)
    forward = [one.turn(position) for position in range(5000)]
    positions = np.random.default_rng(0).permutation(5000).tolist()
    assert [other.turn(position) for position in positions] == [forward[position] for position in positions]
    for stream in range(3):
        assert [turn for number, turn in forward if number == stream] == list(
            range(sum(n == stream for n, _ in forward))
        )


def test_at_every_time_some_stream_has_a_share():
    with pytest.raises(ConfigError, match=r"data\.mixture: every group's share is 0 at step 700"):
        Mixture([((0, 1.0), (700, 0.0)), ((0, 0.5), (700, 0.0))], [1, 1])


# (kind, frames in pixels' time); a latent has a frame for eight.
ROWS = [("image", 1), ("", 1), ("video", 1), ("video", 48), ("", 48), ("image", 48), ("video", 120)]


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("groups") / "train.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow([*REQUIRED_COLUMNS, "num_frames", "height", "width", "kind"])
        for i, (kind, frames) in enumerate(ROWS):
            rows.writerow([f"s{i}", "generated", f"{i}.pt", f"{i}_text.pt", frames, 64, 32, kind])
        rows.writerow(["missing", "generated", "missing.pt", "missing_text.pt", "", "", "", "video"])
    return open_index(path)


def group(name, **rest):
    return GroupSection(name=name, share=((0, 1.0),), **rest)


def members(index, *groups):
    shapes = group_shapes(index, groups)
    for one in shapes:
        rows = one.any(axis=1)
        assert (one[rows] == index.shapes()[rows]).all()
    return [np.flatnonzero(one.any(axis=1)).tolist() for one in shapes]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ([group("images", kind="image"), group("videos", kind="video")], [[0, 1, 5], [2, 3, 4, 6]]),
        ([group("short", frames=(1, 6)), group("rest")], [[0, 1, 2, 3, 4, 5], [6]]),
        ([group("clips", frames=(2, 20)), group("images", kind="image"), group("all")], [[3, 4, 5, 6], [0, 1], [2]]),
        ([group("clips", kind="video", frames=(6, 6)), group("all")], [[3, 4], [0, 1, 2, 5, 6]]),
    ],
    ids=["kind, or one frame where it is not said", "frames", "the first that fits", "kind and frames"],
)
def test_a_row_belongs_to_the_first_group_that_it_fits(index, groups, expected, caplog):
    with caplog.at_level(logging.WARNING):
        assert members(index, *groups) == expected
    assert not caplog.records, "every readable row has its group"


def test_rows_of_no_group_are_counted_and_left_out(index, caplog):
    with caplog.at_level(logging.WARNING):
        assert members(index, group("clips", kind="video", frames=(2, 6))) == [[3, 4]]
    (record,) = caplog.records
    assert "5 of 8 rows belong to no group of data.mixture and are left out, the first is s0" in record.getMessage()


@pytest.mark.parametrize(
    "groups",
    [[group("all"), group("none", kind="image")], [group("none", frames=(7, 14))]],
    ids=["taken by another", "no such row"],
)
def test_a_group_without_rows_is_an_error(index, groups):
    with pytest.raises(ConfigError, match=r"data\.mixture\.none: no readable row"):
        group_shapes(index, groups)
