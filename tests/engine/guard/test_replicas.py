"""Fingerprints of weights and whom they accuse."""

import pytest
import torch

from mugv_ds.engine.guard import replicas
from mugv_ds.engine.guard.replicas import fingerprint, odd_ones


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_any_flipped_bit_changes_it(dtype):
    weights = [torch.randn(7, 9, generator=torch.Generator().manual_seed(0)).to(dtype) for _ in range(3)]
    integers = {2: torch.int16, 4: torch.int32}[weights[0].element_size()]
    expected = fingerprint(weights)
    for tensor in weights:
        bits = tensor.view(integers)
        for row, bit in ((0, 0), (6, 8), (3, 8 * tensor.element_size() - 1)):
            flip = -(1 << bit) if bit == 8 * tensor.element_size() - 1 else 1 << bit
            bits[row, 4] ^= flip
            assert fingerprint(weights) != expected, (row, bit)
            bits[row, 4] ^= flip
    assert fingerprint(weights) == expected


def test_it_knows_order_and_does_not_depend_on_chunks(monkeypatch):
    a, b = torch.randn(100), torch.randn(100)
    whole = fingerprint([a, b])
    assert fingerprint([b, a]) != whole and fingerprint([torch.cat([a, b])]) == whole
    monkeypatch.setattr(replicas, "_CHUNK", 7)
    assert fingerprint([a, b]) == whole


@pytest.mark.parametrize(
    ("prints", "stages", "odd"),
    [
        ([5, 5, 5, 9, 9, 9], [0, 0, 0, 1, 1, 1], []),
        ([5, 5, 4, 9, 9, 9], [0, 0, 0, 1, 1, 1], [2]),
        ([5, 5, 5, 8, 9, 9], [0, 0, 0, 1, 1, 1], [3]),
        ([5, 4], [0, 0], [0, 1]),
        ([1, 2, 3], [0, 0, 0], [0, 1, 2]),
    ],
)
def test_the_minority_of_a_stage_is_named(prints, stages, odd):
    assert odd_ones(prints, stages) == odd
