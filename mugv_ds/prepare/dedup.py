"""Near-duplicates: which clips of different videos are alike, and which of each group stays.

Two steps. `find_pairs` compares clips, whatever was decided on them, so a changed bound leaves its result as it is.
`keep` decides by a total order, so its result does not depend on the order of work.

Candidates by picture share, in the same one of their 8 frames, two of the five bands of the 64-bit hash: of frames that
differ by 4, 6, 8 bits, clips meet with probability 1.00, 0.96, 0.63, and of 12 M clips 0.24 others by chance in each
of the 80 tables. Each table is made from the memory-mapped hashes, sorted and let go before the next, in slices of
its keys if there are many clips, so that memory does not grow with them.
"""

import itertools
import math
import re
import tempfile
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mugv_ds.config.prepare_schema import DedupSection
from mugv_ds.prepare.rows import DUPLICATE, PAIR

FRAMES = 8  # of a clip that have a hash

_KINDS = ("picture", "mirror", "caption", "embedding")
_BANDS = ((0, 13), (13, 13), (26, 13), (39, 13), (52, 12))  # first bit and bits
_LEAST_FRAMES = 4  # that must have a hash in both clips
_SLICE = 1 << 22  # keys that are sorted at a time
_CHECKED = 1 << 18  # pairs that are compared at a time
_NEAR = 64  # in a run of equal keys, a clip is compared with as many after it: all of them in all but odd sets

_PERMUTATIONS, _ROWS = 128, 8  # of MinHash; 16 bands of 8 rows meet with probability 0.95 at a likeness of 0.8
_BANDS_OF_CAPTIONS = _PERMUTATIONS // _ROWS
_FACTORS, _SUMMANDS = np.random.PCG64(0).random_raw(2 * _PERMUTATIONS).reshape(2, -1)
_FACTORS |= np.uint64(1)
_WORD = re.compile(r"\w+")

_POINTS = 64  # of a cluster that it is fitted on, at most
_TILE = 1024  # embeddings that are compared with as many others at a time


@dataclass(frozen=True)
class DedupRows:
    """What is compared of one unit's clips.

    Attributes:
        clips: with clip, video, phash and phash_mirror of `rows.CLIP`.
        captions: with clip and caption of `rows.CAPTION`, or None.
        embeddings: with clip and embedding of `rows.AESTHETIC`, or None.
    """

    clips: pa.Table
    captions: pa.Table | None = None
    embeddings: pa.Table | None = None


def hash_matrix(column: pa.ChunkedArray) -> np.ndarray:
    """Returns a column of 8 hashes a clip as uint64 [clips, 8]; a clip that has none, as its frames, gets zeros."""
    lists = column.combine_chunks()
    hashes = np.zeros((len(lists), FRAMES), np.uint64)
    whole = np.asarray(pc.equal(pc.list_value_length(lists), FRAMES).fill_null(False), bool)
    flat = lists.filter(pa.array(whole)).flatten().fill_null(0)
    hashes[whole] = np.asarray(flat, np.uint64).reshape(-1, FRAMES)
    return hashes


def least_distance(hashes: np.ndarray, listed: np.ndarray) -> np.ndarray:
    """Returns the fewest bits between any frame of a clip and any listed hash, float64 [clips]; NaN without hashes.

    Args:
        hashes: uint64 [clips, 8]. listed: uint64 [n].
    """
    least = np.full(hashes.shape, np.nan)
    for one in listed:
        least = np.fmin(least, np.bitwise_count(hashes ^ one))
    least[hashes == 0] = np.nan
    return np.fmin.reduce(least, axis=1)


