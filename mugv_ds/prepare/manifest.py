"""The set that the trainer reads: train.csv, val.csv, where each sample comes from, and what every file must be.

Rows are ordered by bucket, unit and clip, and written unit by unit, so memory does not grow with them. Held out are
whole videos, together with all that have clips alike.
"""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import BucketSection, PrepareConfig
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME, read_text_encoder
from mugv_ds.data.shards import Entry, read_header, read_tensor, write_shard
from mugv_ds.data.storage import open_file
from mugv_ds.files.atomic import write_atomically
from mugv_ds.prepare.embed import NULL_TEXT_PATH
from mugv_ds.prepare.encode import Read, facts_of, units_in
from mugv_ds.prepare.rows import LABEL, PROVENANCE, SIDES
from mugv_ds.prepare.units import Fragments, read_table

MANIFEST_NAME, PROVENANCE_NAME, WITHDRAWN_NAME = "MANIFEST.json", "provenance.parquet", "withdrawn.json"
SETS = ("train", "val")
COLUMNS = (
    *("sample_id", "source", "latent_path", "text_feat_path", "fps", "height", "width", "num_frames", "caption"),
    *("kind", "weight", "group", "label", "pair_id", "rank"),
)
SCORES = {
    "clips": (
        *("sharp_min", "sharp_med", "sharp_max", "motion", "motion_min", "motion_max", "repeated", "shake"),
        *("luma", "dark", "bright", "area", "phash"),
    ),
    "text": ("overlay",),
    "aesthetic": ("aesthetic",),
    "safety": ("nsfw", "faces"),
}  # step → scores that provenance.parquet keeps

_FORMAT = 1
_PREFERENCES = tuple(f"{kind}{suffix}.csv" for kind in ("labels", "pairs") for suffix in ("", "_val"))
_OF_PARTS = {
    "select": ("video", "path", "licence", "origin", "accepted", "composite", "weight", "group"),
    "clips": ("first_pts", "last_pts", *(f"crop_{side}" for side in SIDES)),
    "caption": ("caption", "source"),
}
_MAX_JSON_BYTES = 1 << 30
_ROWS = 10_000  # of provenance that are in memory
_CACHED = 64  # fragments

Key = Callable[[str, int], str | None]
Row = dict[str, Any]


@dataclass(frozen=True)
class Parts:
    """What a set is made of.

    Attributes:
        videos: units of videos that there are. encode_plan, embed_plan: of `ENCODE_PLAN` and `EMBED_PLAN`.
        read: of "select", "clips", "caption", "fit" and the steps of `scored` by unit of videos; of "encode" and
            "embed" by their own units.
        key: of the fragment of a unit of "encode" or "embed"; None where it was not done, as no clip of it is accepted.
        scored: which of the optional steps of `SCORES` ran.
        labels: of `LABEL`. together: pairs of clips whose videos must not be on both sides of the split.
    """

    videos: int
    encode_plan: pa.Table
    embed_plan: pa.Table
    read: Read
    key: Key
    scored: Sequence[str] = ()
    labels: pa.Table = field(default_factory=LABEL.empty_table)
    together: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Withdrawn:
    """What may no longer be used: ids of videos, and licences. It stays with the set, and holds for later ones too."""

    videos: frozenset[str] = frozenset()
    licences: frozenset[str] = frozenset()

    @classmethod
    def read(cls, out: Path) -> "Withdrawn":
        """Reads what was withdrawn from a set; nothing where its folder does not say.

        Raises:
            InputError: the file is damaged.
        """
        path = out / WITHDRAWN_NAME
        if not path.exists():
            return cls()
        try:
            content = json.loads(read_text_file(path, _MAX_JSON_BYTES))
            return cls(*(frozenset(map(str, content[name])) for name in ("videos", "licences")))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error)[:200]
            raise InputError(f"{path}: damaged ({reason}); restore it: it says which videos may not be used") from None

    def write(self, out: Path) -> None:
        """Writes it into the folder of a set."""
        _write_json(out / WITHDRAWN_NAME, {"videos": sorted(self.videos), "licences": sorted(self.licences)})

    def holds(self, row: Row) -> bool:
        """Returns whether a row with `video` and `licence` may no longer be used."""
        return row["video"] in self.videos or row["licence"] in self.licences


