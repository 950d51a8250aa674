"""What people ask of a preparation: is the set right, why is a clip out, what would other bounds do, what is stale."""

from collections.abc import Collection, Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import BucketSection, PrepareConfig
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.text import load_text_encoder
from mugv_ds.prepare import report, rows
from mugv_ds.prepare.chain import EXTRAS, Unit
from mugv_ds.prepare.encode import devices_of, facts_of, latent_bytes, latent_shape
from mugv_ds.prepare.frames import read_frames
from mugv_ds.prepare.given import sidecar_caption
from mugv_ds.prepare.manifest import read_manifest
from mugv_ds.prepare.run import PER_UNIT, SHARDS, Preparation, of_text
from mugv_ds.prepare.screen import Screening
from mugv_ds.prepare.select import UnitRows
from mugv_ds.prepare.summary import Example
from mugv_ds.prepare.units import FragmentError, Fragments, read_table
from mugv_ds.prepare.verify import Verification, Verified
from mugv_ds.prepare.views import ClipView
from mugv_ds.prepare.whatif import Explanation, WhatIf, explain, what_if

SETS = ("train", "val")
_REPAIRED = ("crashed", "timed_out", "changed_while_reading", "missing")  # which another attempt may not meet
_FOLLOWING = {"videos": {"clips", "fit", "gate"}, "caption": {"tags"}}
_FINAL = (None, "withdrawn", "no caption", "is no clip any more")  # of clips in shards: nothing changes them
_STRIP = 8  # frames of a clip that is explained


def verify(preparation: Preparation) -> dict[str, Verified]:
    """Verifies the set, as the section verify asks: name of each CSV that has rows → the outcome.

    Raises:
        InputError: there is no set, or the weights cannot be read. TransientError: the file system was away.
    """
    config, folders = preparation.config, preparation.folders
    counts = read_manifest(folders.out)["counts"]
    device = devices_of(config.encode.device)[0]
    codec = preparation.loaders.codec(config.encode.vae, dtype=torch.float32, device=device)
    encoder = load_text_encoder(config.embed.text_encoder, device=device, **of_text(config.embed))
    return {
        name: Verification(
            folders.out / f"{name}.csv",
            codec,
            preparation.loaders.codec_fingerprint(config.encode.vae),
            encoder,
            folders.videos,
            config.verify.decode,
            config.verify.sample,
            config.verify.psnr,
        ).run()
        for name in SETS
        if counts[name]
    }


def write_report(preparation: Preparation, verified: dict[str, Verified], command: str) -> Path:
    """Writes report/index.html and report.json into the working folder; returns the page's path.

    Args:
        verified: as `verify` returned it. command: that makes the set again.

    Raises:
        FragmentError: a step has not run since something changed. OSError: the file system failed.
    """
    chain, config = preparation.chain, preparation.config
    manifest = read_manifest(preparation.folders.out)
    selection = preparation.selection()
    stale = {step: len(paths) for step, paths in leftovers(preparation).items() if paths}
    facts = report.Facts(
        config=config,
        command=command,
        versions={"mugv_ds": version("mugv_ds"), "codec": manifest["codec"][:12], "text encoder": manifest["text"]},
        ran=chain.extras,
        skipped=chain.skipped,
        stale=stale,
        duplicates=selection.duplicates,
        samples={name: manifest["counts"][name] for name in SETS},
        buckets=[_bucket(bucket, manifest["buckets"], config) for bucket in config.encode.buckets],
        caption_tokens=_caption_tokens(preparation),
        verified=Verified(
            tuple(
                replace(check, name=f"{name}: {check.name}")
                for name, found in verified.items()
                for check in found.checks
            ),
            tuple(one for found in verified.values() for one in found.compared),
        ),
        ties=() if (labels := preparation.labels()) is None else labels.ties,
    )
    folder = preparation.folders.work / "report"
    report.write_report(folder, _judged(preparation), facts, _look(preparation))
    return folder / "index.html"


def status(preparation: Preparation) -> Iterator[str]:
    """Yields a table of the steps on units of videos: what is done, what is left, and how many fragments are stale."""
    chain, stale = preparation.chain, leftovers(preparation)
    yield f"{'step':10} {'units done':>12} {'of':>9} {'rows':>12} {'stale':>7}"
    for folder in (*PER_UNIT, "gate", *chain.extras):
        done = total = count = 0
        for unit in chain.units():
            total += 1
            found = unit.found(folder) if folder in unit.keys else []
            complete = bool(found) and (folder not in EXTRAS or not unit.uncovered(folder))
            complete |= folder in EXTRAS and bool(unit.found("gate")) and not unit.uncovered(folder)
            done += complete
            count += sum(len(read_table(path, ["clip" if folder != "videos" else "video"])) for path in found)
        name = PER_UNIT.get(folder, folder)
        yield f"{name:10} {done:>12,} {total:>9,} {count:>12,} {len(stale.get(folder, ())):>7,}"
    for step, why in chain.skipped.items():
        yield f"{step:10} skipped: {why}"