def distances(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and largest number of bits by which the frames of pairs of clips differ, float64 [...].

    Frames without a hash in either do not count; both are infinite for pairs of fewer than 4 frames that do.

    Args:
        a, b: uint64 [..., 8]; they are broadcast.
    """
    there = (a != 0) & (b != 0)
    bits = np.bitwise_count(a ^ b) * there
    frames = there.sum(axis=-1)
    enough = frames >= _LEAST_FRAMES
    mean = np.where(enough, bits.sum(axis=-1) / np.maximum(frames, 1), np.inf)
    return mean, np.where(enough, bits.max(axis=-1), np.inf)


def find_pairs(units: Iterable[DedupRows], config: DedupSection, scratch: Path) -> pa.Table:
    """Returns pairs of clips of different videos that are alike, as rows.PAIR, in order of (a, b).

    A group of n clips that belong together has n − 1 pairs, which join them: those that were found first, by picture,
    mirrored, by caption, by embedding. A clip that is like more than 64 others in the same way is compared with the 64
    whose ids follow.

    Args:
        units: in any order. scratch: an existing folder with room for about 300 bytes a clip, 600 more of one with a
            caption, and two an element of an embedding; nothing stays in it.

    Raises:
        OSError: the file system failed. ImportError: config.embeddings without the package faiss.
    """
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        store = _Store(Path(folder), units, config.embeddings)
        found = _Pairs(Path(folder) / "parents", store)
        for first, second, _ in _picture_candidates(store, mirror=False):
            found.check(first, second, "picture", config.mean, config.worst)
        if config.mirror:  # later, so that a clip that is like another as it is gives way as such
            for first, second, mirrored in _picture_candidates(store, mirror=True):
                found.check(first[mirrored], second[mirrored], "mirror", config.mean, config.worst)
        for first, second in _caption_candidates(store):
            found.check(first, second, "caption", config.caption_mean, 64, config.caption_jaccard)
        if config.embeddings:
            for first, second, cosine in _embedding_pairs(store, config):
                found.join(first, second, "embedding", cosine)
        return found.table()


def keep(judged: Callable[[], Iterable[tuple[pa.Table, pa.Table]]], pairs: pa.Table, config: DedupSection) -> pa.Table:
    """Returns which clips give way, as rows.DUPLICATE in order of clips.

    Best is what is accepted by the bounds, then what has more pixels, then the better composite score, then the lower
    id. Of clips that `pairs` join, the best stays, and others of its video. Of one video's clips that look alike and
    are still there, config.per_source stay: from the best on, a clip gives way if as many that stay are like it.

    Args:
        judged: gives (clips as rows.CLIP, what `select.judge` says of them) of each unit, anew at each call; the clips
            of a video are in one unit.
    """
    joined = _Joined(pairs)
    for clips, verdicts in judged():
        joined.add(_Ranked(clips, verdicts))
    given = [joined.given_way()]
    gone = np.array(given[0]["clip"].to_pylist(), "S32")  # in order
    for clips, verdicts in judged():
        given.append(_too_many(_Ranked(clips, verdicts), gone, config))
    return pa.concat_tables(given).sort_by("clip")


def ids_of(column: pa.ChunkedArray) -> np.ndarray:
    """Returns ids of up to 32 characters as NumPy bytes, S32 [n], which sort as the ids do; null is empty."""
    return np.array(column.combine_chunks().cast(pa.binary()).fill_null(b"").to_numpy(zero_copy_only=False), "S32")


class _Ranked:
    """What the total order of a unit's clips follows from, one value a clip, and their hashes."""

    def __init__(self, clips: pa.Table, verdicts: pa.Table) -> None:
        verdicts = verdicts[: len(clips)]  # after them come videos without clips
        self.ids, self.videos = ids_of(clips["clip"]), np.array(clips["video"].to_pylist(), "S64")
        self.accepted = np.asarray(verdicts["accepted"], bool)
        sides = (np.asarray(clips[name].cast(pa.int64()).fill_null(0), np.int64) for name in ("width", "height"))
        self.pixels = np.multiply(*sides)
        self.composite = np.asarray(verdicts["composite"].fill_null(-1.0), np.float64)
        self.hashes = hash_matrix(clips["phash"])


def _best_first(accepted: np.ndarray, pixels: np.ndarray, composite: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Returns the total order in which clips are kept, int64 [n]."""
    return np.lexsort((ids, -composite, -pixels, ~accepted))


class _Joined:
    """The clips that pairs join, and what is known of each. Memory grows with the pairs alone."""

    def __init__(self, pairs: pa.Table) -> None:
        names = np.concatenate([ids_of(pairs["a"]), ids_of(pairs["b"])])
        self._ids, numbers = np.unique(names, return_inverse=True)
        count, ends = len(self._ids), numbers.reshape(2, -1)
        parent = np.arange(count, dtype=np.int32)
        _unite(parent, *ends, np.zeros(len(pairs)))
        self._roots = _find(parent, np.arange(count))
        kinds = np.tile(np.asarray(pc.index_in(pairs["kind"], value_set=pa.array(_KINDS)), np.int64), 2)
        values = np.tile(np.asarray(pairs["distance"], np.float64), 2)
        far = np.where(kinds == _KINDS.index("embedding"), -values, values)
        order = np.lexsort((far, kinds, numbers))
        nearest = order[np.searchsorted(numbers[order], np.arange(count))]
        self._kinds, self._distances = kinds[nearest], values[nearest]
        self._known: list[tuple[np.ndarray, ...]] = []

    def add(self, unit: _Ranked) -> None:
        """Takes what a unit says of the clips that are in pairs."""
        if len(self._ids):
            slot = np.minimum(np.searchsorted(self._ids, unit.ids), len(self._ids) - 1)
            of = np.flatnonzero(self._ids[slot] == unit.ids)
            known = (slot, unit.accepted, unit.pixels, unit.composite, unit.ids, unit.videos)
            self._known.append(tuple(part[of] for part in known))

    def given_way(self) -> pa.Table:
        """Returns the clips that give way to the best of what they are joined with, in order of clips."""
        if not self._known:
            return DUPLICATE.empty_table()
        slot, accepted, pixels, composite, ids, videos = (
            np.concatenate(part) for part in zip(*self._known, strict=True)
        )
        order = _best_first(accepted, pixels, composite, ids)
        slot, ids, videos = slot[order], ids[order], videos[order]
        roots, first = np.unique(self._roots[slot], return_index=True)
        best = first[np.searchsorted(roots, self._roots[slot])]
        gone = np.flatnonzero(videos != videos[best])
        gone = gone[np.argsort(ids[gone])]
        columns = {
            "clip": _strings(ids[gone]),
            "of": _strings(ids[best[gone]]),
            "kind": pa.array(_KINDS).take(pa.array(self._kinds[slot[gone]])),
            "distance": self._distances[slot[gone]],
        }
        return pa.table(columns, schema=DUPLICATE)


def _too_many(unit: _Ranked, gone: np.ndarray, config: DedupSection) -> pa.Table:
    """Returns the clips of a unit that are too many alike of one video, as rows.DUPLICATE.

    Args:
        gone: ids that give way already, S32, in order.
    """
    clips: list[bytes] = []
    of: list[bytes] = []
    values: list[float] = []
    left = np.flatnonzero(~_is_in(unit.ids, gone) & (unit.hashes != 0).any(axis=1))
    best = left[_best_first(*(part[left] for part in (unit.accepted, unit.pixels, unit.composite, unit.ids)))]
    best = best[np.argsort(unit.videos[best], kind="stable")]
    for rows in np.split(best, np.flatnonzero(unit.videos[best][1:] != unit.videos[best][:-1]) + 1):
        if len(rows) <= config.per_source:
            continue
        hashes, stays = unit.hashes[rows], np.ones(len(rows), bool)
        step = max(1, _CHECKED // len(rows))
        for start in range(0, len(rows), step):
            mean, _ = distances(hashes[start : start + step, None], hashes[None])
            near = np.tril(mean <= config.per_source_mean, start - 1)  # to those that are better
            for i in np.flatnonzero(near.sum(axis=1) >= config.per_source):
                like = np.flatnonzero(near[i] & stays)
                if len(like) >= config.per_source:
                    stays[start + i] = False
                    clips.append(unit.ids[rows[start + i]])
                    of.append(unit.ids[rows[like[0]]])
                    values.append(mean[i, like].min())
    columns = {"clip": _strings(clips), "of": _strings(of), "kind": ["source"] * len(clips), "distance": values}
    return pa.table(columns, schema=DUPLICATE)


class _Store:
    """All clips on disk, in order of their ids, whatever order they came in. A clip's number is its place in it.

    Attributes:
        count: clips. ids: uint8 [clips, 16]. videos: uint64 [clips], the first digits of the video's hash.
        hashes, mirrors: 8 columns each, uint64 [clips], memory-mapped.
        captioned: int32 [captions], numbers of the clips that have one; of_clip: int32 [clips], the way back, or −1.
        embedded: int32 [embeddings], numbers of the clips that have one.
    """

    def __init__(self, folder: Path, units: Iterable[DedupRows], embeddings: bool) -> None:
        self._folder = folder
        self.width = seen = 0
        names = ("ids", "videos", "hashes", "mirrors", "captioned", "signatures", "bands", "embedded", "embeddings")
        with ExitStack() as stack:
            files = {name: stack.enter_context((folder / name).open("wb")) for name in names}
            for unit in units:
                clips = unit.clips.filter(pc.is_valid(unit.clips["phash"]))
                _digits(clips["clip"], 32).tofile(files["ids"])
                np.ascontiguousarray(_digits(clips["video"], 64)[:, :8]).tofile(files["videos"])
                hash_matrix(clips["phash"]).tofile(files["hashes"])
                hash_matrix(clips["phash_mirror"]).tofile(files["mirrors"])
                if unit.captions is not None:
                    texts = unit.captions["caption"].take(pc.index_in(clips["clip"], value_set=unit.captions["clip"]))
                    there, found = signatures(texts.to_pylist())
                    (seen + there).astype(np.int32).tofile(files["captioned"])
                    found.tofile(files["signatures"])
                    bands = found.reshape(len(found), _BANDS_OF_CAPTIONS, _ROWS).astype(np.uint64) * _FACTORS[:_ROWS]
                    (bands.sum(axis=2) >> np.uint64(32)).astype(np.uint32).tofile(files["bands"])
                if embeddings and unit.embeddings is not None:
                    vectors = unit.embeddings["embedding"].take(
                        pc.index_in(clips["clip"], value_set=unit.embeddings["clip"])
                    )
                    there = np.flatnonzero(np.asarray(pc.is_valid(vectors), bool))
                    (seen + there).astype(np.int32).tofile(files["embedded"])
                    flat = np.asarray(vectors.drop_null().combine_chunks().flatten(), np.float16)
                    self.width = max(self.width, len(flat) // max(len(there), 1))
                    flat.tofile(files["embeddings"])
                seen += len(clips)
        self.count = seen
        arrived = np.fromfile(folder / "ids", np.uint8).reshape(-1, 16)
        order = np.lexsort(arrived.view(">u8").T[::-1])
        self.ids = arrived[order]
        if (again := (self.ids[1:] == self.ids[:-1]).all(axis=1)).any():
            raise ValueError(f"clip {self.ids[np.argmax(again)].tobytes().hex()} is there twice")
        del arrived
        number = np.empty(seen, np.int32)
        number[order] = np.arange(seen, dtype=np.int32)
        self.videos = np.fromfile(folder / "videos", np.uint64)[order]
        del order
        self.hashes, self.mirrors = (self._columns(name, number) for name in ("hashes", "mirrors"))
        self.captioned, self.embedded = (
            number[np.fromfile(folder / name, np.int32)] for name in ("captioned", "embedded")
        )
        self.of_clip = np.full(seen, -1, np.int32)
        self.of_clip[self.captioned] = np.arange(len(self.captioned))

    def signature(self, captions: np.ndarray) -> np.ndarray:
        """Returns the MinHash signatures of some captions, uint32 [n, 128]."""
        return self._rows("signatures", np.uint32, _PERMUTATIONS)[captions]

    def bands(self, band: int) -> np.ndarray:
        """Returns a hash of one band of each caption's signature, uint32 [captions]."""
        path, keys = self._folder / "bands", np.empty(len(self.captioned), np.uint32)
        for start in range(0, len(keys), _CHECKED):
            part = np.fromfile(path, np.uint32, _CHECKED * _BANDS_OF_CAPTIONS, offset=start * _BANDS_OF_CAPTIONS * 4)
            keys[start : start + _CHECKED] = part.reshape(-1, _BANDS_OF_CAPTIONS)[:, band]
        return keys

    def vectors(self, embeddings: np.ndarray) -> np.ndarray:
        """Returns some embeddings, of length 1, float32 [n, width]."""
        rows = self._rows("embeddings", np.float16, self.width)[embeddings].astype(np.float32)
        return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)

    def picked(self, columns: list[np.ndarray], clips: np.ndarray) -> np.ndarray:
        """Returns the hashes of some clips, uint64 [n, 8]."""
        return np.stack([column[clips] for column in columns], axis=1)

    def _rows(self, name: str, dtype: type, width: int) -> np.ndarray:
        path = self._folder / name
        if not path.stat().st_size:
            return np.empty((0, width), dtype)
        return np.memmap(path, dtype, "r").reshape(-1, width)  # anew at each call, so that its pages can go

    def _columns(self, name: str, number: np.ndarray) -> list[np.ndarray]:
        """Brings one hash of every clip after the other into the order of ids, and returns the 8 columns."""
        path = self._folder / name
        for frame in range(FRAMES):
            column = np.empty(self.count, np.uint64)
            for start in range(0, self.count, _CHECKED):
                part = np.fromfile(path, np.uint64, _CHECKED * FRAMES, offset=start * FRAMES * 8)
                column[number[start : start + _CHECKED]] = part.reshape(-1, FRAMES)[:, frame]
            column.tofile(self._folder / f"{name}{frame}")
        path.unlink()
        return [self._rows(f"{name}{frame}", np.uint64, 1)[:, 0] for frame in range(FRAMES)]


class _Pairs:
    """Pairs that were found, of which those that join nothing new are let go: at most clips − 1 stay."""

    def __init__(self, path: Path, store: _Store) -> None:
        self._store = store
        self._parent = np.memmap(path, np.int32, "w+", shape=(max(store.count, 1),))
        for start in range(0, store.count, _SLICE):
            end = min(start + _SLICE, store.count)
            self._parent[start:end] = np.arange(start, end)
        self._joined: list[tuple[np.ndarray, np.ndarray, str, np.ndarray]] = []

    def check(
        self, first: np.ndarray, second: np.ndarray, kind: str, mean: float, worst: int, jaccard: float | None = None
    ) -> None:
        """Compares pairs by their hashes, and by their captions where `jaccard` is given, and joins what is alike."""
        store = self._store
        others = store.mirrors if kind == "mirror" else store.hashes
        for start in range(0, len(first), _CHECKED):
            a, b = first[start : start + _CHECKED], second[start : start + _CHECKED]
            new = (store.videos[a] != store.videos[b]) & (_find(self._parent, a) != _find(self._parent, b))
            a, b = a[new], b[new]
            found, largest = distances(store.picked(store.hashes, a), store.picked(others, b))
            if kind == "caption":
                mirrored, _ = distances(store.picked(store.hashes, a), store.picked(store.mirrors, b))
                found = np.minimum(found, mirrored)
            near = (found <= mean) & (largest <= worst)
            a, b, found = a[near], b[near], found[near]
            if jaccard is not None and len(a):
                same = store.signature(store.of_clip[a]) == store.signature(store.of_clip[b])
                like = same.mean(axis=1) >= jaccard
                a, b, found = a[like], b[like], found[like]
            self.join(a, b, kind, found)

    def join(self, first: np.ndarray, second: np.ndarray, kind: str, distance: np.ndarray) -> None:
        """Joins pairs that are alike."""
        chosen = _unite(self._parent, first, second, -distance if kind == "embedding" else distance)
        if len(chosen):
            self._joined.append((first[chosen], second[chosen], kind, distance[chosen]))

    def table(self) -> pa.Table:
        """Returns the pairs that joined something, as rows.PAIR, in order."""
        parts = []
        for first, second, kind, distance in self._joined:
            a, b = np.minimum(first, second), np.maximum(first, second)
            names = [_strings(self._store.ids[end].tobytes().hex().encode()) for end in (a, b)]
            columns = {"a": names[0], "b": names[1], "kind": [kind] * len(a), "distance": distance.astype(np.float64)}
            parts.append(pa.table(columns, schema=PAIR))
        return pa.concat_tables([PAIR.empty_table(), *parts]).sort_by([("a", "ascending"), ("b", "ascending")])


def signatures(captions: Sequence[str | None]) -> tuple[np.ndarray, np.ndarray]:
    """Returns MinHash signatures of captions' word 3-grams (Broder 1997), by multiply-shift hashing.

    Two captions' share of equal values estimates the Jaccard likeness of their sets of 3-grams, with a standard error
    of at most 0.045. A shorter caption is one gram.

    Returns:
        int64 [n], the places of captions that have a word; uint32 [n, 128].
    """
    there, grams, starts = [], array("I"), array("q")
    for place, caption in enumerate(captions):
        words = _WORD.findall((caption or "").lower())
        if words:
            there.append(place)
            starts.append(len(grams))
            count = max(len(words) - 2, 1)
            grams.extend({zlib.crc32(" ".join(words[i : i + 3]).encode()) for i in range(count)})
    found = np.empty((len(there), _PERMUTATIONS), np.uint32)
    ends = [*starts[1:], len(grams)]
    hashes = np.frombuffer(grams, np.uint32).astype(np.uint64)
    for i, (start, end) in enumerate(zip(starts, ends, strict=True)):
        mixed = hashes[start:end, None] * _FACTORS + _SUMMANDS  # modulo 2⁶⁴
        found[i] = mixed.min(axis=0) >> np.uint64(32)
    return np.array(there, np.int64), found


def _picture_candidates(store: _Store, mirror: bool) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields pairs of clips that share two bands of a frame's hash, or of the second clip's mirrored frame.

    Yields:
        int64 [pairs], int64 [pairs], bool [pairs]: first clip, second clip, whether the second one is mirrored.
    """
    sides = 2 if mirror else 1
    slices = max(1, -(-sides * store.count // _SLICE))
    for frame, (one, other) in itertools.product(range(FRAMES), itertools.combinations(_BANDS, 2)):
        for part in range(slices):
            keys = [
                _keys(column, side, one, other, part, slices)
                for side, columns in enumerate((store.hashes, store.mirrors)[:sides])
                for column in [columns[frame]]
            ]
            table = np.sort(np.concatenate(keys))
            for at, to in _runs(table >> np.uint64(32)):
                a, b = table[at], table[to]
                flag_a, flag_b = (a & np.uint64(1)).astype(bool), (b & np.uint64(1)).astype(bool)
                a, b = ((end & np.uint64(0xFFFFFFFF)) >> np.uint64(1) for end in (a, b))
                a, b = np.where(flag_a, b, a).astype(np.int64), np.where(flag_a, a, b).astype(np.int64)
                useful = ~(flag_a & flag_b) & (a != b)
                yield a[useful], b[useful], (flag_a != flag_b)[useful]


def _keys(
    column: np.ndarray, side: int, one: tuple[int, int], other: tuple[int, int], part: int, slices: int
) -> np.ndarray:
    """Returns the keys of one table's slice: two bands of the hash, the clip's number, and whether it is mirrored."""
    found = [np.empty(0, np.uint64)]
    for start in range(0, len(column), _CHECKED):
        hashes = np.asarray(column[start : start + _CHECKED])
        bands = [(hashes >> np.uint64(at)) & np.uint64((1 << bits) - 1) for at, bits in (one, other)]
        of = np.flatnonzero((hashes != 0) & (bands[0] % np.uint64(slices) == part))
        key = (bands[0][of] << np.uint64(13)) | bands[1][of]
        found.append((key << np.uint64(32)) | ((of + start).astype(np.uint64) << np.uint64(1)) | np.uint64(side))
    return np.concatenate(found)


def _runs(keys: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields places of equal keys, of which each is at most 64 after the other. keys: in order."""
    at = np.arange(len(keys))
    for step in range(1, _NEAR + 1):
        at = at[at + step < len(keys)]
        at = at[keys[at] == keys[at + step]]
        if not len(at):
            return
        yield at, at + step


def _caption_candidates(store: _Store) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields pairs of clips whose captions share a band of their signatures."""
    for band in range(_BANDS_OF_CAPTIONS):
        table = np.sort((store.bands(band).astype(np.uint64) << np.uint64(32)) | store.captioned.astype(np.uint64))
        for at, to in _runs(table >> np.uint64(32)):
            yield tuple((table[end] & np.uint64(0xFFFFFFFF)).astype(np.int64) for end in (at, to))


def _embedding_pairs(store: _Store, config: DedupSection) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yields pairs of clips of different videos, of one cluster, and the cosine of their embeddings (SemDeDup)."""
    import faiss

    order = np.argsort(store.embedded)
    if not len(order):
        return
    count = min(config.clusters or max(1, round(math.sqrt(len(order)))), len(order))
    faiss.omp_set_num_threads(1)  # sums in one order
    means = faiss.Kmeans(
        store.width, count, spherical=True, seed=0, min_points_per_centroid=1, max_points_per_centroid=_POINTS
    )
    sample = order[np.linspace(0, len(order) - 1, min(len(order), count * _POINTS)).astype(np.int64)]
    means.train(store.vectors(sample))
    cluster = np.empty(len(order), np.int64)
    for start in range(0, len(order), _POINTS * 256):
        cluster[start : start + _POINTS * 256] = means.index.search(
            store.vectors(order[start : start + _POINTS * 256]), 1
        )[1][:, 0]
    by_cluster = np.argsort(cluster, kind="stable")
    for rows in np.split(order[by_cluster], np.flatnonzero(np.diff(cluster[by_cluster])) + 1):
        for i, j in itertools.combinations_with_replacement(range(0, len(rows), _TILE), 2):
            one, other = rows[i : i + _TILE], rows[j : j + _TILE]
            cosine = np.round(store.vectors(one) @ store.vectors(other).T, 4)  # further digits depend on the machine
            if i == j:
                cosine = np.triu(cosine, 1)
            at, to = np.nonzero(cosine >= config.cosine)
            a, b = store.embedded[one[at]].astype(np.int64), store.embedded[other[to]].astype(np.int64)
            differ = store.videos[a] != store.videos[b]
            yield a[differ], b[differ], cosine[at, to][differ].astype(np.float64)


def _find(parent: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Returns the roots of nodes, and makes their ways there shorter."""
    roots = parent[nodes]
    while not np.array_equal(above := parent[roots], roots):
        roots = above
    parent[nodes] = roots
    return roots


def _unite(parent: np.ndarray, first: np.ndarray, second: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Joins the trees of pairs of nodes, union–find over many pairs at a time; the root of a tree is its least node.

    Each round hooks every root to a lower one by the nearest of its pairs; what is left then goes on.

    Args:
        parent: int32 [nodes], changed. first, second: int64 [pairs]. distance: [pairs]; nearer pairs are preferred.

    Returns:
        int64, which pairs joined two trees.
    """
    left, chosen = np.arange(len(first)), [np.empty(0, np.int64)]
    while len(left):
        one, other = _find(parent, first[left]), _find(parent, second[left])
        low, high = np.minimum(one, other), np.maximum(one, other)
        apart = low != high
        left, low, high = left[apart], low[apart], high[apart]
        order = np.lexsort((left, distance[left], high))
        hooks = order[np.flatnonzero(np.diff(high[order], prepend=-1))]
        parent[high[hooks]] = low[hooks]
        chosen.append(left[hooks])
    return np.concatenate(chosen)


def _is_in(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Returns which ids are among others that are in order, bool [n]."""
    if not len(among):
        return np.zeros(len(ids), bool)
    return among[np.minimum(np.searchsorted(among, ids), len(among) - 1)] == ids


def _digits(column: pa.ChunkedArray, count: int) -> np.ndarray:
    """Returns the bytes that ids of `count` hex digits stand for, uint8 [n, count / 2].

    Raises:
        ValueError: an id is something else.
    """
    raw = bytes.fromhex("".join(column.to_pylist()))
    if len(raw) * 2 != len(column) * count:
        raise ValueError(f"an id is not of {count} hex digits")
    return np.frombuffer(raw, np.uint8).reshape(-1, count // 2)


def _strings(ids: np.ndarray | Sequence[bytes] | bytes) -> pa.Array:
    """Returns ids as strings; bytes are those of 32 digits, one after the other."""
    if isinstance(ids, bytes):
        ids = np.frombuffer(ids, "S32")
    return pa.array([one.decode() for one in ids], pa.string())
