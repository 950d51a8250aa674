"""Reads the preferences of a manifest: which rows are pairs (DPO), and which are good or bad (KTO)."""

import logging

import numpy as np
import pyarrow.compute as pc

from mugv_ds.data.manifest import Index, ManifestError

logger = logging.getLogger(__name__)


def pairs(index: Index) -> np.ndarray:
    """Returns the rows of each pair, from the columns `pair_id` and `rank`; the lower rank is the better one.

    Pairs are in the order in which the CSV first names them. Those with a latent that could not be read are left out,
    and counted in one warning.

    Returns:
        int32 [pairs, 2]: the better row, the worse row.

    Raises:
        ManifestError: a row has no pair_id; a pair has other than two rows, a missing rank, equal ranks or latents of
            two shapes; no pair can be read.
    """
    pair_ids = index.column("pair_id")
    if pair_ids.null_count:
        row = _first(pair_ids.is_null().to_numpy())
        raise ManifestError(
            f"{index.root}: {pair_ids.null_count} rows have no pair_id, the first is sample {_name(index, row)}; give "
            "the two samples of a pair the same pair_id, and leave others out of this manifest"
        )
    numbers = pair_ids.dictionary_encode().combine_chunks().indices.to_numpy()  # in the order of first appearance
    ranks = index.column("rank").fill_null(-1).to_numpy()
    order = np.lexsort((ranks, numbers))  # stable

    sizes = np.bincount(numbers)
    if (sizes != 2).any():
        rows = np.flatnonzero(numbers == _first(sizes != 2))
        raise _error(index, rows, f"has {len(rows)} row{'s' * (len(rows) > 1)}; give it two, a better and a worse one")

    rows = order.astype(np.int32).reshape(-1, 2)
    rank = ranks[rows]
    if (missing := (rank < 0).any(axis=1)).any():
        raise _error(index, rows[_first(missing)], "lacks a rank; give the better sample 1 and the worse one 2")
    if (equal := rank[:, 0] == rank[:, 1]).any():
        first = _first(equal)
        raise _error(index, rows[first], f"has rank {rank[first, 0]} twice; give the better sample the lower rank")
    shape = index.shapes()[rows]
    readable = shape.any(axis=2).all(axis=1)
    if (unlike := readable & (shape[:, 0] != shape[:, 1]).any(axis=1)).any():
        first = _first(unlike)
        both = " and ".join(str(tuple(latent)) for latent in shape[first].tolist())
        raise _error(index, rows[first], f"has latents of (T, H, W) = {both}; encode both at one size and length")
    if not readable.any():
        raise ManifestError(f"{index.root}: no pair has two latents that can be read; repair the latents")
    if not readable.all():
        logger.warning(
            "%s: %d of %d pairs are left out, one of their latents could not be read",
            index.root,
            len(readable) - readable.sum(),
            len(readable),
        )
    return rows[readable]


def labels(index: Index) -> np.ndarray:
    """Returns bool [rows], from the column `label`: True for good samples, False for bad ones.

    It is False too for a row without label whose latent cannot be read; such a row is never played.

    Raises:
        ManifestError: a readable row has no label.
    """
    label = index.column("label")
    missing = label.is_null().to_numpy() & index.shapes().any(axis=1)
    if missing.any():
        raise ManifestError(
            f"{index.root}: {missing.sum()} samples have no label, the first is {_name(index, _first(missing))}; set "
            "the column label to good or bad, or leave them out of this manifest"
        )
    return pc.equal(label, "good").fill_null(False).to_numpy()


def _first(mask: np.ndarray) -> int:
    """Returns the first index at which the mask is True."""
    return int(mask.argmax())


def _name(index: Index, row: int) -> str:
    return repr(index.row(row).sample_id)


def _error(index: Index, rows: np.ndarray, problem: str) -> ManifestError:
    """Makes the error that the pair of `rows` has this problem; it names at most four of the rows."""
    names = ", ".join(_name(index, int(row)) for row in rows[:4]) + ", …" * (len(rows) > 4)
    return ManifestError(f"{index.root}: pair {index.row(int(rows[0])).pair_id!r} ({names}) {problem}")
