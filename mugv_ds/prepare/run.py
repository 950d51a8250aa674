"""Runs the steps of a preparation in their order, each on what it has not done yet.

Whatever ends a run, the same command goes on: what is done lies in fragments and shards that are whole. Nothing that is
written tells of times, hosts or the order of work, so the bytes are the same however it went.
"""

import fcntl
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import torch

from mugv_ds.config.errors import ConfigError, InputError
from mugv_ds.config.prepare_schema import EmbedSection, PrepareConfig
from mugv_ds.config.regular_file import open_regular
from mugv_ds.config.text_encoder import read_text_encoder
from mugv_ds.data.manifest import read_records
from mugv_ds.data.progress import Progress
from mugv_ds.files.atomic import HALF, write_atomically
from mugv_ds.models.compile import compile_video_vae
from mugv_ds.models.text import load_text_encoder, read_text_encoder_info
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.prepare import chain as units_of_work
from mugv_ds.prepare import rows
from mugv_ds.prepare.caption import check_given
from mugv_ds.prepare.chain import EXTRAS, Chain, Folders, Job, one_thread
from mugv_ds.prepare.dedup import DedupRows, find_pairs
from mugv_ds.prepare.embed import (
    NULL_TEXT_PATH,
    Embedder,
    EmbedUnit,
    TextEncoder,
    extend_text_plan,
    text_unit_of,
    write_null_text,
)
from mugv_ds.prepare.encode import (
    Codec,
    Encoder,
    EncodeUnit,
    bucket_of,
    check_room,
    devices_of,
    encode_key,
    extend_plan,
    unit_of,
    units_in,
)
from mugv_ds.prepare.executors import Crashed, Executor, refuse_crashed
from mugv_ds.prepare.labels import Labels, read_labels
from mugv_ds.prepare.manifest import Parts, Withdrawn, forget_overwritten, write_manifest
from mugv_ds.prepare.scan import Scan, read_scan, scan
from mugv_ds.prepare.select import Selection, UnitRows, check_bounds, gate
from mugv_ds.prepare.units import Fragments, Step, digest, read_table, write_table

DEDUP_STEP = Step("dedup", 1, fields=("dedup",))
SELECT_STEP = Step(
    "select", 1, fields=("select", "screen", "balance", "dedup", "vlm.threshold", "split.min_seconds", "encode.buckets")
)
PER_UNIT = {"videos": "probe", "clips": "split", "fit": "fit"}  # folder → what the step is called
STEPS = ("scan", "probe", "split", "fit", "gate", *EXTRAS, "dedup", "select", "encode", "embed", "manifest")
SHARDS = ("encode", "embed")
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FUNCTIONS = {
    "videos": units_of_work.probe_unit,
    "clips": units_of_work.split_unit,
    "fit": units_of_work.fit_unit,
}
_MARKER = "prepare.json"
_IDENTITY, _OWNER = "identity", "owner"  # in the working folder, and that of the set: a number drawn once

T = TypeVar("T")


@contextmanager
def locked(work: Path) -> Iterator[None]:
    """Holds the working folder, which is made if it is missing, against other runs.

    Raises:
        InputError: another run holds it, or it holds something else.
    """
    if work.exists() and (not work.is_dir() or (any(work.iterdir()) and not (work / "lock").exists())):
        raise InputError(f"{work}: holds something else; --work names an empty folder, or that of an earlier run")
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(f"{work}: another run is at work here; wait for it, or stop it") from None
        yield


def own(out: Path, work: Path) -> None:
    """Makes the folder of a set that of this working folder, which numbers its shards.

    Raises:
        InputError: it is that of another, whose shards would be overwritten.
    """
    identity, owner = work / _IDENTITY, out / _OWNER
    if not identity.exists():
        with write_atomically(identity) as stream:
            stream.write(uuid.uuid4().hex.encode())
    mine = _short(identity)
    with suppress(FileExistsError), owner.open("xb") as stream:
        stream.write(mine)
    found = _short(owner)
    if not found:  # who made it was killed before it wrote
        with write_atomically(owner) as stream:
            stream.write(mine)
    elif found != mine:
        raise InputError(
            f"{out}: is the set of another working folder than {work}, whose shards would be overwritten; give the "
            f"--work that made it, name another --out, or remove {owner}"
        )