def write_manifest(out: Path, parts: Parts, config: PrepareConfig, about: Mapping[str, Any]) -> dict[str, Any]:
    """Writes train.csv, val.csv, provenance.parquet and, last, MANIFEST.json, which is returned.

    Where there are labels, `write_preferences` adds the CSVs for KTO and DPO.

    Args:
        about: what MANIFEST.json says beside, of JSON types: `codec`, the fingerprint of its file, and versions.

    Raises:
        InputError: no sample is left. OSError: the file system failed.
    """
    samples = _Samples(parts, config, Withdrawn.read(out))
    is_held_out = _split(parts, config.validation.share)
    counts: Counter[str] = Counter()
    of_buckets: dict[str, Counter[str]] = {}
    with ExitStack() as stack:
        files = {name: _CsvFile(stack, out / f"{name}.csv") for name in SETS}
        provenance = _ProvenanceFile(stack, out / PROVENANCE_NAME)
        for row in samples.rows(counts):
            name = "val" if is_held_out(row["video"]) else "train"
            files[name].write(row)
            provenance.write(row | {"set": name})
            counts[name] += 1
            of_buckets.setdefault(row["bucket"], Counter())[name] += 1
        provenance.finish()
        if not counts["train"] + counts["val"]:
            left = ", ".join(f"{name}: {count}" for name, count in sorted(counts.items())) or "none was accepted"
            raise InputError(f"{out}: no clip is left for the set ({left}); `what-if` shows which bound to lift")
    write_preferences(out)
    buckets, encoder = {bucket.name: bucket for bucket in config.encode.buckets}, read_text_encoder(out)
    manifest = {
        "format": _FORMAT,
        **about,
        "latent_dtype": config.encode.dtype,
        "text_encoder": None if encoder is None else encoder.model_dump(mode="json"),
        "text_dtype": config.embed.dtype,
        "suffix": config.embed.suffix,
        "counts": {name: counts.pop(name, 0) for name in SETS} | {"left_out": dict(sorted(counts.items()))},
        "buckets": {
            name: buckets[name].model_dump(mode="json") | {side: found[side] for side in SETS}
            for name, found in sorted(of_buckets.items())
        },
        "shards": samples.shards(),
        "files": _files_of(out),
    }
    _write_json(out / MANIFEST_NAME, manifest)
    return manifest


