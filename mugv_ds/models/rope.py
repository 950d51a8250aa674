"""Where each token sits in (time, height, width), and the 3D rotary embedding of those positions.

The sequence is one start token, the T·h·w patches in (t, h, w) order, and one end token. A token is named by its
index in that sequence; indices past the end token are padding and sit where the end token sits. Nothing here depends
on holding the whole sequence: callers pass the indices of the tokens they have.

Shape suffixes: B batch, N tokens held, F latent frames + 2 (start and end).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM

MAX_TIME = 480
MAX_SPACE = 384
_AXIS_PAIRS = HEAD_DIM // 6  # complex pairs of one axis; a head holds [height | width | time]


class Grid(NamedTuple):
    """Patches of one sample along time, height and width."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Length of the sequence with its start and end token."""
        return self.patches + 2


def patch_grid(frames: int, height: int, width: int) -> Grid:
    """The patch grid of a latent [T, H, W]: patches are (1, 2, 2), an odd side is padded on the high end.

    Raises:
        ValueError: more than 384 patches along a side, the reach of the published position tables.
    """
    grid = Grid(frames, (height + 1) // 2, (width + 1) // 2)
    if max(grid.height, grid.width) > MAX_SPACE:
        raise ValueError(f"latent of {height}×{width}: at most {2 * MAX_SPACE} latent pixels a side have positions")
    return grid


class Positions(NamedTuple):
    """For each token held: its patch (row of the patchified latent), its frame (0 start, 1…T, T+1 end), row, column."""

    patch_N: Tensor
    frame_N: Tensor
    row_N: Tensor
    column_N: Tensor


def positions(token_N: Tensor, grid: Grid) -> Positions:
    """Positions of the tokens `token_N` (indices into the sequence) of a sample with this grid."""
    # The start token takes the first patch's place, the end token the last's.
    patch = (token_N - 1).clamp(0, grid.patches - 1)
    frame = (patch // (grid.height * grid.width) + 1).masked_fill(token_N == 0, 0)
    frame = frame.masked_fill(token_N > grid.patches, grid.frames + 1)
    return Positions(patch, frame, patch // grid.width % grid.height, patch % grid.width)


def rotary_angles(position: Positions, frame_index_BF: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin, each [B, N, 36] fp32, of the angles by which the pairs (0,1), (2,3), … of each head turn.

    f_k = 10000^(−6k/72), k = 0…11, for each axis; time positions come from `frame_index_BF`, clamped to 0…479.
    """
    k = torch.arange(_AXIS_PAIRS, device=frame_index_BF.device, dtype=torch.float64)
    frequency = (10000.0 ** (-6 * k / HEAD_DIM)).float()
    time_BN = frame_index_BF[:, position.frame_N].clamp(0, MAX_TIME - 1)
    axes_BN3 = torch.stack(
        [position.row_N.expand_as(time_BN), position.column_N.expand_as(time_BN), time_BN], dim=-1
    ).float()
    angle = (axes_BN3[..., None] * frequency).flatten(-2)
    return angle.cos(), angle.sin()
