"""The one place where scores meet bounds: which clips are accepted, and of the others every reason, with its numbers.

Scores are written once and never drop a row. What is decided here follows from them and the config alone, whatever the
order and size of the units: so a changed bound costs seconds. Memory does not grow with the clips, but for 8 bytes an
accepted one where only the best are kept (select.top), and what the duplicates take.
"""

import math
from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.prepare_schema import Bound, PrepareConfig
from mugv_ds.prepare.dedup import hash_matrix, ids_of, keep, least_distance
from mugv_ds.prepare.prompts import QUESTIONS
from mugv_ds.prepare.rows import COPY, DUPLICATE, GATE, REASON, SELECT
from mugv_ds.prepare.screen import Screening

# What is read of the videos; the lists of values a frame are not.
VIDEO_COLUMNS = (
    "video",
    "path",
    "bytes",
    "error",
    "detail",
    "hdr",
    "claimed",
    "duration",
    "fps",
    "bitrate",
    "interlaced",
)
EXTRAS = ("text", "aesthetic", "safety", "vlm", "caption", "tags")

_NO_BOUND = Bound()
_COMPOSITE = ("aesthetic", "motion", "sharp_med")
_BITS = 18  # of a float32 that tell the bins of the histograms of scores apart: sign, exponent, 9 of the fraction
_FIXED = 1 << 40  # weights are summed as whole multiples of its inverse, exactly, so that no order matters


@dataclass(frozen=True)
class UnitRows:
    """The fragments of one unit of videos.

    Attributes:
        videos, clips: with the columns of `rows.VIDEO` (of these `VIDEO_COLUMNS` will do) and `rows.CLIP`.
        extras: step → its rows, for each step of `EXTRAS` that ran; a clip that the gate left out has none.
        copies: as `rows.COPY`, of the unit's videos.
        fits: as `rows.FIT`, or None where it is not known.
    """

    videos: pa.Table
    clips: pa.Table
    extras: Mapping[str, pa.Table] = field(default_factory=dict)
    copies: pa.Table = field(default_factory=COPY.empty_table)
    fits: pa.Table | None = None


Units = Callable[[], Iterable[UnitRows]]  # begins anew at each call


@dataclass(frozen=True)
class Limit:
    """A bound as it holds, and what is told where it does not.

    Attributes:
        step: whose score it is. score: name of the score. bound: the range that is accepted.
        below, above: the reasons' names.
        published: the range that the paper, or whom the schema names, gives.
        axis: the range over which the score is looked at, and whether as a logarithm.
    """

    step: str
    score: str
    bound: Bound
    below: str
    above: str
    published: tuple[float | None, float | None] = (None, None)
    axis: tuple[float, float, bool] = (0.0, 1.0, False)