def read_manifest(out: Path) -> dict[str, Any]:
    """Returns what a set's MANIFEST.json says.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = out / MANIFEST_NAME
    try:
        content = json.loads(read_text_file(path, _MAX_JSON_BYTES))
        if content["format"] != _FORMAT:
            raise ValueError(f"of format {content['format']}")
        shards, files = content["shards"], content["files"]
        whole = all(
            type(one["bytes"]) is int and type(one["sha256"]) is str for one in [*shards.values(), *files.values()]
        )
        if not whole or type(content["codec"]) is not str or type(content["suffix"]) is not str:
            raise ValueError("a value has another type")
        return content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        said = str(error) if isinstance(error, InputError) else f"{path}: damaged ({str(error)[:200]})"
        raise InputError(f"{said}; run the step manifest again") from None


def read_provenance(out: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a set's provenance.parquet, with some of the columns of `PROVENANCE` or all.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = out / PROVENANCE_NAME
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(PROVENANCE):
                raise ValueError("of another version")
            for batch in file.iter_batches(_ROWS, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: damaged ({reason}); run the step manifest again") from None


def forget_overwritten(out: Path, step: str, keys: Mapping[int, str]) -> bool:
    """Removes MANIFEST.json and the CSVs before shards that they name become others; returns whether it did.

    Else a run that ends in between would leave CSVs that lead a training to latents of two codecs.

    Args:
        step: encode or embed. keys: unit → key of what is to be made.
    """
    if not any((out / name).exists() for name in (MANIFEST_NAME, *(f"{name}.csv" for name in SETS))):
        return False
    try:
        shards = read_manifest(out)["shards"]
        of_step = [facts for name, facts in shards.items() if step_of(name) == step]
        if all(keys.get(facts["unit"], facts["key"]) == facts["key"] for facts in of_step):
            return False
    except InputError:  # it was being removed, or is damaged: nothing tells what the CSVs name
        pass
    for name in (MANIFEST_NAME, *(f"{name}.csv" for name in SETS), *_PREFERENCES):
        (out / name).unlink(missing_ok=True)
    return True


def step_of(shard: str) -> str:
    """Returns the step that makes a shard, by its path."""
    return "encode" if shard.startswith("latents/") else "embed"


def write_preferences(out: Path) -> None:
    """Writes labels.csv, labels_val.csv, pairs.csv and pairs_val.csv of the rows of train.csv and val.csv, where there
    are any: the trainer takes sets whose rows are all labelled, or all of whole pairs of one shape.

    Raises:
        OSError: the file system failed.
    """
    for name, suffix in (("train", ""), ("val", "_val")):
        labelled, pairs = [], {}
        for row in read_rows(out / f"{name}.csv"):
            if row["label"]:
                labelled.append(row)
            if row["pair_id"]:
                shape = (row["num_frames"], row["height"], row["width"])
                pairs.setdefault((row["pair_id"], shape), []).append(row)
        whole = [row for _, two in sorted(pairs.items()) if len(two) == 2 for row in two]
        for kind, rows in (("labels", labelled), ("pairs", whole)):
            path = out / f"{kind}{suffix}.csv"
            path.unlink(missing_ok=True)
            if rows:
                with ExitStack() as stack:
                    file = _CsvFile(stack, path)
                    for row in rows:
                        file.write(row)


def read_rows(path: Path) -> Iterator[dict[str, str]]:
    """Yields the rows of a CSV that `write_manifest` wrote, as text."""
    with path.open(newline="", encoding="utf-8") as file:
        yield from csv.DictReader(file)


def withdraw(
    out: Path,
    videos: Iterable[str] = (),
    licences: Iterable[str] = (),
    *,
    purge: bool = False,
    work: Path | None = None,
) -> tuple[int, list[str]]:
    """Takes the samples of some videos or licences out of a set, also of those that will be made in its folder later.

    Args:
        out: folder of the set. videos: ids. licences: as in the table of sources.
        purge: also rewrite the shards that hold them. work: the working folder, whose fragments name the shards' bytes,
            and clips in the shards that were rejected after they were encoded.

    Returns:
        How many samples were taken out, and the shards that held them.

    Raises:
        InputError: the set has no manifest, or what it has is damaged. SampleError: a shard is damaged.
        OSError: the file system failed.
    """
    manifest, before = read_manifest(out), Withdrawn.read(out)
    asked = Withdrawn(frozenset(videos), frozenset(licences))
    gone: dict[str, set[str]] = {}  # shard → clips
    samples: set[str] = set()
    its_videos = set(asked.videos)  # also those of the licences, so that encoding needs only these
    for row in read_provenance(out):
        if asked.holds(row):
            samples.add(row["sample"])
            its_videos.add(row["video"])
            manifest["counts"][row["set"]] -= 1
            manifest["buckets"][row["bucket"]][row["set"]] -= 1
            for shard in (row["latent_shard"], row["text_shard"]):
                gone.setdefault(shard, set()).add(row["clip"])
    # In this order the same command goes on wherever it was ended: what is to go is known until nothing of it is left.
    Withdrawn(before.videos | its_videos, before.licences | asked.licences).write(out)
    with ExitStack() as stack:
        for name in SETS:
            file = _CsvFile(stack, out / f"{name}.csv")
            for row in read_rows(out / f"{name}.csv"):
                if row["sample_id"] not in samples:
                    file.write(row)
    write_preferences(out)
    if purge:
        if work is not None:
            for shard, clips in _also_stored(work, manifest["shards"], its_videos):
                gone.setdefault(shard, set()).update(clips)
        for shard, clips in sorted(gone.items()):
            facts = _purge(out, shard, clips)
            manifest["shards"][shard] |= facts
            if work is not None:
                _purge_fragment(work, shard, manifest["shards"][shard], clips)
        for shard in [name for name, facts in manifest["shards"].items() if not facts["bytes"]]:
            del manifest["shards"][shard]
    with ExitStack() as stack:
        provenance = _ProvenanceFile(stack, out / PROVENANCE_NAME)
        for row in read_provenance(out):
            if not asked.holds(row):
                provenance.write(row)
        provenance.finish()
    manifest["buckets"] = {
        name: facts for name, facts in manifest["buckets"].items() if any(facts[side] for side in SETS)
    }
    withdrawn = manifest["counts"]["left_out"]
    withdrawn["withdrawn"] = withdrawn.get("withdrawn", 0) + len(samples)
    _write_json(out / MANIFEST_NAME, manifest | {"files": _files_of(out)})
    return len(samples), sorted(gone)


def _also_stored(work: Path, shards: Mapping[str, Row], videos: set[str]) -> Iterator[tuple[str, set[str]]]:
    """Yields the shards that hold clips of some videos, with these, whether they are in the set or not."""
    wanted = pa.array(sorted(videos), pa.string())
    tables = (read_table(path, ["clip", "video"]) for path in sorted((work / "clips").glob("*.parquet")))
    theirs = {clip for table in tables for clip in table.filter(pc.is_in(table["video"], wanted))["clip"].to_pylist()}
    for shard, facts in shards.items():
        path = Fragments(work / step_of(shard)).path(facts["unit"], facts["key"])
        if path.exists():
            table = read_table(path, ["clip", "shard"])
            if held := theirs.intersection(table.filter(pc.is_valid(table["shard"]))["clip"].to_pylist()):
                yield shard, held


def _purge(out: Path, shard: str, clips: set[str]) -> Row:
    """Rewrites a shard without some clips; returns its bytes and SHA-256, both empty where nothing is left."""
    if not (out / shard).exists():  # it was purged, and then the command was ended
        return {"bytes": 0, "sha256": ""}
    with open_file(out / shard) as blob:
        header: dict[str, Entry] = read_header(blob)
        kept = {key: read_tensor(blob, key, entry) for key, entry in header.items() if key not in clips}
    if kept:
        write_shard(out / shard, kept)
        return facts_of(out / shard) | {"tensors": len(kept)}
    (out / shard).unlink()
    return {"bytes": 0, "sha256": ""}


def _purge_fragment(work: Path, shard: str, facts: Row, clips: set[str]) -> None:
    """Has the fragment of a purged shard say so, as the shard would otherwise be made anew, or look damaged."""
    step = step_of(shard)
    fragments = Fragments(work / step)
    path = fragments.path(facts["unit"], facts["key"])
    if not path.exists():
        return
    table = read_table(path)
    rows = []
    for row in table.to_pylist():
        if row["clip"] in clips:
            row |= {"error": "withdrawn", "shard": None, "bytes": None, "sha256": None}
        elif row["shard"] is not None:
            row |= {"bytes": facts["bytes"], "sha256": facts["sha256"]}
        rows.append(row)
    fragments.write(facts["unit"], facts["key"], pa.Table.from_pylist(rows, table.schema))


class _Samples:
    """The samples of a set, unit by unit, joined from the fragments.

    Args:
        parts, config: of the set. withdrawn: what may not be in it.
    """

    def __init__(self, parts: Parts, config: PrepareConfig, withdrawn: Withdrawn) -> None:
        self._parts, self._withdrawn = parts, withdrawn
        self._buckets = {bucket.name: bucket for bucket in config.encode.buckets}
        self._one_each = config.encode.largest_only
        self._read = lru_cache(_CACHED)(parts.read)
        labels = parts.labels.to_pylist()
        self._labels = {label["clip"]: label for label in labels}
        texts: dict[int, set[int]] = {}
        for unit, rows in units_in(parts.embed_plan):
            for part in pc.unique(rows["part"]).to_pylist():
                texts.setdefault(part, set()).add(unit)
        self._texts = {part: sorted(units) for part, units in texts.items()}
        units = ((rows["bucket"][0].as_py(), unit, rows) for unit, rows in units_in(parts.encode_plan))
        self._units = sorted(
            (one for one in units if one[0] in self._buckets and parts.key("encode", one[1]) is not None),
            key=lambda one: one[:2],
        )

    def rows(self, counts: Counter[str]) -> Iterator[Row]:
        """Yields the samples, with the columns of the CSVs and of `PROVENANCE`; counts those that are left out."""
        for bucket, unit, planned in self._units:
            yield from self._rows_of(self._buckets[bucket], unit, planned, counts)

    def shards(self) -> dict[str, Row]:
        """Returns all shards by path: bytes, SHA-256, unit and key."""
        found = {}
        embedded = (unit for unit, _ in units_in(self._parts.embed_plan))
        for step, units in (("encode", (unit for _, unit, _ in self._units)), ("embed", embedded)):
            for unit in units:
                key = self._parts.key(step, unit)
                if key is None:
                    continue
                table = self._read(step, unit, ("clip", "error", "shard", "bytes", "sha256"))
                table = table.filter(pc.is_valid(table["shard"]))
                if table.num_rows:
                    first = table.slice(0, 1).to_pylist()[0]
                    facts = {name: first[name] for name in ("bytes", "sha256")}
                    found[first["shard"]] = facts | {"unit": unit, "key": key, "tensors": table.num_rows}
        return dict(sorted(found.items()))

    def _accepted(self, planned: pa.Table) -> pa.Table:
        """Returns what `_OF_PARTS` says of selection, of the accepted clips among those of a unit."""
        table = self._of_parts("select", _OF_PARTS["select"], planned)
        return table.filter(pc.fill_null(table["accepted"], False))

    def _rows_of(self, bucket: BucketSection, unit: int, planned: pa.Table, counts: Counter[str]) -> Iterator[Row]:
        accepted = self._accepted(planned)
        clips = accepted["clip"]
        columns = {name: accepted[name].to_pylist() for name in ("clip", *_OF_PARTS["select"])}
        for step in ("clips", "caption", *self._parts.scored):
            names = (*_OF_PARTS.get(step, ()), *SCORES.get(step, ()))
            table = self._of_parts(step, names, planned, clips)
            columns |= {name: table[name].to_pylist() for name in names}
        fits = self._of_parts("fit", ("area", "time_error", "repeated", "pts"), planned, clips, bucket.name)
        columns |= {f"fit_{name}": fits[name].to_pylist() for name in ("area", "time_error", "repeated", "pts")}
        encoded = _joined([self._read("encode", unit, ("clip", "error", "shard", "luma"))], clips)
        columns |= {f"latent_{name}": encoded[name].to_pylist() for name in ("error", "shard", "luma")}
        units = sorted({one for part in pc.unique(planned["part"]).to_pylist() for one in self._texts.get(part, ())})
        names = ("clip", "error", "shard", "tokens", "cut")
        done = [one for one in units if self._parts.key("embed", one) is not None]
        texts = _joined([self._read("embed", one, names) for one in done], clips) if done else None
        columns |= {f"text_{name}": [None] * len(clips) if texts is None else texts[name].to_pylist() for name in names}
        for values in zip(*columns.values(), strict=True):
            row = dict(zip(columns, values, strict=True))
            why = self._left_out(row)
            if why is not None:
                counts[why] += 1
                continue
            yield self._sample(row, bucket)

    def _left_out(self, row: Row) -> str | None:
        """Returns why an accepted clip is not in the set; None if it is."""
        if self._withdrawn.holds(row):
            return "withdrawn"
        if row["fit_pts"] is None:
            return "of another bucket now"
        for side in ("latent", "text"):
            if row[f"{side}_shard"] is None:
                return "withdrawn" if row[f"{side}_error"] == "withdrawn" else f"no {side}"
        return None

    def _sample(self, row: Row, bucket: BucketSection) -> Row:
        clip = row["clip"]
        label = self._labels.get(clip, {})
        scores = {name: row.get(name) for names in SCORES.values() for name in names}
        return scores | {
            "sample_id": (sample := clip if self._one_each else f"{clip}-{bucket.name}"),
            "sample": sample,
            "source": "generated",
            "latent_path": f"{row['latent_shard']}#{clip}",
            "text_feat_path": f"{row['text_shard']}#{clip}",
            "fps": f"{bucket.fps:.10g}",
            "height": bucket.height,
            "width": bucket.width,
            "num_frames": bucket.frames,
            "caption": row["caption"].replace("\0", ""),
            "kind": "image" if bucket.frames == 1 else "video",
            "weight": None if row["weight"] is None else f"{row['weight']:.6g}",
            "group": row["group"],
            **{name: label.get(name) for name in ("label", "pair_id", "rank")},
            "clip": clip,
            "bucket": bucket.name,
            **{name: row[name] for name in ("video", "path", "licence", "origin", "composite", *_OF_PARTS["clips"])},
            "start_pts": row["fit_pts"][0],
            "left": row["fit_area"],
            "time_error": row["fit_time_error"],
            "repeated_frames": row["fit_repeated"],
            "pixel_luma": row["latent_luma"],
            "tokens": row["text_tokens"],
            "cut_tokens": row["text_cut"],
            "caption_source": row["source"],
            **{f"{side}_shard": row[f"{side}_shard"] for side in ("latent", "text")},
        }

    def _of_parts(
        self,
        step: str,
        columns: Sequence[str],
        planned: pa.Table,
        clips: pa.ChunkedArray | None = None,
        bucket: str | None = None,
    ) -> pa.Table:
        """Returns rows of a step for the clips of a unit, or for some of them, in their order."""
        names = ("clip", *(("bucket",) if bucket else ()), *columns)
        tables = [self._read(step, part, names) for part in pc.unique(planned["part"]).to_pylist()]
        if bucket is not None:
            tables = [table.filter(pc.equal(table["bucket"], bucket)) for table in tables]
        return _joined(tables, planned["clip"] if clips is None else clips)


def _joined(tables: Sequence[pa.Table], clips: pa.ChunkedArray) -> pa.Table:
    """Returns the rows of some clips, in their order; all null where a clip has none."""
    table = pa.concat_tables(tables).combine_chunks()
    return table.take(pc.index_in(clips, value_set=table["clip"]).combine_chunks())


def _split(parts: Parts, share: float) -> Callable[[str], bool]:
    """Returns what tells whether a video is held out: by the hash of the first video that it belongs together with.

    First is the one that was found earliest, so a video stays on its side when others come, unless they join two that
    were apart. Of a set that would have one side alone, one video is moved.
    """
    labelled: dict[str, str] = {}  # pair → its first clip
    pairs = list(parts.together)
    for label in parts.labels.filter(pc.is_valid(parts.labels["pair_id"])).to_pylist():
        pairs.append((labelled.setdefault(label["pair_id"], label["clip"]), label["clip"]))
    linked = pa.array({clip for pair in pairs for clip in pair}, pa.string())
    video_of: dict[str, str] = {}
    found: dict[str, int] = {}  # video → unit of videos; new ones make new units
    for part in range(parts.videos):
        table = parts.read("select", part, ("clip", "video"))
        table = table.filter(pc.is_in(table["clip"], linked))
        video_of |= zip(table["clip"].to_pylist(), table["video"].to_pylist(), strict=True)
        found |= dict.fromkeys(table["video"].to_pylist(), part)
    first: dict[str, str] = {}

    def root(video: str) -> str:
        while (earlier := first.get(video, video)) != video:
            first[video] = first.get(earlier, earlier)  # half the way for who comes next
            video = first[video]
        return video

    for a, b in pairs:
        if a in video_of and b in video_of:
            early, late = sorted((root(video_of[a]), root(video_of[b])), key=lambda video: (found[video], video))
            first[late] = early

    def place(video: str) -> float:
        return int.from_bytes(hashlib.blake2b(f"val {root(video)}".encode(), digest_size=8).digest()) / 2**64

    lowest, highest = 1.0, 0.0
    for part in range(parts.videos):
        table = parts.read("select", part, ("video", "accepted"))
        for video in pc.unique(table.filter(table["accepted"])["video"]).to_pylist():
            lowest, highest = min(lowest, place(video)), max(highest, place(video))
    if share == 0 or lowest >= highest:
        return lambda video: False
    bound = min(max(share, math.nextafter(lowest, 1)), highest)
    return lambda video: place(video) < bound


class _CsvFile:
    """A CSV of the set that is being written, and takes its name when the stack ends."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        binary = stack.enter_context(write_atomically(path))
        text = io.TextIOWrapper(binary, encoding="utf-8", newline="", write_through=True)
        stack.callback(text.detach)
        self._writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
        self._writer.writeheader()

    def write(self, row: Mapping[str, Any]) -> None:
        """Writes a row; other columns are left out."""
        self._writer.writerow(row)


