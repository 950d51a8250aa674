"""Which held-out samples go through the model together."""

import numpy as np

from mugv_ds.data.manifest import Shape

Picks = list[tuple[int, int | None]]  # (row, visit); visit None is a filler that counts nowhere


def sweep(shapes: np.ndarray, at_once: int) -> list[tuple[Shape, list[Picks]]]:
    """Every readable row once, by latent shape, in chunks of `at_once`; the last chunk is filled up with fillers.

    Args:
        shapes: int [n, 3], (T, H, W) of every row, zeros where it cannot be read. at_once: rows of a chunk.
    """
    rows_of: dict[Shape, list[int]] = {}
    for row, shape in enumerate(map(tuple, shapes.tolist())):
        if any(shape):
            rows_of.setdefault(shape, []).append(row)
    plan = []
    for shape, rows in sorted(rows_of.items()):
        picks: Picks = [(row, 0) for row in rows]
        picks += [(rows[-1], None)] * (-len(picks) % at_once)
        plan.append((shape, [picks[i : i + at_once] for i in range(0, len(picks), at_once)]))
    return plan
