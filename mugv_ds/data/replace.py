"""Which unit (a sample, or a pair) is read in place of one that cannot be."""

import numpy as np

from mugv_ds.data.noise import generator


def replacement(shapes: np.ndarray, unit: int, *, seed: int, name: str, visit: int, attempt: int) -> int | None:
    """Another unit with the latent shape of `unit`; None if there is none.

    It follows from (seed, name, visit, attempt) alone, so every process that reads the unit takes the same one, and a
    resumed run takes it again.

    Args:
        shapes: int [n, 3], of every unit. unit: the one that cannot be read, called `name`.
        visit: how many times it was visited before.
        attempt: from 0, raised when the replacement cannot be read either.
    """
    others = np.flatnonzero((shapes == shapes[unit]).all(axis=1))
    others = others[others != unit]
    if not len(others):
        return None
    return int(others[generator("replacement", seed, name, visit, attempt).integers(len(others))])
