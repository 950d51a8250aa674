"""The steps that work on units of videos: which fragments there must be, under which keys, and what makes them.

scan → videos (probe) → clips (split, score) → fit, gate → text, aesthetic, safety, vlm, caption, tags → select
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.compute as pc
import torch

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.data.manifest import hash_csv
from mugv_ds.prepare import aesthetic, caption, probe, rows, safety, scores, tags, text, vlm
from mugv_ds.prepare.encode import FIT_STEP, fit_clips
from mugv_ds.prepare.frames import read_frames
from mugv_ds.prepare.scan import Scan, Source
from mugv_ds.prepare.screen import Screening
from mugv_ds.prepare.select import VIDEO_COLUMNS, UnitRows
from mugv_ds.prepare.split import split
from mugv_ds.prepare.units import FragmentError, Fragments, Step, digest, read_table
from mugv_ds.prepare.views import ClipView, Score

GATE_STEP = Step("gate", 1, fields=("select", "screen", "dedup.mean"), reads=("clips", "fit"))

# The costly steps, in their order: each a module with STEP, why_skipped, weights and load.
EXTRAS: dict[str, ModuleType] = {module.STEP.name: module for module in (text, aesthetic, safety, vlm, caption, tags)}
SCHEMAS: dict[str, pa.Schema] = {
    "videos": rows.VIDEO,
    "clips": rows.CLIP,
    "fit": rows.FIT,
    "gate": rows.GATE,
    "text": rows.TEXT,
    "aesthetic": rows.AESTHETIC,
    "safety": rows.SAFETY,
    "vlm": rows.VLM,
    "caption": rows.CAPTION,
    "tags": rows.TAGS,
    "select": rows.SELECT,
}
ON_DEVICES = ("aesthetic",)  # extras that a GPU helps


@dataclass(frozen=True)
class Folders:
    """Where a preparation reads and writes: raw videos, its own working folder, and the set."""

    videos: Path
    work: Path
    out: Path


@dataclass(frozen=True)
class Unit:
    """A unit of videos: its files, and the fragments of it that count. A process gets it as it is.

    Attributes:
        config: of the preparation. folders: of it. number: of the unit.
        videos: SHA-256 of its videos, in order. sources: their files, see `Scan.sources`.
        keys: step → key of its fragments; of all steps that run.
    """

    config: PrepareConfig = field(repr=False)
    folders: Folders = field(repr=False)
    number: int
    videos: tuple[str, ...] = field(repr=False)
    sources: tuple[Source, ...] = field(repr=False)
    keys: Mapping[str, str] = field(repr=False)

    @property
    def paths(self) -> dict[str, Source]:
        """Returns SHA-256 → file; of several with the same content the first."""
        return {source.video: source for source in reversed(self.sources)}

    def found(self, step: str) -> list[Path]:
        """Returns the fragments that count."""
        return Fragments(self.folders.work / step).find(self.number, self.keys[step])

    def read(self, step: str, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns a step's rows.

        Raises:
            FragmentError: they are not there, or damaged.
        """
        paths = self.found(step)
        if not paths:
            raise FragmentError(f"{self.folders.work / step}: nothing of unit {self.number} yet; run that step first")
        schema = SCHEMAS[step]
        if columns is not None:
            schema = pa.schema([schema.field(name) for name in columns])
        return pa.concat_tables([read_table(path, columns=schema.names, schema=schema) for path in paths])

    def write(self, step: str, table: pa.Table, number: int = 0) -> int:
        """Writes a fragment; returns its number of rows. number: see `Fragments.path`."""
        Fragments(self.folders.work / step).write(self.number, self.keys[step], table, number)
        return len(table)

    def rows(self) -> UnitRows:
        """Returns what is decided on."""
        videos, paths = self.read("videos", VIDEO_COLUMNS), self.paths
        first = [paths[video].path if video in paths else path for video, path in _pairs(videos, "video", "path")]
        videos = videos.set_column(videos.column_names.index("path"), "path", pa.array(first, pa.string()))
        copies = [(s.path, s.video) for s in self.sources if paths[s.video].path != s.path]
        columns = {"path": [path for path, _ in copies], "video": [video for _, video in copies]}
        clips, extras = self.read("clips"), {}
        for step in (step for step in EXTRAS if step in self.keys):
            table = self.read(step) if self.found(step) else SCHEMAS[step].empty_table()
            extras[step] = table.filter(pc.is_in(table["clip"], value_set=clips["clip"]))
        return UnitRows(videos, clips, extras, pa.table(columns, schema=rows.COPY), self.read("fit"))

    def uncovered(self, step: str) -> list[str]:
        """Returns the clips that the gate lets in and of which an extra step has no row, in order.

        Clips of videos that no file has any more are left out, as nothing can be seen of them.
        """
        gated, clips = self.read("gate"), self.read("clips", ("clip", "video"))
        there = clips.filter(pc.is_in(clips["video"], pa.array([*self.paths], pa.string())))["clip"].to_pylist()
        seen = self.read(step, ["clip"])["clip"].to_pylist() if self.found(step) else []
        return sorted({*gated.filter(gated["open"])["clip"].to_pylist()}.intersection(there).difference(seen))