def limits(config: PrepareConfig, ran: Collection[str] = EXTRAS) -> list[Limit]:
    """Returns the bounds that hold: those of the config, and of the optional steps that ran the usual ones.

    Args:
        ran: which of `EXTRAS` ran.
    """
    select = config.select
    least = float(min(min(bucket.height, bucket.width) for bucket in config.encode.buckets))
    low_sharp, high_sharp = ("sharp_med",) * 2 if select.sharp.rule == "median" else ("sharp_min", "sharp_max")
    sharp, sharp_axis = (200.0, 2000.0), (1.0, 20_000.0, True)
    cheap = [
        Limit("probe", "duration", select.duration, "too_short", "too_long", (2.0, None), (0.1, 1000.0, True)),
        Limit("probe", "fps", select.fps, "low_fps", "high_fps", (16.0, None), (1.0, 240.0, True)),
        Limit("probe", "bitrate", select.bitrate, "low_bitrate", "high_bitrate", (0.02, None), (1e-4, 10.0, True)),
        Limit("probe", "decoded", select.decoded, "truncated", "truncated", axis=(0.0, 1.5, False)),
        Limit("probe", "interlaced", select.interlaced, "interlaced", "interlaced"),
        Limit("split", "aspect", select.aspect, "aspect", "aspect", (1 / 3, 3.0), (0.1, 10.0, True)),
        Limit("split", "short_side", Bound(low=least), "too_small", "too_small", axis=(64.0, 8192.0, True)),
        Limit("score", low_sharp, Bound(low=select.sharp.low), "blurred", "blurred", (sharp[0], None), sharp_axis),
        Limit(
            "score", high_sharp, Bound(high=select.sharp.high), "too_sharp", "too_sharp", (None, sharp[1]), sharp_axis
        ),
        Limit("score", "motion", select.motion, "still", "too_fast", (1.0, 20.0), (0.01, 200.0, True)),
        Limit("score", "area", select.area, "borders", "borders"),
        Limit("score", "repeated", select.repeated, "repeated", "repeated"),
        Limit("score", "shake", select.shake, "shake", "shake", axis=(1e-4, 1.0, True)),
        Limit("score", "luma", select.luma, "too_dark", "too_bright"),
        Limit("score", "dark", select.dark, "dark_pixels", "dark_pixels"),
        Limit("score", "bright", select.bright, "bright_pixels", "bright_pixels"),
    ]
    overlay, aesthetic = select.overlay or Bound(high=0.02), select.aesthetic or Bound(low=4.5)
    nsfw, faces = select.nsfw or _NO_BOUND, select.faces or _NO_BOUND
    extra = [
        Limit("text", "overlay", overlay, "overlay_text", "overlay_text", axis=(0.0, 0.5, False)),
        Limit("aesthetic", "aesthetic", aesthetic, "unaesthetic", "unaesthetic", (4.5, None), (0.0, 10.0, False)),
        Limit("safety", "nsfw", nsfw, "nsfw", "nsfw"),
        Limit("safety", "faces", faces, "faces", "faces", axis=(0.0, 20.0, False)),
    ]
    return cheap + [limit for limit in extra if limit.step in ran]


def check_bounds(config: PrepareConfig, ran: Collection[str]) -> None:
    """Refuses what asks for a score that no clip will have; to be called before anything runs.

    Args:
        ran: which of `EXTRAS` will run.

    Raises:
        ConfigError: a bound, or another key, asks for the result of a step that is skipped, or names no question.
    """
    select, balance, dedup = config.select, config.balance, config.dedup
    nsfw, faces = ("safety" in ran and getattr(config.safety, name) for name in ("nsfw", "faces"))
    asked = [
        ("select.overlay", select.overlay is not None, "text" in ran, "set text.enabled"),
        (
            "select.aesthetic",
            select.aesthetic is not None,
            "aesthetic" in ran,
            "give aesthetic.clip and aesthetic.head",
        ),
        ("select.nsfw", select.nsfw is not None, nsfw, "set safety.nsfw"),
        ("select.faces", select.faces is not None, faces, "set safety.faces"),
        ("select.vlm", bool(select.vlm), "vlm" in ran, "give vlm.url and vlm.model"),
        ("balance.group", balance.group is not None, "tags" in ran, "let tags run"),
        ("balance.up", bool(balance.up), "tags" in ran, "let tags run"),
        ("dedup.embeddings", dedup.embeddings, "aesthetic" in ran, "give aesthetic.clip and aesthetic.head"),
    ]
    for key, wanted, there, remedy in asked:
        if wanted and not there:
            raise ConfigError(
                f"{key}: asks for a score that no clip has, as its step is skipped; {remedy}, or leave it out"
            )
    for question in select.vlm or ():
        if question not in QUESTIONS:
            raise ConfigError(f"select.vlm: no question {question!r}; there are {', '.join(QUESTIONS)}")
    if balance.clip[0] > balance.clip[1]:
        raise ConfigError(f"balance.clip = {list(balance.clip)}: holds nothing; swap the two")