def leftovers(preparation: Preparation) -> dict[str, list[Path]]:
    """Returns step → the files of its folder that no longer count: stale fragments, and halves of killed runs."""
    chain = preparation.chain
    keys: dict[str, dict[int, str]] = {}
    for unit in chain.units():
        for step, key in unit.keys.items():
            keys.setdefault(step, {})[unit.number] = key
    keys |= {step: preparation.shard_keys(step) for step in SHARDS} | {"select": preparation.select_keys()}
    work = preparation.folders.work
    steps = (*PER_UNIT, "gate", *EXTRAS, "select", *SHARDS)
    found = {step: Fragments(work / step).others(keys.get(step, {})) for step in steps}
    found["dedup"] = [path for path in sorted((work / "dedup").glob("*")) if path != preparation.pairs_path]
    return {step: paths for step, paths in found.items() if paths}


def collect_garbage(preparation: Preparation) -> tuple[int, int]:
    """Removes what `leftovers` finds, and shards that no unit makes any more; returns files and bytes."""
    out = preparation.folders.out
    files = [path for paths in leftovers(preparation).values() for path in paths]
    needed = set(read_manifest(out)["shards"])
    for step in SHARDS:
        needed.update(shard for table in preparation.shard_rows(step) for shard in table["shard"].to_pylist())
    for kind in ("latents", "text_features"):
        found = (path for path in (out / kind).rglob("*") if path.suffix in (".safetensors", ".tmp"))
        files += [path for path in sorted(found) if str(path.relative_to(out)) not in needed]
    sizes = [path.stat().st_size for path in files]
    for path in files:
        path.unlink()
    return len(files), sum(sizes)


def repair(preparation: Preparation) -> list[Path]:
    """Removes fragments that are damaged or whose shards are, and those with videos or clips that another attempt may
    do; returns them. A run then makes them anew. All shards are read.

    So it does with captions whose sidecar has changed.
    """
    removed, work = [], preparation.folders.work
    for unit in preparation.chain.units():
        found = {step: unit.found(step) for step in unit.keys}
        bad = {step for step, paths in found.items() if any(_is_bad(step, path) for path in paths)}
        if "clips" not in bad and "caption" not in bad and _has_other_sidecars(unit):
            bad.add("caption")
        for step in ("videos", "caption"):  # these may be others then, and what follows from them has the same keys
            bad |= _FOLLOWING[step] if step in bad else set()
        removed += [path for step in unit.keys if step in bad for path in found[step]]
    removed += _bad_shards(preparation)
    decided = [*(work / "select").glob("*"), *(work / "dedup").glob("*.parquet"), *(work / "plan").glob("*.json")]
    for path in (*removed, *decided):
        path.unlink()
    return removed


def _is_bad(step: str, path: Path) -> bool:
    try:
        table = read_table(path)
    except FragmentError:
        return True
    if step == "videos":
        return bool(pc.any(pc.is_in(table["error"], pa.array(_REPAIRED))).as_py())
    return step in EXTRAS and table["error"].null_count < len(table)


def _has_other_sidecars(unit: Unit) -> bool:
    """Returns whether the file beside a video says another caption than that which its clips have."""
    if not unit.config.caption.sidecar or "caption" not in unit.keys or not unit.found("caption"):
        return False
    clips, paths = unit.read("clips", ("clip", "video")), unit.paths
    videos = dict(zip(clips["clip"].to_pylist(), clips["video"].to_pylist(), strict=True))
    known: dict[str, set[str | None]] = {}  # path → captions of its clips that are a sidecar's, or would be
    for row in unit.read("caption", ("clip", "caption", "source")).to_pylist():
        if row["source"] in (None, "sidecar") and videos.get(row["clip"]) in paths:
            known.setdefault(paths[videos[row["clip"]]].path, set()).add(row["caption"])
    for path, captions in known.items():
        try:
            said = sidecar_caption(unit.folders.videos, path)
        except (InputError, OSError):
            continue  # which is an error of the step, that it says
        if captions != {None if said is None else said.strip()}:
            return True
    return False


def _bad_shards(preparation: Preparation) -> list[Path]:
    """Returns the fragments of encode and embed that count and are damaged, or whose shards are.

    Where nothing was decided yet, or that is damaged, it is not known which count: all are looked at.
    """
    folders = {step: Fragments(preparation.folders.work / step) for step in SHARDS}
    try:
        counted = {step: preparation.shard_keys(step) for step in SHARDS}
        found = [
            path
            for step, keys in counted.items()
            for unit, key in keys.items()
            for path in folders[step].find(unit, key)
        ]
    except InputError:
        found = [path for step in SHARDS for path in sorted(folders[step].folder.glob("u*.parquet"))]
    return [path for path in found if _is_bad_shard(preparation.folders.out, path)]