class Chain:
    """The units of videos, and the keys of all that there must be of them.

    Args:
        config: of the preparation. folders: of it. scan: of the folder of videos.

    Attributes:
        skipped: extra step → why it does not run. screening: the files of the section screen; and their hash.

    Raises:
        InputError: weights or files that the config names cannot be used.
    """

    def __init__(self, config: PrepareConfig, folders: Folders, scan: Scan) -> None:
        self.config, self.folders, self.scan = config, folders, scan
        found = {name: module.why_skipped(config) for name, module in EXTRAS.items()}
        self.skipped = {name: why for name, why in found.items() if why is not None}
        self.screening = Screening.read(config.screen)
        files = (config.screen.sources, config.screen.blocklist)
        self.screening_hash = digest([file and hash_csv(Path(file)) for file in files])
        self._weights = {name: EXTRAS[name].weights(config) for name in EXTRAS if name not in self.skipped}
        self._weights[probe.STEP.name] = probe.weights(config)
        steps = (probe.STEP, scores.STEP, FIT_STEP, GATE_STEP, *(module.STEP for module in EXTRAS.values()))
        self._values = {step: step.values(config) for step in steps}

    @property
    def extras(self) -> tuple[str, ...]:
        """Returns the extra steps that run, in their order."""
        return tuple(name for name in EXTRAS if name not in self.skipped)

    def unit(self, number: int) -> Unit:
        """Returns a unit with its keys."""
        videos, keys = self.scan.videos(number), {}
        unit = Unit(self.config, self.folders, number, tuple(videos), tuple(self.scan.sources(number)), keys)
        paths = {video: source.path for video, source in unit.paths.items()}
        keys["videos"] = self._key(probe.STEP, videos)
        if len(paths) < len(videos) and not unit.found("videos"):
            # What is not there now is probed when it is; what was probed before it went stays.
            keys["videos"] = self._key(probe.STEP, [video if video in paths else f"no {video}" for video in videos])
        keys["clips"] = self._key(scores.STEP, [keys["videos"]])
        keys["fit"] = self._key(FIT_STEP, [keys["clips"]])
        # A file that has moved may be one that the table of sources allows.
        keys["gate"] = self._key(GATE_STEP, [keys["clips"], keys["fit"], self.screening_hash, digest(paths)])
        # A clip's id stands for its pixels, so what is known of it stays, whatever clips there are beside it.
        keys |= {name: self._key(EXTRAS[name].STEP) for name in self.extras if name != "tags"}
        if "tags" in self.extras:  # which follow from captions, and these may be added to
            captions = [path.name for path in unit.found("caption")] if "caption" in keys else []
            keys["tags"] = self._key(tags.STEP, captions)
        return unit

    def _key(self, step: Step, reads: Sequence[str] = ()) -> str:
        return step.key_of(self._values[step], reads, self._weights.get(step.name, ""))

    def units(self) -> Iterator[Unit]:
        """Yields all units, in order."""
        return map(self.unit, self.scan.units)

    def unreadable(self) -> UnitRows:
        """Returns the files that could not be read, as videos with an error whose id is the hash of their path."""
        found = [
            {
                "video": hashlib.sha256(source.path.encode()).hexdigest(),
                "path": source.path,
                "error": "unreadable",
                "detail": source.error,
            }
            for source in self.scan.unreadable()
        ]
        extras = {step: SCHEMAS[step].empty_table() for step in self.extras}
        return UnitRows(
            pa.Table.from_pylist(found, rows.VIDEO), rows.CLIP.empty_table(), extras, fits=rows.FIT.empty_table()
        )