def gate(rows: UnitRows, config: PrepareConfig, screening: Screening) -> pa.Table:
    """Returns which clips the costly steps see (rows.GATE): those without a reason by screening and cheap scores."""
    verdict = _Verdict(UnitRows(rows.videos, rows.clips, fits=rows.fits), config, screening)
    return pa.table({"clip": rows.clips["clip"], "open": ~verdict.rejected[: len(rows.clips)]}, schema=GATE)


class Ranks:
    """Where a score stands among those of all clips, by histograms of 2¹⁸ fixed bins, each 0.2% wide.

    A percentile is the share of clips in lower bins and half of those in the same one: exact but for scores within one
    bin, and the same in whatever order the clips come.
    """

    def __init__(self) -> None:
        self._counts = {name: np.zeros(1 << _BITS, np.int64) for name in _COMPOSITE}

    @classmethod
    def of(cls, units: Iterable[UnitRows]) -> "Ranks":
        """Returns the ranks among the clips of these units, accepted or not."""
        ranks = cls()
        for rows in units:
            for name, values in _composite_scores(Scores(rows)).items():
                np.add.at(ranks._counts[name], _codes(values[~np.isnan(values)]), 1)
        return ranks

    @cached_property
    def _percentiles(self) -> dict[str, np.ndarray]:
        return {name: (np.cumsum(counts) - counts / 2) / max(counts.sum(), 1) for name, counts in self._counts.items()}

    def composite(self, scores: "Scores") -> np.ndarray:
        """Returns the mean of the percentiles of those scores that a row has, float64 [rows]; NaN where it has none."""
        found, total = np.zeros(scores.count), np.zeros(scores.count)
        for name, values in _composite_scores(scores).items():
            there = ~np.isnan(values)
            total[there] += self._percentiles[name][_codes(values[there])]
            found += there
        return np.divide(total, found, out=np.full(scores.count, np.nan), where=found > 0)


def judge(rows: UnitRows, config: PrepareConfig, screening: Screening, ranks: Ranks) -> pa.Table:
    """Returns what screening and bounds say of a unit (rows.SELECT, without group and weight).

    Duplicates, which are told apart by it, `select.top` and weights, which follow from the whole set, are not in it.
    """
    return _Verdict(rows, config, screening).table(ranks)