class _ProvenanceFile:
    """provenance.parquet as it is being written, a group of rows at a time; see `_CsvFile`."""

    def __init__(self, stack: ExitStack, path: Path) -> None:
        stream = stack.enter_context(write_atomically(path))
        self._writer = pq.ParquetWriter(stream, PROVENANCE, compression="zstd", store_schema=False)
        stack.callback(self._writer.close)  # before the stream, also where it is not finished
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        """Writes a row; other columns are left out."""
        self._rows.append(row)
        if len(self._rows) == _ROWS:
            self._flush()

    def finish(self) -> None:
        """Writes what is left, and the end of the file."""
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        self._writer.write_table(pa.Table.from_pylist(self._rows, PROVENANCE))
        self._rows = []


def _files_of(out: Path) -> dict[str, Row]:
    """Returns bytes and SHA-256 of what a set has beside its shards."""
    names = [*_PREFERENCES, *(f"{name}.csv" for name in SETS), PROVENANCE_NAME, TEXT_ENCODER_NAME, NULL_TEXT_PATH]
    return {name: facts_of(out / name) for name in sorted(names) if (out / name).exists()}


def _write_json(path: Path, content: Any) -> None:
    with write_atomically(path) as stream:
        stream.write(f"{json.dumps(content, indent=1)}\n".encode())
