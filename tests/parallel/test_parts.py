"""Layout, stage boundaries and what crosses between stages, without processes."""

from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology

from mugv_ds.config import PRESETS, ConfigError, DiTConfig
from mugv_ds.config.schema import ParallelSection
from mugv_ds.models.layers import Condition
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout, balanced_partition, stage_boundaries
from mugv_ds.parallel.pipeline import labels, pack, unpack
from mugv_ds.parallel.ulysses import Ulysses, _with_spaces


def local_tokens(tokens: int, size: int, rank: int) -> torch.Tensor:
    ulysses = Ulysses(None, size, rank, None)
    ulysses.tokens = tokens
    return ulysses.local_tokens()


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 1), (3, 2, 2), (2, 4, 3), (1, 2, 4)])
def test_places_agree_with_deepspeeds_topology(sizes):
    layout = Layout(*sizes)
    topology = PipeDataParallelTopology(num_pp=layout.pipeline, num_dp=layout.replicas)
    groups = layout.sequence_ranks()
    assert sorted(rank for group in groups for rank in group) == list(range(layout.world_size))
    for rank in range(layout.world_size):
        place, coordinate = layout.coordinates(rank), topology.get_coord(rank)
        assert place.stage == coordinate.pipe
        assert place.data * layout.sequence + place.sequence == coordinate.data
        mates = {
            (layout.coordinates(mate).stage, layout.coordinates(mate).data) for mate in groups[rank // layout.sequence]
        }
        assert mates == {(place.stage, place.data)}


def test_data_is_what_remains():
    assert Layout.fit(ParallelSection(sequence=2, pipeline=2), 8) == Layout(2, 2, 2)


@pytest.mark.parametrize("world", [1, 3, 6])
def test_a_world_that_does_not_fit_is_refused(world):
    with pytest.raises(ConfigError, match=f"but {world} were started"):
        Layout.fit(ParallelSection(sequence=2, pipeline=2), world)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 7, 8, 56])
def test_stages_get_their_share_of_the_blocks(stages):
    boundaries = stage_boundaries(PRESETS["mugdit_10b"], stages, tokens=54_002, text_tokens=300)
    assert boundaries[0] == 0 and boundaries[-1] == 58 and len(boundaries) == stages + 1
    layers = [last - first for first, last in pairwise(boundaries)]
    layers[0] -= 1  # the embedders
    layers[-1] -= 1  # the final layer
    assert min(layers) >= 1 and max(layers) - min(layers) <= 1


@pytest.mark.parametrize("parts", [1, 2, 3, 5, 9])
def test_the_costliest_part_costs_no_more_than_in_any_other_cut(parts):
    costs = np.random.default_rng(parts).uniform(0.5, 2, 9).tolist()
    cuts = ([0, *inner, 9] for inner in combinations(range(1, 9), parts - 1))

    def worst(cut):
        return max(sum(costs[first:last]) for first, last in pairwise(cut))

    found = balanced_partition(costs, parts)
    assert found[0] == 0 and found[-1] == 9 and len(found) == parts + 1 and found == sorted(set(found))
    assert worst(found) == pytest.approx(min(map(worst, cuts)))


def test_more_stages_than_blocks_are_refused():
    with pytest.raises(ConfigError, match="2 blocks"):
        stage_boundaries(DiTConfig(144, 2, 2), 3, tokens=10, text_tokens=3)


def test_unpacking_gives_back_what_was_packed():
    generator = torch.Generator().manual_seed(0)
    grid, batch, width, text_tokens = patch_grid(2, 4, 6), 3, 8, 5
    token_n = local_tokens(grid.tokens, 4, 3)
    x_mask = torch.tensor([[True, True], [False, True], [True, False]])
    text_mask = torch.arange(text_tokens)[None] < torch.tensor([5, 1, 3])[:, None]
    tokens, modulation, time, text = (
        torch.randn(batch, *shape, generator=generator)
        for shape in ((len(token_n), width), (2, 6 * width), (2, width), (text_tokens, width))
    )
    condition = Condition(modulation, time, text, text_mask, None, None, None)
    floats, integers = pack(tokens, condition, x_mask)
    assert floats.shape == (batch, len(token_n) + 14 + text_tokens, width)
    tokens_again, again, x_mask_again = unpack(floats, integers, grid, token_n)
    pairs = [(tokens, tokens_again), (x_mask, x_mask_again), *zip(condition[:4], again[:4], strict=True)]
    assert all(torch.equal(one, other) for one, other in pairs)
    # The last rank of four holds tokens 12, 13 (the end token) and two of padding: all clean.
    assert token_n.tolist() == [12, 13, 14, 15]
    assert again.clean_BN.tolist() == [[False, True, True, True], [False, True, True, True], [True] * 4]


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_ranks_hold_every_token_once(size):
    held = torch.cat([local_tokens(47, size, rank) for rank in range(size)])
    assert torch.equal(held, torch.arange(len(held))) and 47 <= len(held) < 47 + size


@pytest.mark.parametrize("size", [1, 3, 4])
def test_the_weights_of_all_ranks_sum_to_those_of_the_sample(size):
    """Start, end and padding tokens weigh nothing; every patch is weighed once, padded pixels not at all."""
    target, weight = torch.randn(2, 24, 3, 3, 5), torch.rand(2, 1, 3, 3, 5)
    tokens = patch_grid(3, 3, 5).tokens
    zeros = torch.zeros(2)
    names = ("timestep", "scale", "role", "reference", "optimality")
    given = dict.fromkeys(names, zeros)
    parts = [labels(target, weight, **given, token_n=local_tokens(tokens, size, rank)) for rank in range(size)]
    total = sum(part.weight_BnP1.sum(dim=(1, 2, 3)) for part in parts)
    torch.testing.assert_close(total, weight.flatten(1).sum(dim=1))
    assert all(part.target_BnPC.shape[2:] == (4, 24) for part in parts)


def test_what_lies_between_spaced_rows_travels_along_instead_of_being_squeezed_out():
    whole = torch.randn(2, 1, 5, 3, 4, 80)
    rows = _with_spaces(whole[..., :72])
    assert rows.data_ptr() == whole.data_ptr()
    assert torch.equal(rows, whole)
    contiguous = whole[..., :72].contiguous()
    assert _with_spaces(contiguous) is contiguous
    assert torch.equal(_with_spaces(whole[..., :72].mT), whole[..., :72].mT)
    assert torch.equal(_with_spaces(whole[:, :, :4, ..., :72]), whole[:, :, :4, ..., :72])