@dataclass(frozen=True)
class Selection:
    """What of the whole set decides on a clip: percentiles, duplicates, the cut of `select.top`, sizes of groups.

    Attributes:
        duplicates: as `rows.DUPLICATE`, in order of clips.
        cut: (composite, clips of just that composite that are accepted all the same), or None.
        counts: value of the class balance.group → accepted clips.
        mean: of the weights before they are normalised, by accepted clips.
    """

    config: PrepareConfig
    screening: Screening
    ranks: Ranks
    duplicates: pa.Table
    cut: tuple[float, frozenset[str]] | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    mean: Fraction = Fraction(1)

    @classmethod
    def of(
        cls, units: Units, config: PrepareConfig, screening: Screening, pairs: pa.Table, ranks: Ranks | None = None
    ) -> "Selection":
        """Goes over all units one to seven times, for the percentiles, the duplicates, the cut and the weights.

        Args:
            pairs: as `rows.PAIR`, by `dedup.find_pairs`. ranks: of the same units, if they are known.
        """
        ranks = ranks or Ranks.of(units())

        def judged() -> Iterator[tuple[pa.Table, pa.Table]]:
            return ((rows.clips, judge(rows, config, screening, ranks)) for rows in units())

        duplicates = keep(judged, pairs, config.dedup) if config.select.duplicates else DUPLICATE.empty_table()
        selection = cls(config, screening, ranks, duplicates)
        if config.select.top is not None:
            selection = selection._with(cut=selection._find_cut(units, config.select.top))
        if config.balance.group is not None:
            counts: Counter[str] = Counter()
            for tags in selection._accepted_tags(units):
                counts.update(_groups(tags, config.balance.group) or [""])
            selection = selection._with(counts=counts)
        if config.balance.group is not None or config.balance.up:
            total = number = 0
            for tags in selection._accepted_tags(units):
                total += round(selection._factor(tags) * _FIXED)
                number += 1
            if total:
                selection = selection._with(mean=Fraction(total, number * _FIXED))
        return selection

    def table(self, rows: UnitRows) -> pa.Table:
        """Returns what is decided on a unit (rows.SELECT); a pure function of it."""
        verdict = self._verdict(rows)
        tags, balance = verdict.tags(), self.config.balance
        groups = [None if balance.group is None else next(iter(_groups(some, balance.group)), None) for some in tags]
        low, high = balance.clip
        weights = [
            None if out else min(max(self._factor(some) / float(self.mean), low), high)
            for some, out in zip(tags, verdict.rejected, strict=True)
        ]
        return verdict.table(self.ranks, groups, weights)

    def _with(self, **changes: Any) -> "Selection":
        return Selection(**{name: getattr(self, name) for name in self.__dataclass_fields__} | changes)

    def _verdict(self, rows: UnitRows) -> "_Verdict":
        verdict = _Verdict(rows, self.config, self.screening)
        verdict.add_duplicates(self.duplicates, self._duplicate_ids)
        if self.cut is not None:
            verdict.add_cut(self.ranks, *self.cut)
        return verdict

    @cached_property
    def _duplicate_ids(self) -> np.ndarray:
        return ids_of(self.duplicates["clip"])

    def _find_cut(self, units: Units, share: float) -> tuple[float, frozenset[str]] | None:
        """Returns the least composite that is among the best `share`, and which clips of just that one are.

        At least one clip is kept; equal ones are kept in the order of their ids.
        """
        composites = array("d")
        for rows in units():
            verdict = self._verdict(rows)
            composites.frombytes(
                np.nan_to_num(self.ranks.composite(verdict.scores)[~verdict.rejected], nan=-1.0).tobytes()
            )
        if not composites:
            return None
        values = np.frombuffer(composites)
        wanted = max(1, math.floor(share * len(values)))
        least = float(np.partition(values, len(values) - wanted)[len(values) - wanted])
        left = wanted - int((values > least).sum())
        equal: list[str] = []
        for rows in units():
            verdict = self._verdict(rows)
            of = np.nan_to_num(self.ranks.composite(verdict.scores), nan=-1.0) == least
            equal = sorted(equal + verdict.clips.filter(pa.array(of & ~verdict.rejected)).to_pylist())[:left]
        return least, frozenset(equal)

    def _accepted_tags(self, units: Units) -> Iterator[list[str]]:
        for rows in units():
            verdict = self._verdict(rows)
            yield from (tags for tags, out in zip(verdict.tags(), verdict.rejected, strict=True) if not out)

    def _factor(self, tags: list[str]) -> float:
        """Returns a clip's weight before it is normalised: Π count^−½ over its groups (Movie Gen), × balance.up."""
        product = 1.0
        if self.config.balance.group is not None:
            for group in sorted(_groups(tags, self.config.balance.group)) or [""]:
                product *= max(self.counts.get(group, 0), 1) ** -0.5
        for tag, factor in sorted(self.config.balance.up.items()):
            if any(tag in (some, some.partition(":")[2]) for some in tags):
                product *= factor
        return product


