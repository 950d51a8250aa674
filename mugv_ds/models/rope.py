"""Positions of the tokens in (time, height, width), and their 3D rotary embedding.

The sequence is one start token, the T·h·w patches in (t, h, w) order, and one end token. A token is named by its
index in that sequence; indices past the end token are padding and sit where the end token sits. Nothing here depends
on holding the whole sequence: callers pass the indices of the tokens they have.

Shape suffixes: B batch, N tokens held, F latent frames + 2 (start and end token), P = 12 pairs of an axis.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mugv_ds.config.model import HEAD_DIM, MAX_LATENT_SIDE

MAX_TIME = 480  # time positions of the published tables; later ones are clamped
MAX_SPACE = MAX_LATENT_SIDE // 2  # patches along a side that the published tables reach to
_AXIS_PAIRS = HEAD_DIM // 6  # complex pairs of one axis; a head holds [height | width | time]


class Grid(NamedTuple):
    """Numbers of patches of one sample along time, height and width."""

    frames: int
    height: int
    width: int

    @property
    def patches(self) -> int:
        """Returns the number of patches."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Returns the length of the sequence, with its start and end token."""
        return self.patches + 2


def patch_grid(frames: int, height: int, width: int) -> Grid:
    """Returns the patch grid of a latent [T, H, W]: patches are (1, 2, 2), and an odd side is padded on the high end.

    Raises:
        ValueError: a side has more than 384 patches, the reach of the published position tables.
    """
    grid = Grid(frames, (height + 1) // 2, (width + 1) // 2)
    if max(grid.height, grid.width) > MAX_SPACE:
        raise ValueError(f"latent of {height}×{width}: at most {2 * MAX_SPACE} latent pixels a side have positions")
    return grid


class Positions(NamedTuple):
    """Where each token that is held sits."""

    patch_N: Tensor  # its row in the patchified latent
    frame_N: Tensor  # 0 for the start token, 1 … T for patches, T + 1 for the end token
    row_N: Tensor  # in patches, from the top
    column_N: Tensor  # in patches, from the left


def positions(token_N: Tensor, grid: Grid) -> Positions:
    """Returns the positions of the tokens `token_N` (indices into the sequence) of a sample with this grid."""
    # The start token takes the first patch's place, the end token the last's.
    patch = (token_N - 1).clamp(0, grid.patches - 1)
    frame = (patch // (grid.height * grid.width) + 1).masked_fill(token_N == 0, 0)
    frame = frame.masked_fill(token_N > grid.patches, grid.frames + 1)
    return Positions(patch, frame, patch // grid.width % grid.height, patch % grid.width)


def rotary_angles(position: Positions, frame_index_BF: Tensor) -> tuple[Tensor, Tensor]:
    """Returns cos and sin, each [B, N, 36] fp32, of the angles by which the pairs (0,1), (2,3), … of each head turn.

    An angle is position · f_k with f_k = 10000^(−6k/72), k = 0 … 11, first for the row, then the column, then the time
    (Su et al. 2021, RoFormer, eq. 15, with 24 channels for each axis).

    Args:
        frame_index_BF: time position of the start token, each frame and the end token; clamped to 0 … 479.
    """
    k = torch.arange(_AXIS_PAIRS, device=frame_index_BF.device, dtype=torch.float64)
    frequency = (10000.0 ** (-6 * k / HEAD_DIM)).float()
    time_BN = frame_index_BF[:, position.frame_N].clamp(0, MAX_TIME - 1)
    axes_BN3 = torch.stack(
        [position.row_N.expand_as(time_BN), position.column_N.expand_as(time_BN), time_BN], dim=-1
    ).float()
    angle = (axes_BN3[..., None] * frequency).flatten(-2)  # [B, N, 3·P]
    return angle.cos(), angle.sin()