def _short(path: Path) -> bytes:
    with open_regular(path) as stream:
        return stream.read(64)


@dataclass(frozen=True)
class Loaders:
    """What reads the codec's weights, which this room may not: functions of modules, so that they can be sent.

    Attributes:
        codec: (path, dtype=, device=) → the codec. codec_fingerprint: path → what tells its weights apart.
    """

    codec: Callable[..., Codec]
    codec_fingerprint: Callable[[str], str]


@dataclass(frozen=True)
class ShardJob:
    """A shard that is to be made, as a process of its own gets it.

    Attributes:
        step: encode or embed. unit: of it. key: of its fragment. config, folders: of the preparation.
        load_codec: see `Loaders`.
    """

    step: str
    unit: EncodeUnit | EmbedUnit = field(repr=False)
    key: str
    config: PrepareConfig = field(repr=False)
    folders: Folders = field(repr=False)
    load_codec: Callable[..., Codec] = field(repr=False)

    def __str__(self) -> str:
        return f"unit {self.unit.number} of {self.step}"


_makers: dict[tuple[str, str, str], Callable[[Any], pa.Table]] = {}  # of this process: weights are loaded once


def make_shard(job: ShardJob, device: str) -> int:
    """Makes a shard and then its fragment; returns the number of clips."""
    one_thread(device)
    name = (job.step, device, job.config.model_dump_json())
    if name not in _makers:
        config, folders = job.config, job.folders
        if job.step == "encode":
            codec = job.load_codec(config.encode.vae, dtype=_DTYPES[config.encode.dtype], device=device)
            if isinstance(codec, VideoVAE) and device.startswith("cuda"):
                compile_video_vae(codec, shapes=len(config.encode.buckets))
            _makers[name] = Encoder(codec, folders.videos, folders.out, config.encode)
        else:
            _makers[name] = Embedder(_text_encoder(config.embed, device), folders.out, config.embed)
    table = _makers[name](job.unit)
    Fragments(job.folders.work / job.step).write(job.unit.number, job.key, table)
    return len(table)


def of_text(section: EmbedSection) -> dict[str, Any]:
    """Returns what a text encoder is loaded with, beside its source and device."""
    return {
        "channels": section.channels,
        "max_tokens": section.max_tokens,
        "revision": section.revision,
        "dtype": _DTYPES[section.dtype],
    }


def _text_encoder(section: EmbedSection, device: str) -> TextEncoder:
    return load_text_encoder(section.text_encoder, device=device, **of_text(section))