def _is_bad_shard(out: Path, path: Path) -> bool:
    """Returns whether a fragment of encode or embed, or its shard, is damaged, or a clip of it met an error."""
    try:
        table = read_table(path)
    except FragmentError:
        return True
    for row in table.group_by(["error", "shard", "bytes", "sha256"]).aggregate([]).to_pylist():
        if row["error"] not in _FINAL:
            return True
        shard = row["shard"] and out / row["shard"]
        if shard and (not shard.is_file() or facts_of(shard) != {name: row[name] for name in ("bytes", "sha256")}):
            return True
    return False


def ask_what_if(preparation: Preparation, then: PrepareConfig) -> WhatIf:
    """Returns what another config would accept; nothing is written. See `what_if`."""
    chain = preparation.chain
    return what_if(
        preparation.unit_rows,
        preparation.config,
        then,
        chain.screening,
        Screening.read(then.screen),
        preparation.pairs(),
    )


def ask_why(preparation: Preparation, target: str) -> list[tuple[Explanation, np.ndarray | None]]:
    """Returns all that is known of a clip, video or path, each with frames of the clip, uint8 RGB [N, H, W, 3].

    Frames are None where there is no clip, or it cannot be decoded.

    Raises:
        InputError: there is no such clip, video or path.
    """

    def files() -> Iterator[UnitRows]:
        yield from preparation.unit_rows()
        yield preparation.chain.unreadable()

    look, found = _look(preparation), explain(target, files, preparation.selection())
    units = {video: unit.number for unit in preparation.chain.units() for video in unit.videos}
    shown = []
    for one in found:
        frames = None
        if one.clip is not None and one.clip["reason"] is None:
            frames = look(Example(units[one.clip["video"]], one.clip, one.selected["path"]), _STRIP, 240)
        shown.append((one, frames))
    return shown


def _judged(preparation: Preparation) -> Iterator[tuple[int, UnitRows, pa.Table]]:
    for unit in preparation.chain.units():
        yield unit.number, unit.rows(), preparation.read("select", unit.number)
    unreadable = preparation.chain.unreadable()
    if len(unreadable.videos):
        yield -1, unreadable, preparation.selection().table(unreadable)


def _look(preparation: Preparation) -> report.Look:
    """Returns what decodes frames of examples."""
    units: dict[int, Unit] = {}

    def look(example: Example, count: int, side: int) -> np.ndarray | None:
        clip = example.clip
        if example.unit not in units:
            units.clear()  # they come unit by unit, more or less
            units[example.unit] = preparation.chain.unit(example.unit)
        videos = units[example.unit].read("videos", ("video", "pts"))
        pts = videos.filter(pc.equal(videos["video"], clip["video"]))["pts"].to_pylist()[0]
        view = ClipView(
            clip=clip["clip"],
            video=clip["video"],
            root=preparation.folders.videos,
            relative=example.path,
            pts=[one for one in pts if clip["first_pts"] <= one <= clip["last_pts"]],
            height=clip["height"],
            width=clip["width"],
            read=read_frames,
            crop=tuple(clip[f"crop_{name}"] for name in rows.SIDES),
        )
        try:
            return view.frames(count, longest=side)
        except (OSError, ValueError):
            return None

    return look


def _bucket(bucket: BucketSection, counts: dict[str, Any], config: PrepareConfig) -> report.Bucket:
    _, frames, height, width = latent_shape(bucket)
    samples = sum(counts.get(bucket.name, {}).get(name, 0) for name in SETS)
    return report.Bucket(
        name=bucket.name,
        samples=samples,
        seconds=samples * bucket.seconds,
        tokens=patch_grid(frames, height, width).tokens,
        bytes=samples * latent_bytes(bucket, config.encode),
    )


def _caption_tokens(preparation: Preparation) -> np.ndarray | None:
    """Returns how many captions have each number of tokens before they are cut, int64 [tokens]."""
    counts = np.zeros(0, np.int64)
    for table in preparation.shard_rows("embed"):
        lengths = pc.add(table["tokens"], pc.fill_null(table["cut"], 0)).drop_null().to_numpy()
        more = np.bincount(lengths, minlength=len(counts))
        more[: len(counts)] += counts
        counts = more
    return counts if len(counts) else None


def videos_of(preparation: Preparation, licences: Collection[str]) -> list[str]:
    """Returns the SHA-256 of the videos that the table of sources puts under some licences, in the set or not."""
    chain = preparation.chain
    files = zip(*(chain.scan.files[name].to_pylist() for name in ("path", "video")), strict=True)
    rows = ((video, chain.screening.sources.of(path)) for path, video in files if video and licences)
    return sorted({video for video, source in rows if source is not None and source.licence in licences})


def videos_called(preparation: Preparation, name: str) -> list[str]:
    """Returns the SHA-256 of the video that a path, relative to the folder of videos, or a SHA-256 names.

    Raises:
        InputError: no file of the last scan has this path or content.
    """
    found = preparation.chain.scan
    videos = found.files.filter(pc.equal(found.files["path"], name))["video"].drop_null().to_pylist()
    if not videos and pc.is_in(pa.scalar(name), value_set=found.seen).as_py():
        videos = [name]
    if videos:
        return videos
    raise InputError(f"{name!r}: no video of the last scan has this path or SHA-256")