class Scores:
    """The scores of a unit's rows by name, float64 [rows]: its clips, then its videos without clips, then its copies.

    A score that a row lacks is NaN.
    """

    def __init__(self, rows: UnitRows) -> None:
        self.rows = rows
        videos, clips = rows.videos, rows.clips
        alone = np.flatnonzero(~_mask(pc.is_in(videos["video"], value_set=clips["video"])))
        self.clips, self.count = len(clips), len(clips) + len(alone) + len(rows.copies)
        of_clips = pc.index_in(clips["video"], value_set=videos["video"])
        of_copies = pc.index_in(rows.copies["video"], value_set=videos["video"])
        # The row's video, by its number in `videos`.
        self.video = np.concatenate([_ints(of_clips), alone, _ints(of_copies)]).astype(np.int64)
        if (self.video < 0).any():
            raise ValueError("a clip or copy names a video that is not of its unit")
        self.of_clip = np.arange(self.count) < self.clips
        self.of_copy = np.arange(self.count) >= self.count - len(rows.copies)

    def __getitem__(self, name: str) -> np.ndarray:
        if name == "decoded":
            claimed = self._of_videos("claimed")
            return np.divide(self._of_videos("duration"), claimed, out=np.full(self.count, np.nan), where=claimed > 0)
        if name in VIDEO_COLUMNS:
            return self._of_videos(name)
        if name in ("aspect", "short_side"):
            width, height = self._of_clips("width"), self._of_clips("height")
            return np.minimum(width, height) if name == "short_side" else width / height
        if name in self.rows.clips.column_names:
            return self._of_clips(name)
        step = {"overlay": "text", "nsfw": "safety", "faces": "safety"}.get(name, name)
        return self._pad(_floats(self.extra(step, name)))

    def extra(self, step: str, name: str) -> pa.ChunkedArray:
        """Returns a column of an optional step, one value a clip: null where it has none."""
        table = self.rows.extras.get(step)
        if table is None:
            return pa.chunked_array([pa.nulls(self.clips)])
        return table[name].take(pc.index_in(self.rows.clips["clip"], value_set=table["clip"]))

    def clip_duration(self) -> np.ndarray:
        """Returns the seconds of each clip, float64 [rows]."""
        return self._of_clips("duration")

    def _of_videos(self, name: str) -> np.ndarray:
        values = _floats(self.rows.videos[name])[self.video]
        return np.where(self.of_copy, np.nan, values)

    def _of_clips(self, name: str) -> np.ndarray:
        return self._pad(_floats(self.rows.clips[name]))

    def _pad(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, np.full(self.count - self.clips, np.nan)])