class Preparation:
    """One run of the steps.

    Args:
        config: of the preparation. folders: of it. executor: runs the units. loaders: of weights.
        say: prints a line.
    """

    def __init__(
        self, config: PrepareConfig, folders: Folders, executor: Executor, loaders: Loaders, say: Callable[[str], None]
    ) -> None:
        self.config, self.folders, self.loaders = config, folders, loaders
        self._executor, self._say = executor, say
        self._chain: Chain | None = None
        self._memo: dict[str, Any] = {}  # what is the same for the whole of a step

    # -- what there is ------------------------------------------------------------------------------------------------

    @property
    def chain(self) -> Chain:
        """Returns the units of the last scan.

        Raises:
            InputError: there was none; or a bound of the config asks for a step that is skipped.
        """
        if self._chain is None:
            self._use(read_scan(self.folders.work / "plan"))
        return self._chain

    def _use(self, found: Scan) -> None:
        self._chain = Chain(self.config, self.folders, found)
        check_bounds(self.config, self._chain.extras)

    # -- steps --------------------------------------------------------------------------------------------------------

    def run(self, steps: Collection[str] = STEPS, **scan_options: Any) -> None:
        """Runs the named steps, in their order.

        Args:
            scan_options: `listed` and `limit` of `scan.scan`.

        Raises:
            InputError: what the user gave cannot be used. TrainingError: units killed their processes; all others are
                done. Stopped: the run was asked to stop.
        """
        self._remove_halves()
        self._write_marker()
        for step in (step for step in STEPS if step in steps):
            began = time.monotonic()
            self._memo.clear()
            if step == "scan":
                said = self._scan(**scan_options)
            elif step in EXTRAS:
                said = self._extra(step)
            elif step in PER_UNIT.values():
                said = self._per_unit(next(folder for folder, name in PER_UNIT.items() if name == step))
            else:
                said = getattr(self, f"_{step}")()
            self._say(f"{step:>10}: {said} ({time.monotonic() - began:.1f} s)")

    def _remove_halves(self) -> None:
        """Removes what a killed run left half-written; nobody else is at work here."""
        for folder in (self.folders.work, self.folders.out):
            for path in folder.rglob("*.tmp"):
                if HALF.fullmatch(path.name):  # somebody else's may lie there too
                    path.unlink(missing_ok=True)

    def _write_marker(self) -> None:
        text = json.dumps({"config": self.config.model_dump(mode="json")}, indent=1, sort_keys=True)
        with write_atomically(self.folders.work / _MARKER) as stream:
            stream.write(f"{text}\n".encode())

    def _scan(self, listed: Path | None = None, limit: int | None = None) -> str:
        section = self.config.scan
        progress = Progress("scan")
        found = scan(
            self.folders.videos,
            self.folders.work / "plan",
            suffixes=section.suffixes,
            unit=section.unit,
            listed=listed,
            limit=limit,
            tell=progress.tell,
        )
        self._use(found)
        return f"{len(found.files):,} files, {len(found.units):,} units, {len(found.unreadable()):,} cannot be read"

    def _per_unit(self, folder: str) -> str:
        jobs = [Job(folder, unit) for unit in self.chain.units() if not unit.found(folder)]
        return self._on_cpus(folder, _FUNCTIONS[folder], jobs)

    def _gate(self) -> str:
        done = clips = 0
        for unit in self.chain.units():
            if not unit.found("gate"):
                clips += unit.write("gate", gate(unit.rows(), self.config, self.chain.screening))
                done += 1
        return f"{done:,} units, {clips:,} clips"

    def _extra(self, step: str) -> str:
        chain = self.chain
        if step in chain.skipped:
            return f"skipped: {chain.skipped[step]}"
        if step == "caption":
            check_given(self.config, self.folders.work, self._clips_and_paths())
        jobs = []
        for unit in chain.units():
            clips = unit.uncovered(step)
            if clips:
                jobs.append(Job(step, unit, tuple(clips), len(unit.found(step))))
        if step in units_of_work.ON_DEVICES:
            devices = devices_of(getattr(self.config, step).device)
            return self._gather(step, self._executor.on_devices(units_of_work.extra_unit, jobs, devices), len(jobs))
        return self._on_cpus(step, units_of_work.extra_unit, jobs)

    def _clips_and_paths(self) -> Iterator[tuple[str, str]]:
        for unit in self.chain.units():
            paths = {video: source.path for video, source in unit.paths.items()}
            clips = unit.read("clips", ("clip", "video", "reason")).to_pylist()
            yield from ((row["clip"] or "", paths.get(row["video"], "")) for row in clips)
            yield from (("", source.path) for source in unit.sources)

    def _on_cpus(self, step: str, function: Callable[[Job], int], jobs: list[Job]) -> str:
        return self._gather(step, self._executor.on_cpus(function, jobs), len(jobs))

    def _gather(self, step: str, outcomes: Iterable[Any], count: int) -> str:
        """Waits for all units of a step, logs each, and says how much was done."""
        done = rows_done = 0
        crashed, progress = [], Progress(step)
        log = self.folders.work / "logs" / f"{step}.jsonl"
        log.parent.mkdir(exist_ok=True)
        with log.open("a") as file:
            for outcome in outcomes:
                if isinstance(outcome, Crashed):
                    crashed.append(outcome)
                    line = {"unit": str(outcome.job), "crashed": outcome.why}
                else:
                    done += 1
                    rows_done += outcome.result
                    line = {"unit": str(outcome.job), "rows": outcome.result}
                file.write(f"{json.dumps({'time': round(time.time(), 1), 'host': os.uname().nodename} | line)}\n")
                progress.tell(f"{done:,} of {count:,} units, {rows_done:,} rows")
        refuse_crashed(step, crashed)
        return f"{done:,} units, {rows_done:,} rows"

    # -- decisions ----------------------------------------------------------------------------------------------------

    def unit_rows(self) -> Iterator[UnitRows]:
        """Yields what is decided on, unit by unit."""
        return (unit.rows() for unit in self.chain.units())

    def selection(self, config: PrepareConfig | None = None) -> Selection:
        """Returns what of the whole set decides on a clip, under this run's config or another.

        Raises:
            FragmentError: dedup has not run since something changed.
        """
        return Selection.of(self.unit_rows, config or self.config, self.chain.screening, self.pairs())

    def pairs(self) -> pa.Table:
        """Returns the pairs of clips that are alike, as rows.PAIR; see `selection`."""
        return read_table(self.pairs_path, schema=rows.PAIR)

    def _dedup(self) -> str:
        path = self.pairs_path
        path.parent.mkdir(exist_ok=True)
        if not path.exists():
            write_table(path, find_pairs(self._compared(), self.config.dedup, path.parent))
        return f"{len(read_table(path, ['a'])):,} pairs"

    def _compared(self) -> Iterator[DedupRows]:
        for unit in self.chain.units():
            clips = unit.read("clips", ("clip", "video", "reason", "phash", "phash_mirror"))
            known = {
                step: unit.read(step) for step in ("caption", "aesthetic") if unit.keys.get(step) and unit.found(step)
            }
            yield DedupRows(clips.filter(pc.is_null(clips["reason"])), known.get("caption"), known.get("aesthetic"))

    def _select(self) -> str:
        key, units = self._select_key, self.chain.scan.units
        missing = [number for number in units if not self._selects.find(number, key)]
        if missing:
            selection = self.selection()
            for number in missing:
                self._selects.write(number, key, selection.table(self.chain.unit(number).rows()))
        counts = Counter()
        for number in units:
            table = self.read("select", number)
            counts.update(table.filter(table["clip"].is_valid())["accepted"].to_pylist())
        return f"{counts[True]:,} clips accepted, {counts[False]:,} rejected"

    @property
    def _selects(self) -> Fragments:
        return Fragments(self.folders.work / "select")

    @property
    def pairs_path(self) -> Path:
        """Returns the file of the pairs of duplicates, under the key that holds now."""
        return self.folders.work / "dedup" / f"pairs-{self._same('dedup', self._dedup_key)}.parquet"

    def _dedup_key(self) -> str:
        """Returns the hash of all that pairs of duplicates follow from."""
        steps = ("clips", *(step for step in ("caption", "aesthetic") if step in self.chain.extras))
        return DEDUP_STEP.key(
            self.config, [digest([path.name for step in steps for path in u.found(step)]) for u in self.chain.units()]
        )

    @property
    def _select_key(self) -> str:
        """Returns the hash of all that decisions follow from."""

        def make() -> str:
            steps = ("clips", "fit", *self.chain.extras)
            found = [digest([path.name for step in steps for path in unit.found(step)]) for unit in self.chain.units()]
            sources = digest([self.chain.scan.files["path"].to_pylist(), self.chain.scan.files["video"].to_pylist()])
            also = [sources, self.pairs_path.name, self.chain.screening_hash, digest(self.chain.extras)]
            return SELECT_STEP.key(self.config, [*found, *also])

        return self._same("select", make)

    def _same(self, name: str, make: Callable[[], T]) -> T:
        """Returns what `make` returned first in this step."""
        if name not in self._memo:
            self._memo[name] = make()
        return self._memo[name]

    # -- latents and features -----------------------------------------------------------------------------------------

    def read(self, step: str, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """Returns a step's rows of a unit of videos; of encode and embed, of a unit of theirs.

        Raises:
            FragmentError: they are not there, or damaged.
        """
        if step == "select":
            return read_table(self._selects.path(number, self._select_key), columns)
        if step in SHARDS:
            return read_table(Fragments(self.folders.work / step).path(number, self._shard_keys(step)[number]), columns)
        return self.chain.unit(number).read(step, columns)

    def _accepted(self) -> Iterator[tuple[int, pa.Array]]:
        """Yields each unit of videos with the ids of its clips that are accepted."""
        withdrawn = Withdrawn.read(self.folders.out)
        for number in self.chain.scan.units:
            table = self.read("select", number)
            chosen = table.filter(table["accepted"]).select(["clip", "video", "licence"]).to_pylist()
            yield number, pa.array([row["clip"] for row in chosen if not withdrawn.holds(row)], pa.string())

    def _plan(self, step: str) -> pa.Table:
        """Returns the units of encode or embed. Those that have no fragment are planned anew after other decisions."""
        file = self.folders.work / "plan" / f"{step}.parquet"
        schema = rows.ENCODE_PLAN if step == "encode" else rows.EMBED_PLAN
        plan = read_table(file, schema=schema) if file.exists() else schema.empty_table()
        decided = file.with_suffix(".json")
        now = {"decided by": self._select_key, "sizes": self.config.encode.model_dump(mode="json")}
        if not decided.exists() or json.loads(decided.read_text()) != now:
            made = {int(path.name[1:].partition("-")[0]) for path in (self.folders.work / step).glob("u*.parquet")}
            plan = plan.filter(pc.is_in(plan["unit"], pa.array(sorted(made), pa.int32())))
            if step == "encode":
                plan = extend_plan(plan, self._fitting(), self.config.encode)
            else:
                plan = extend_text_plan(plan, self._accepted(), self.config.embed)
            write_table(file, plan)
            with write_atomically(decided) as stream:
                stream.write(json.dumps(now).encode())
        return plan

    def _fitting(self) -> Iterator[tuple[int, pa.Table]]:
        for number, clips in self._accepted():
            fits = self.chain.unit(number).read("fit")
            yield number, fits.filter(pc.is_in(fits["clip"], value_set=clips))

    def _planned(self, step: str) -> Iterator[tuple[int, pa.Table]]:
        """Yields the number and the rows of the plan of every shard of which a clip is accepted."""
        plan = self._same(f"plan of {step}", lambda: self._plan(step))
        if step == "encode":  # a bucket that the config has no more keeps its place in the plan
            plan = plan.filter(pc.is_in(plan["bucket"], pa.array([one.name for one in self.config.encode.buckets])))
        accepted = pa.concat_arrays([pa.array([], pa.string()), *(clips for _, clips in self._accepted())])
        # One look-up of all: each makes a table of what is accepted, which takes a second for 12 M clips.
        wanted = pc.unique(plan["unit"].filter(pc.is_in(plan["clip"], value_set=accepted)))
        return units_in(plan.filter(pc.is_in(plan["unit"], value_set=wanted)))

    def _key_of(self, step: str, part: pa.Table) -> str:
        made_by = self._same(f"weights of {step}", lambda: self._made_by(step))
        if step == "encode":
            return encode_key(part, made_by, self.config.encode)
        return text_unit_of(part, self.read).key(made_by, self.config.embed)

    def _made_by(self, step: str) -> Any:
        if step == "encode":
            return self.loaders.codec_fingerprint(self.config.encode.vae)
        return read_text_encoder_info(self.config.embed.text_encoder, **of_text(self.config.embed))

    def _shard_keys(self, step: str) -> dict[int, str]:
        def make() -> dict[int, str]:
            return {number: self._key_of(step, part) for number, part in self._planned(step)}

        return self._same(f"keys of {step}", make)

    def _shards(self, step: str, device: str) -> str:
        self.folders.out.mkdir(parents=True, exist_ok=True)
        own(self.folders.out, self.folders.work)
        fragments, keys = Fragments(self.folders.work / step), self._shard_keys(step)
        missing = {number: key for number, key in keys.items() if not fragments.find(number, key)}
        parts = [part for number, part in self._planned(step) if number in missing]
        if step == "encode":
            section = self.config.encode
            check_room(((bucket_of(part, section), len(part)) for part in parts), section, self.folders.out)
        if forget_overwritten(self.folders.out, step, missing):
            self._say(f"{step:>10}: shards are made anew, so the set is none until the step manifest")
        jobs = self._shard_jobs(step, parts, missing)
        return self._gather(step, self._executor.on_devices(make_shard, jobs, devices_of(device)), len(parts))

    def _shard_jobs(self, step: str, parts: Iterable[pa.Table], keys: Mapping[int, str]) -> Iterator[ShardJob]:
        """Yields the jobs one by one: the times of all frames of all clips would fill the memory."""
        withdrawn = Withdrawn.read(self.folders.out).videos
        for part in parts:
            if step == "encode":
                unit = unit_of(
                    part, self.read, self.config.encode, withdrawn, lambda number: self.chain.unit(number).paths
                )
            else:
                unit = text_unit_of(part, self.read)
            yield ShardJob(step, unit, keys[unit.number], self.config, self.folders, self.loaders.codec)

    def _encode(self) -> str:
        if self.config.encode.vae is None:
            raise ConfigError("encode.vae: not given; name vae.pt, or the demo's codec")
        return self._shards("encode", self.config.encode.device)

    def _embed(self) -> str:
        section = self.config.embed
        if section.text_encoder is None:
            raise ConfigError(
                "embed.text_encoder: not given; name the folder of T5-XXL's encoder, or hash for the demo's"
            )
        said = self._shards("embed", section.device)
        if not (self.folders.out / NULL_TEXT_PATH).exists() or read_text_encoder(self.folders.out) != self._made_by(
            "embed"
        ):
            write_null_text(_text_encoder(section, devices_of(section.device)[0]), self.folders.out, section)
        return said

    def shard_rows(self, step: str) -> Iterator[pa.Table]:
        """Yields the rows of encode or embed, unit by unit."""
        return (self.read(step, number) for number in sorted(self._shard_keys(step)))

    def shard_keys(self, step: str) -> dict[int, str]:
        """Returns unit of encode or embed → key of its fragment, of units of which a clip is accepted."""
        return dict(self._shard_keys(step))

    def select_keys(self) -> dict[int, str]:
        """Returns unit of videos → key of the fragment of its decisions."""
        return dict.fromkeys(self.chain.scan.units, self._select_key)

    def labels(self) -> Labels | None:
        """Returns what people say of clips; None where the config names no file.

        Raises:
            ManifestError: the file cannot be used.
        """
        file = self.config.labels.file
        if file is None:
            return None
        named = {record["id"] for _, record in read_records(Path(file), ("id",), (), lambda record: None)}
        return read_labels(Path(file), named.intersection(clip for clip, _ in self._clips_and_paths()))

    def _manifest(self) -> str:
        self.folders.out.mkdir(parents=True, exist_ok=True)
        own(self.folders.out, self.folders.work)
        labels = self.labels()
        parts = Parts(
            videos=len(self.chain.scan.units),
            encode_plan=self._plan("encode"),
            embed_plan=self._plan("embed"),
            read=self.read,
            key=lambda step, number: self._shard_keys(step).get(number),
            scored=[step for step in ("text", "aesthetic", "safety") if step in self.chain.extras],
            **({} if labels is None else {"labels": labels.rows}),
            together=list(zip(*(self.pairs()[name].to_pylist() for name in ("a", "b")), strict=True)),
        )
        about = {"mugv_ds": version("mugv_ds"), "codec": self._made_by("encode"), "text": str(self._made_by("embed"))}
        counts = write_manifest(self.folders.out, parts, self.config, about)["counts"]
        left = ", ".join(f"{number:,} {name}" for name, number in counts["left_out"].items()) or "none"
        return f"{counts['train']:,} samples to train on, {counts['val']:,} held out; left out: {left}"
