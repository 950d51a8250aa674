"""Which row is read in place of one that cannot be."""

import numpy as np

from mugv_ds.data.manifest import Index
from mugv_ds.data.noise import generator


def replacement(index: Index, row: int, seed: int, visit: int, attempt: int) -> int | None:
    """Another row with the latent shape of `row`; None if there is none.

    It follows from (seed, sample id, visit, attempt) alone, so every process that reads the sample takes the same one,
    and a resumed run takes it again.

    Args:
        index: the manifest. row: the row that cannot be read. visit: how many times it was visited before.
        attempt: from 0, raised when the replacement cannot be read either.
    """
    shapes = index.shapes()
    others = np.flatnonzero((shapes == shapes[row]).all(axis=1))
    others = others[others != row]
    if not len(others):
        return None
    key = ("replacement", seed, index.row(row).sample_id, visit, attempt)
    return int(others[generator(*key).integers(len(others))])