class _Verdict:
    """The reasons against the rows of one unit, of which each is added for many rows at a time.

    Attributes:
        rejected: bool [rows], whether a row has any reason.
    """

    def __init__(self, rows: UnitRows, config: PrepareConfig, screening: Screening) -> None:
        self.scores = Scores(rows)
        self.rejected = np.zeros(self.scores.count, bool)
        self._rows, self._config = rows, config
        self._found: list[tuple[np.ndarray, tuple[str, str, str], np.ndarray, Bound]] = []
        self._screen(screening)
        self._bound()
        self._ask_extras(self.rejected.copy())

    @cached_property
    def clips(self) -> pa.ChunkedArray:
        """Returns the ids of clips; null for rows that are none."""
        return pa.chunked_array(
            [*self._rows.clips["clip"].chunks, pa.nulls(self.scores.count - self.scores.clips, pa.string())]
        )

    def tags(self) -> list[list[str]]:
        """Returns the tags of each row, none where there are none."""
        if "tags" not in self._rows.extras:
            return [[]] * self.scores.count
        tags = [found or [] for found in self.scores.extra("tags", "tags").to_pylist()]
        return tags + [[]] * (self.scores.count - self.scores.clips)

    def add_duplicates(self, duplicates: pa.Table, ids: np.ndarray) -> None:
        """Adds the reason that a clip gives way to one like it. ids: S32 [n], those of the duplicates, in order."""
        if not len(ids):
            return
        clips = ids_of(self._rows.clips["clip"])
        place = np.minimum(np.searchsorted(ids, clips), len(ids) - 1)
        found = np.flatnonzero(ids[place] == clips)
        chosen = duplicates.take(pa.array(place[found]))
        kinds = chosen["kind"].to_pylist()
        dedup = self._config.dedup
        bounds = {
            "picture": Bound(low=dedup.mean),
            "mirror": Bound(low=dedup.mean),
            "source": Bound(low=dedup.per_source_mean),
            "caption": Bound(low=dedup.caption_mean),
            "embedding": Bound(high=dedup.cosine),
        }
        for kind, bound in bounds.items():
            of = np.array([name == kind for name in kinds], bool)
            self._add(found[of], "dedup", kind, f"duplicate_{kind}", _floats(chosen["distance"])[of], bound)

    def add_cut(self, ranks: Ranks, least: float, equal: frozenset[str]) -> None:
        """Adds the reason that a clip is accepted but not among the best, nor one of `equal` at their lower end."""
        composite = np.nan_to_num(ranks.composite(self.scores), nan=-1.0)
        below = ~self.rejected & (composite <= least)
        names = self.clips.to_pylist()
        rows = [row for row in np.flatnonzero(below).tolist() if composite[row] < least or names[row] not in equal]
        rows = np.array(rows, np.int64)
        self._add(rows, "select", "composite", "not_top", composite[rows], Bound(low=least))

    def table(
        self, ranks: Ranks, groups: list[str | None] | None = None, weights: list[float | None] | None = None
    ) -> pa.Table:
        """Returns the rows as rows.SELECT."""
        scores, screen = self.scores, self._sources
        composite = ranks.composite(scores)
        columns = {
            "clip": self.clips,
            "video": self._rows.videos["video"].take(pa.array(scores.video)),
            "path": self._paths,
            "licence": [source and source.licence for source in screen],
            "origin": [source and source.origin for source in screen],
            "accepted": ~self.rejected,
            "reasons": self._reasons(),
            "composite": pa.array(composite, mask=np.isnan(composite)),
            "group": groups or pa.nulls(scores.count, pa.string()),
            "weight": weights or pa.nulls(scores.count, pa.float64()),
        }
        return pa.table(columns, schema=SELECT)

    def _screen(self, screening: Screening) -> None:
        """Adds what people say of the files."""
        scores, videos = self.scores, self._rows.videos
        of_videos = np.array(videos["path"].to_pylist(), object)
        self._paths = np.concatenate(
            [of_videos[scores.video[~scores.of_copy]], np.array(self._rows.copies["path"].to_pylist(), object)]
        )
        sources = {path: screening.sources.of(path) for path in dict.fromkeys(self._paths.tolist())}
        self._sources = [sources[path] for path in self._paths.tolist()]
        self._add_where(scores.of_copy, "scan", "video", "duplicate_file")
        files = screening.blocklist.files
        blocked = np.array([video in files for video in videos["video"].to_pylist()], bool)
        self._add_where(blocked[scores.video], "screen", "video", "blocked")
        if len(hashes := screening.blocklist.hashes) and scores.clips:
            mean = self._config.dedup.mean
            least = np.full(scores.count, np.nan)
            for column in ("phash", "phash_mirror"):
                near = least_distance(hash_matrix(self._rows.clips[column]), hashes)
                least[: scores.clips] = np.fmin(least[: scores.clips], near)
            self._add_where(least <= mean, "screen", "phash", "blocked", least, Bound(low=mean))
        refused = np.array([source is not None and source.allowed is False for source in self._sources], bool)
        self._add_where(refused, "screen", "allowed", "not_allowed")
        if self._config.screen.require_licence:
            silent = np.array([source is None or source.allowed is None for source in self._sources], bool)
            self._add_where(silent, "screen", "licence", "no_licence")

    def _bound(self) -> None:
        """Adds what the cheap steps say."""
        scores, videos = self.scores, self._rows.videos
        errors = _names(videos["error"])[scores.video]
        self._add_names(np.where(scores.of_copy, None, errors), "probe", "error")
        hdr = _mask(videos["hdr"])[scores.video] & ~scores.of_copy
        if not self._config.select.hdr:
            self._add_where(hdr, "probe", "hdr", "hdr", np.ones(scores.count), Bound(high=0.0))
        reasons = np.concatenate([_names(self._rows.clips["reason"]), np.full(scores.count - scores.clips, None)])
        shortest = Bound(low=self._config.split.min_seconds)
        self._add_names(reasons, "split", "seconds", scores.clip_duration(), shortest)
        self._whole = scores.of_clip & (errors == None) & (reasons == None)  # noqa: E711  elementwise
        for limit in limits(self._config, ()):
            self._limit(limit, self._whole if limit.step in ("split", "score") else np.zeros(scores.count, bool))
        if self._rows.fits is not None:
            self._fit(self._rows.fits.filter(pc.is_null(self._rows.fits["bucket"])))

    def _fit(self, misfits: pa.Table) -> None:
        """Adds why no bucket takes a clip, unless all are too large for it, which its short side has told already."""
        scores = self.scores
        bounds = [Bound(low=row["low"], high=row["high"]) for row in misfits.select(["low", "high"]).to_pylist()]
        place = _ints(pc.index_in(misfits["clip"], value_set=self._rows.clips["clip"]))
        small = scores["short_side"] < min(min(one.height, one.width) for one in self._config.encode.buckets)
        names, values = misfits["name"].to_pylist(), _floats(misfits["value"])
        for i, (row, name, bound) in enumerate(zip(place, names, bounds, strict=True)):
            if row >= 0 and not (name == "too_small" and small[row]):
                self._add(np.array([row]), "fit", "bucket", name, values[i : i + 1], bound)

    def _ask_extras(self, closed: np.ndarray) -> None:
        """Adds what the optional steps say. closed: bool [rows], clips that they need not have looked at."""
        scores, ran = self.scores, self._rows.extras
        asked = self._whole & ~closed
        for limit in limits(self._config, ran):
            if limit.step in EXTRAS:
                self._limit(limit, asked)
        if "vlm" in ran:
            self._ask_vlm(asked)
        if "caption" in ran and self._config.select.captions:
            rest = np.full(scores.count - scores.clips, None)
            text, reasons, errors = (
                np.concatenate([_names(scores.extra("caption", name)), rest]) for name in ("caption", "reason", "error")
            )
            missing = asked & (reasons == None) & ((text == None) | (text == ""))  # noqa: E711  elementwise
            reasons[missing & (errors != None)] = "caption_error"  # noqa: E711  elementwise
            reasons[missing & (errors == None)] = "caption_missing"  # noqa: E711  elementwise
            self._add_names(reasons, "caption", "caption")

    def _ask_vlm(self, asked: np.ndarray) -> None:
        scores, bound = self.scores, Bound(high=self._config.vlm.threshold)
        answers = scores.extra("vlm", "answers").combine_chunks()
        rest = np.zeros(scores.count - scores.clips, bool)
        self._add_where(asked & ~np.concatenate([_mask(answers.is_valid()), rest]), "vlm", "answers", "unmeasured")
        row, flat = _ints(pc.list_parent_indices(answers)), answers.flatten()
        questions, yes = _names(flat.field("question")), _floats(flat.field("yes"))
        wanted = self._config.select.vlm
        for question in sorted({*questions} if wanted is None else {*questions} & {*wanted}):
            told = (questions == question) & (yes >= bound.high)
            self._add(row[told], "vlm", question, f"vlm_{question}", yes[told], bound)

    def _limit(self, limit: Limit, required: np.ndarray) -> None:
        """Adds where a bound is broken, and where what is required has no score though there is a bound."""
        values, bound = self.scores[limit.score], limit.bound
        if bound.low is not None:
            self._add_where(values < bound.low, limit.step, limit.score, limit.below, values, bound)
        if bound.high is not None:
            self._add_where(values > bound.high, limit.step, limit.score, limit.above, values, bound)
        if bound.low is not None or bound.high is not None:
            self._add_where(required & np.isnan(values), limit.step, limit.score, "unmeasured", bound=bound)

    def _add_where(
        self,
        mask: np.ndarray,
        step: str,
        score: str,
        name: str,
        values: np.ndarray | None = None,
        bound: Bound = _NO_BOUND,
    ) -> None:
        rows = np.flatnonzero(mask)
        self._add(rows, step, score, name, None if values is None else values[rows], bound)

    def _add_names(
        self, names: np.ndarray, step: str, score: str, values: np.ndarray | None = None, bound: Bound = _NO_BOUND
    ) -> None:
        for name in sorted({name for name in names.tolist() if name is not None}):
            self._add_where(names == name, step, score, name, values, bound)

    def _add(self, rows: np.ndarray, step: str, score: str, name: str, values: np.ndarray | None, bound: Bound) -> None:
        """Adds one reason to some rows. values: float64, one for each of the rows, or None."""
        if len(rows):
            self.rejected[rows] = True
            values = np.full(len(rows), np.nan) if values is None else values
            self._found.append((rows, (step, score, name), values, bound))

    def _reasons(self) -> pa.Array:
        """Returns the reasons, list<rows.REASON> [rows], in the order in which they were added."""
        lengths = [len(rows) for rows, *_ in self._found]
        rows = np.concatenate([np.empty(0, np.int64), *(rows for rows, *_ in self._found)])
        order = np.argsort(rows, kind="stable")
        kind = pa.array(np.repeat(np.arange(len(lengths)), lengths)[order])
        values = np.concatenate([np.empty(0), *(values for _, _, values, _ in self._found)])[order]
        texts = [pa.array([names[i] for _, names, *_ in self._found], pa.string()).take(kind) for i in range(3)]
        ends = [
            pa.array([getattr(bound, end) for *_, bound in self._found], pa.float64()).take(kind)
            for end in ("low", "high")
        ]
        structs = pa.StructArray.from_arrays(
            [*texts, pa.array(values, mask=np.isnan(values)), *ends], fields=list(REASON)
        )
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=self.scores.count))])
        return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), structs)