@dataclass(frozen=True)
class Job:
    """A step's work on one unit of videos.

    Attributes:
        step: its name. unit: that it works on.
        clips: of an extra step, those that it is to look at. number: of the fragment that it writes.
    """

    step: str
    unit: Unit
    clips: tuple[str, ...] = field(default=(), repr=False)
    number: int = 0

    def __str__(self) -> str:
        return f"unit {self.unit.number} of {self.step}"


def probe_unit(job: Job) -> int:
    """Decodes each video of a unit once, in a process with limits; returns how many there are."""
    unit, found = job.unit, []
    paths = unit.paths
    for video in unit.videos:
        if video in paths:
            found.append(probe.probe_isolated(unit.folders.videos, paths[video], unit.config))
        else:
            found.append({"video": video, "path": "", "error": "missing", "detail": "no file has this content now"})
    return unit.write("videos", pa.Table.from_pylist(found, rows.VIDEO))


def split_unit(job: Job) -> int:
    """Cuts the videos of a unit into clips, and scores these; returns how many there are."""
    unit, found = job.unit, []
    for video in unit.read("videos").to_pylist():
        if video["error"] is None:
            found += scores.score(video, split(video, unit.config), unit.config)
    return unit.write("clips", pa.Table.from_pylist(found, rows.CLIP))


def fit_unit(job: Job) -> int:
    """Finds the buckets of a unit's clips; returns the number of rows."""
    unit = job.unit
    videos = unit.read("videos", ("video", "time_base", "pts"))
    return unit.write("fit", fit_clips(unit.read("clips"), videos, unit.config.encode))


def one_thread(device: str) -> None:
    """Has a CPU compute in one thread: the last bits depend on how many there are, which Ray and machines decide."""
    if device == "cpu":
        torch.set_num_threads(1)


def extra_unit(job: Job, device: str = "cpu") -> int:
    """Runs a costly step on the clips of a job; returns how many there are."""
    one_thread(device)
    found = _score_of(job.unit, job.step, device)(list(_views(job)))
    return job.unit.write(job.step, pa.Table.from_pylist(found, SCHEMAS[job.step]), job.number)


_scores: dict[tuple[str, str, str], Score] = {}  # of this process: a model is loaded once


def _score_of(unit: Unit, step: str, device: str) -> Score:
    name = (step, device, unit.config.model_dump_json())
    if name not in _scores:
        given = {"aesthetic": (device,)} | dict.fromkeys(("vlm", "caption", "tags"), (unit.folders.work,))
        _scores[name] = EXTRAS[step].load(unit.config, *given.get(step, ()))
    return _scores[name]


def _views(job: Job) -> Iterator[ClipView]:
    """Yields the clips of a job as the extra steps see them, in the job's order."""
    unit = job.unit
    captions: Mapping[str, str] = {}
    if job.step == "tags" and "caption" in unit.keys:
        captions = {row["clip"]: row["caption"] for row in unit.read("caption").to_pylist() if row["reason"] is None}
    pts = dict(_pairs(unit.read("videos", ("video", "pts")), "video", "pts"))
    clips = {row["clip"]: row for row in unit.read("clips").to_pylist()}
    paths = unit.paths
    for clip in job.clips:
        row = clips[clip]
        yield ClipView(
            clip=clip,
            video=row["video"],
            root=unit.folders.videos,
            relative=paths[row["video"]].path,
            pts=[one for one in pts[row["video"]] if row["first_pts"] <= one <= row["last_pts"]],
            height=row["height"],
            width=row["width"],
            read=read_frames,
            crop=tuple(row[f"crop_{side}"] for side in rows.SIDES),
            duration=row["duration"],
            caption=captions.get(clip),
        )


def _pairs(table: pa.Table, *names: str) -> Iterator[tuple]:
    return zip(*(table[name].to_pylist() for name in names), strict=True)