def _composite_scores(scores: Scores) -> dict[str, np.ndarray]:
    """Returns what the composite score ranks, higher is better, float64 [rows]: the published score has no definition.

    Motion is best at 5 pixels in 0.25 s at 360 lines, the middle of its bounds on a logarithmic scale; it enters as
    −|log(motion / 5)|.
    """
    return {
        "aesthetic": scores["aesthetic"],
        "motion": -np.abs(np.log(np.maximum(scores["motion"], 1e-3) / 5)),
        "sharp_med": scores["sharp_med"],
    }


def _codes(values: np.ndarray) -> np.ndarray:
    """Returns the number of the bin of each value, int64 in [0, 2¹⁸), rising with it: float32's leading bits."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    ordered = np.where(bits >> 31, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> (32 - _BITS)).astype(np.int64)


def _groups(tags: Iterable[str], of: str) -> list[str]:
    """Returns the values of a class of tags, in order, each once."""
    return list(dict.fromkeys(tag[len(of) + 1 :] for tag in tags if tag.startswith(f"{of}:") and tag != f"{of}:"))


def _floats(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns a column of numbers as float64 [n]; null is NaN."""
    return np.asarray(column.cast(pa.float64()).fill_null(math.nan), np.float64)


def _ints(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns a column of whole numbers as int64 [n]; null is −1."""
    return np.asarray(column.cast(pa.int64()).fill_null(-1), np.int64)


def _mask(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns a column of truths as bool [n]; null is False."""
    return np.asarray(column.fill_null(False), bool)


def _names(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """Returns a column of strings as objects [n]; null is None."""
    return np.array([*column.to_pylist(), None], object)[:-1]
