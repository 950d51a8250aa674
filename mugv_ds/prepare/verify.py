"""Verifies a training set, ours or another in the published format: each check has a number, a bound and an outcome.

What a check needs and is not there, such as the codec, the videos or a manifest, makes it `not checked`, with the
reason; nothing passes by being absent.

Shape suffixes: C = 24 latent channels, T latent frames, h and w latent height and width, L text tokens.
"""

import hashlib
import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import DataSection, FlowSection
from mugv_ds.config.text_encoder import TEXT_ENCODER_NAME, TextEncoderInfo, read_text_encoder
from mugv_ds.data.manifest import Index, open_index, read_records
from mugv_ds.data.paths import PathError, resolve, split_key
from mugv_ds.data.readers import FlowSamples
from mugv_ds.data.sample import LATENT_SCALE, LATENT_SHIFT, read_row, stored_text
from mugv_ds.files.tensor_file import SampleError, load_tensors
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.text import MAX_TOKENS
from mugv_ds.prepare.compare import RIGHT, Compared, compare, decode_latent, likeliest
from mugv_ds.prepare.embed import TextEncoder
from mugv_ds.prepare.encode import Codec
from mugv_ds.prepare.frames import VideoError
from mugv_ds.prepare.manifest import MANIFEST_NAME, PROVENANCE_NAME, SETS, Withdrawn, read_manifest, read_provenance

Status = Literal["pass", "fail", "warn", "not checked"]

LEAST_PSNR = 24.0  # dB, of the median sample
_LUMA = 0.04  # by which decoded frames may be lighter or darker than their source, of [0, 1]
_CLEARLY = 0.8  # of the right hypothesis' error, below which another one holds
_LATE = 1.0  # frames of the set that a frame of the source may be from its time
_STRANGE = 1.0  # nats a value, by which latents may be less likely than if every channel had its own mean and scale
_FEW_SAMPLES = 200  # below which statistics of real videos say little
_EQUAL_CAPTIONS = 0.01
_TEXT_ERROR = 0.05  # of the norm, of features that are made again; bf16 and batch mates cost 0.01
_TEXTS = 16  # captions that are embedded again
_HASHED_BYTES = 1 << 34  # of shards, unless all samples are asked for
_SHOWN = 3  # of what is wrong, in a message


@dataclass(frozen=True)
class Check:
    """The outcome of a check.

    Attributes:
        message: what was found, and what it looks like. value: the number that was held against [low, high]; None
            where there is none.
    """

    name: str
    status: Status
    message: str
    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Verified:
    """The outcome of all checks, and the samples that were compared with their source."""

    checks: tuple[Check, ...]
    compared: tuple[Compared, ...] = ()

    @property
    def passed(self) -> bool:
        """Returns whether no check failed."""
        return all(check.status != "fail" for check in self.checks)

    def report(self) -> dict[str, Any]:
        """Returns the outcome as JSON types."""
        decoded = [{"sample": one.sample, "bucket": one.bucket, "psnr": round(one.psnr, 2)} for one in self.compared]
        return {"passed": self.passed, "checks": [asdict(check) for check in self.checks], "decoded": decoded}

    def lines(self) -> Iterator[str]:
        """Yields a line a check."""
        width = max(len(check.name) for check in self.checks)
        yield from (f"{check.status:11}  {check.name:{width}}  {check.message}" for check in self.checks)


@dataclass(frozen=True)
class Verification:
    """What is verified, and with what.

    Args:
        csv_path: train.csv, val.csv or another CSV in the published format.
        codec, fingerprint: the VideoVAE or the demo's codec, and of its file; without it nothing is decoded, and
            statistics are compared with the published ones.
        encoder: of the captions. videos: folder of the videos.
        decode: samples that are decoded. sample: rows that are read, spread evenly; None for all.
        least_psnr: in dB, of the median sample.
    """

    csv_path: Path
    codec: Codec | None = None
    fingerprint: str | None = None
    encoder: TextEncoder | None = None
    videos: Path | None = None
    decode: int = 8
    sample: int | None = _FEW_SAMPLES
    least_psnr: float = LEAST_PSNR

    def run(self) -> Verified:
        """Returns the outcome of all checks; what is wrong with the set is not raised.

        Raises:
            TransientError: the file system was away for minutes.
        """
        checks = [*self._files(), *self._damaged()]
        with tempfile.TemporaryDirectory(prefix="verify-") as folder:
            try:
                index = open_index(self.csv_path, folder)  # anew, so that headers are read as they are now
            except InputError as error:
                return Verified((*checks, Check("index", "fail", str(error))))
            rows = _Rows(index, self.sample, self._max_tokens)
            checks += [*rows.index_and_samples(), rows.statistics(self.codec)]
            checks += [*self._texts(rows), *self._captions()]
            checks += [*self._duplicates(rows), self._split(), _loader(rows)]
            source, compared = self._source(rows)
            return Verified((*checks, *source), compared)

    @property
    def _out(self) -> Path:
        return self.csv_path.parent

    @property
    def _max_tokens(self) -> int:
        """The most tokens that a caption may have."""
        return self._said.max_tokens if self._said else MAX_TOKENS

    @cached_property
    def _said(self) -> TextEncoderInfo | None:
        """What text_encoder.json says; None where there is none that can be read."""
        try:
            return read_text_encoder(self._out)
        except InputError:
            return None

    @cached_property
    def _manifest(self) -> dict[str, Any] | None:
        """What MANIFEST.json says; None where there is none that can be read."""
        try:
            return read_manifest(self._out)
        except InputError:
            return None

    def _provenance(self, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Returns the rows of provenance.parquet, of both sets."""
        return read_provenance(self._out, columns)

    @cached_property
    def _has_provenance(self) -> bool:
        """Whether there is a provenance.parquet that can be read."""
        try:
            return all(True for _ in self._provenance())  # to its end
        except InputError:
            return False

    def _damaged(self) -> Iterator[Check]:
        """What is beside the CSVs and cannot be read."""
        for name, readable in ((PROVENANCE_NAME, self._has_provenance), (TEXT_ENCODER_NAME, self._said is not None)):
            if (self._out / name).exists() and not readable:
                yield Check(name, "fail", f"{name}: damaged, or of another version; run the step manifest again")

    def _files(self) -> Iterator[Check]:
        """Files, sizes and SHA-256 against MANIFEST.json; the codec against the one that it names."""
        if not (self._out / MANIFEST_NAME).exists():
            yield Check("files", "not checked", f"no {MANIFEST_NAME}")
            return
        if self._manifest is None:
            yield Check("files", "fail", f"{MANIFEST_NAME}: damaged; run the step manifest again")
            return
        shards = self._manifest["shards"]
        listed = {**self._manifest["files"], **shards}
        every = 1 if self.sample is None else math.ceil(sum(one["bytes"] for one in shards.values()) / _HASHED_BYTES)
        hashed = {*self._manifest["files"], *sorted(shards)[:: max(every, 1)]}
        wrong = [said for name, facts in listed.items() if (said := self._unlike(name, facts, name in hashed))]
        if self.csv_path.name not in listed:
            wrong.append(f"{self.csv_path.name} is not listed in {MANIFEST_NAME}")
        yield _none("files", wrong, f"{len(listed)} files as {MANIFEST_NAME} says, {len(hashed)} of them by SHA-256")
        folders = ("latents", "text_features")
        there = {path.relative_to(self._out).as_posix() for name in folders for path in (self._out / name).rglob("*")}
        stray = sorted(name for name in there - set(listed) if (self._out / name).is_file())
        if stray:
            yield Check("stray files", "warn", f"{_some(stray)}: not part of the set", len(stray), high=0)
        made_by = self._manifest["codec"]
        if self.fingerprint is not None and self.fingerprint != made_by:
            message = f"latents were made by the codec {made_by[:12]}, and {self.fingerprint[:12]} was given"
            yield Check("codec", "fail", message)

    def _unlike(self, name: str, facts: dict[str, Any], hashed: bool) -> str | None:
        """Returns how a file is unlike what MANIFEST.json says of it."""
        try:
            path = resolve(self._out, name)
            size = path.stat().st_size
            if size != facts["bytes"]:
                return f"{name}: {size} bytes, not {facts['bytes']}"
            if hashed:
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() != facts["sha256"]:
                        return f"{name}: another SHA-256 than when it was made"
        except PathError as error:
            return str(error)
        except OSError as error:
            return f"{name}: {error.strerror}"
        return None

    def _texts(self, rows: "_Rows") -> Iterator[Check]:
        """Lengths and features of captions against the encoder, or else the lengths against provenance."""
        longest = max((length for length, _ in rows.lengths.values()), default=0)
        said = self._said
        holes = [rows.index.row(row).sample_id for row, (count, last) in rows.lengths.items() if count != last]
        yield _none("text masks", holes, "masks have no holes")
        yield _held(
            "text length",
            f"the longest of {len(rows.lengths)} captions has {longest} tokens",
            longest,
            high=self._max_tokens,
        )
        if self.encoder is None:
            yield Check("text features", "not checked", "no text encoder was given")
            return
        if said is not None and not self.encoder.info.makes_same(said):
            yield Check("text encoder", "fail", f"the set's features are of {said}; given was {self.encoder.info}")
        suffix = self._manifest["suffix"] if self._manifest else ""
        some = list(rows.lengths)[:: max(len(rows.lengths) // _TEXTS, 1)][:_TEXTS]
        captions = {row: caption for row in some if (caption := rows.index.row(row).caption)}
        if not captions:
            yield Check("text features", "not checked", "the CSV has no captions")
            return
        wrong_lengths, errors, unended = [], {}, 0
        for row, caption in captions.items():
            text = caption + suffix
            made, mask = (one[0] for one in self.encoder([text]))
            count = int(mask.sum())
            stored = rows.text(row)
            if len(stored) != count:
                unended += len(stored) == count - 1
                wrong_lengths.append(
                    f"{rows.index.row(row).sample_id}: {len(stored)} tokens, its caption makes {count}"
                )
                continue
            if stored.shape[1] == made.shape[1]:
                errors[row] = float((stored - made[:count]).norm() / made[:count].norm())
            else:
                errors[row] = math.inf
        if wrong_lengths:
            hint = "; the end token is missing" if unended == len(wrong_lengths) else "; another tokenizer, or suffix"
            yield Check("text tokens", "fail", _some(wrong_lengths) + hint, len(wrong_lengths), high=0)
        if errors:
            worst = max(errors, key=errors.__getitem__)
            name = rows.index.row(worst).sample_id
            message = f"features of {len(errors)} captions made again differ by {errors[worst]:.3g} at most, of {name}"
            if errors[worst] > _TEXT_ERROR:
                message += "; another encoder, tokenizer or suffix made them, or they are of another caption"
            yield _held("text features", message, errors[worst], high=_TEXT_ERROR)

    def _captions(self) -> Iterator[Check]:
        """Captions that are empty or equal."""
        seen: dict[bytes, int] = {}
        total = empty = 0
        for _, record in read_records(self.csv_path):
            total += 1
            caption = (record["caption"] or "").strip()
            empty += not caption
            key = hashlib.blake2b(caption.encode(), digest_size=12).digest()
            seen[key] = seen.get(key, 0) + bool(caption)
        if empty == total:
            yield Check("captions", "not checked", "the CSV has no captions")
            return
        equal = sum(count for count in seen.values() if count > 1) / total
        for name, share, high in (("empty captions", empty / total, 0.0), ("equal captions", equal, _EQUAL_CAPTIONS)):
            yield Check(name, "warn" if share > high else "pass", f"{share:.2%} of {total} rows", share, high=high)

    def _duplicates(self, rows: "_Rows") -> Iterator[Check]:
        """Latents that are there twice, bit by bit; clips with the same perceptual hashes."""
        yield rows.equal_latents()
        if not self._has_provenance:
            yield Check("alike clips", "not checked", f"no {PROVENANCE_NAME}")
            return
        first: dict[bytes, str] = {}
        alike = set()
        for row in self._provenance(["clip", "phash"]):
            if row["phash"] and any(row["phash"]):
                other = first.setdefault(np.array(row["phash"], np.uint64).tobytes(), row["clip"])
                if other != row["clip"]:
                    alike.add(f"{other} and {row['clip']}")
        if not first:
            yield Check("alike clips", "not checked", f"{PROVENANCE_NAME} has no perceptual hashes")
            return
        yield _none("alike clips", sorted(alike), "no two clips have the same perceptual hashes")

    def _split(self) -> Check:
        """Videos, clips and samples that are both in the training and in the held-out set."""
        if self._has_provenance:
            sides: dict[str, set[str]] = {"train": set(), "val": set()}
            withdrawn, gone = Withdrawn.read(self._out), 0
            for row in self._provenance(["set", "video", "licence"]):
                sides[row["set"]].add(row["video"])
                gone += withdrawn.holds(row)
            if gone:
                return Check("split", "fail", f"{gone} samples are of what was withdrawn", gone, high=0)
            both = sides["train"] & sides["val"]
            listed = self._of_both_csvs()
            message = f"{len(sides['train'])} videos in train, {len(sides['val'])} in val"
            return _none("split", [*(f"video {video}" for video in sorted(both)), *listed], f"{message}, none in both")
        if not all((self._out / f"{name}.csv").exists() for name in SETS):
            return Check("split", "not checked", f"no {PROVENANCE_NAME}, and not both of train.csv and val.csv")
        return _none("split", self._of_both_csvs(), "no sample or latent is in both; of videos nothing is known")

    def _of_both_csvs(self) -> list[str]:
        """Returns what train.csv and val.csv share, or what provenance.parquet says otherwise of their samples."""
        paths = {name: self._out / f"{name}.csv" for name in SETS}
        if not all(path.exists() for path in paths.values()):
            return []
        held_out = {
            key for _, record in read_records(paths["val"]) for key in (record["sample_id"], record["latent_path"])
        }
        shared = [
            f"{record['sample_id']} in both CSVs"
            for _, record in read_records(paths["train"])
            if record["sample_id"] in held_out or record["latent_path"] in held_out
        ]
        if self._has_provenance:
            said = {row["sample"] for row in self._provenance(["sample", "set"]) if row["set"] == "val"}
            shared += sorted(
                f"{record['sample_id']} in train.csv, held out by {PROVENANCE_NAME}"
                for _, record in read_records(paths["train"])
                if record["sample_id"] in said
            )
        return shared

    def _source(self, rows: "_Rows") -> tuple[list[Check], tuple[Compared, ...]]:
        """Decoded frames against those of the source: pixels, times, luma and PSNR."""
        lacks = [
            what
            for what, there in (
                ("no codec was given", self.codec),
                ("no folder of videos was given", self.videos),
                (f"no {PROVENANCE_NAME}", self._has_provenance),
                ("no sample is to be decoded", self.decode),
            )
            if not there
        ]
        if lacks:
            return [Check("source", "not checked", "; ".join(lacks))], ()
        chosen = {rows.index.row(row).sample_id: row for row in rows.spread(self.decode)}
        compared, wrong = [], []
        for provenance in self._provenance():
            row = chosen.pop(provenance["sample"], None)
            if row is None:
                continue
            record = rows.index.row(row)
            frames = _frames_of(record.latent_shape, record.kind)
            try:
                decoded = decode_latent(self.codec, rows.latent(row), frames)
                compared.append(compare(decoded, provenance, record.fps or 0.0, self.videos))
            except (VideoError, PathError, SampleError, ValueError, OSError) as error:
                wrong.append(f"{record.sample_id}: {error}")
        wrong += [f"{name}: not in {PROVENANCE_NAME}" for name in chosen]
        checks = [_none("source", wrong, f"{len(compared)} samples decoded, and their videos read")]
        return checks + list(_compared_checks(compared, self.least_psnr)), tuple(compared)


class _Rows:
    """Some rows of a set, as the trainer reads them."""

    def __init__(self, index: Index, sample: int | None, max_tokens: int) -> None:
        self.index, self.max_tokens = index, max_tokens
        known = index.shapes().any(axis=1)
        self._unknown = np.flatnonzero(~known).tolist()
        readable = np.flatnonzero(known)
        count = min(len(readable), sample or len(readable))
        self._chosen = readable[np.linspace(0, len(readable) - 1, count).round().astype(int)].tolist()
        self.lengths: dict[int, tuple[int, int]] = {}  # row → tokens of its mask, and where the last one ends
        self._sums = _Sums()

    @cached_property
    def channels(self) -> int:
        """Width of the text features: that of the first row that has some."""
        for row in self._chosen:
            record = self.index.row(row)
            try:
                if record.text_entry is not None:
                    return record.text_entry.shape[1]
                with self.index.files.whole(split_key(record.text_feat_path)[0]) as file:
                    return int(load_tensors(file)["y"].shape[-1])
            except (SampleError, PathError, OSError, KeyError, TypeError, AttributeError, IndexError):
                continue
        return 1

    def latent(self, row: int) -> Tensor:
        """Returns the latent of a row, fp32 [24, T, h, w], as the trainer has it."""
        given = {"channels": self.channels, "max_text_tokens": self.max_tokens, "with_text": False}
        return read_row(self.index, row, **given).latent

    def text(self, row: int) -> Tensor:
        """Returns the text features of a row, fp32 [L, C]."""
        record = self.index.row(row)
        tokens = self.lengths[row][1]
        text, _ = stored_text(self.index.files, record.text_feat_path, self.channels, tokens, record.text_entry)
        return text

    def index_and_samples(self) -> Iterator[Check]:
        """The headers of all rows, and the content of some; what is read is summed up for the other checks."""
        wrong = [self._why(row) for row in self._unknown[:_SHOWN]] + self._unknown[_SHOWN:]
        shapes = len(self.index.buckets().by_shape)
        yield _none("index", wrong, f"{len(self.index)} rows of {shapes} latent shapes, all as their headers say")
        wrong = []
        for row in self._chosen:
            try:
                one = read_row(self.index, row, channels=self.channels, max_text_tokens=self.max_tokens)
            except (SampleError, PathError, OSError) as error:
                wrong.append(str(error))
                continue
            self._sums.add(one.latent)
            self.lengths[row] = int(one.text_mask.sum()), int(one.text_mask.nonzero().max()) + 1
        message = f"{len(self._chosen)} of {len(self.index)} rows read: whole, finite, of the right shape and type"
        yield _none("samples", wrong, message)

    def _why(self, row: int) -> str:
        """Returns what is wrong with a row that is left out of the index."""
        record = self.index.row(row)
        try:
            stored_text(self.index.files, record.text_feat_path, self.channels, self.max_tokens)
            read_row(self.index, row, channels=self.channels, max_text_tokens=self.max_tokens, with_text=False)
        except (SampleError, PathError, OSError) as error:
            return str(error)
        return f"{record.sample_id}: cannot be used"

    def statistics(self, codec: Codec | None) -> Check:
        """Which normalisation the latents' means and variances look like."""
        return self._sums.check(*_normalisation(codec), "published" if codec is None else "codec's")

    def equal_latents(self) -> Check:
        """Latents in shards that are the same bit by bit, by the CRC-32 and shape of all of them."""
        places = self.index.places()
        if places is None or not places["latent_dtype"].any():
            return Check("equal latents", "not checked", "the latents are in files of their own, without CRC-32")
        keys = np.column_stack([places["latent_crc"].astype(np.int64), self.index.shapes()])
        _, first, counts = np.unique(keys[places["latent_dtype"] > 0], axis=0, return_index=True, return_counts=True)
        names = [self.index.row(int(row)).sample_id for row in first[counts > 1][:_SHOWN]]
        wrong = names + [""] * (int((counts > 1).sum()) - len(names))
        return _none("equal latents", wrong, f"no two of {len(keys)} latents are the same")

    def spread(self, count: int) -> list[int]:
        """Returns rows of all shapes in turn, evenly spread over those of each."""
        of_shapes = [rows for rows in self.index.buckets().by_shape.values() if len(rows)]
        each = -(-count // max(len(of_shapes), 1))
        picked = [rows[np.unique(np.linspace(0, len(rows) - 1, each).astype(int))].tolist() for rows in of_shapes]
        turns = [rows[turn] for turn in range(each) for rows in picked if turn < len(rows)]
        return turns[:count]

    def of_each_shape(self) -> list[int]:
        """Returns a row of each latent shape."""
        return [int(rows[0]) for rows in self.index.buckets().by_shape.values() if len(rows)]


class _Sums:
    """Sums over latents, of which mean and variance of each channel follow."""

    def __init__(self) -> None:
        self._samples, self._values = 0, 0
        self._sum, self._squares = torch.zeros(2, LATENT_CHANNELS, dtype=torch.float64)

    def add(self, latent: Tensor) -> None:
        """Takes up a latent [24, T, h, w]."""
        flat = latent.double().flatten(1)
        self._samples, self._values = self._samples + 1, self._values + flat.shape[1]
        self._sum += flat.sum(dim=1)
        self._squares += flat.square().sum(dim=1)

    def check(self, shift: Tensor, scale: Tensor, whose: str) -> Check:
        """Holds three hypotheses against one another: right, missing and double normalisation.

        A value x of a channel with shift s and scale k is normal with mean and standard deviation (0, 1) if it was
        normalised once, (s, k) if not, and (−s/k, 1/k) if twice. The log-likelihood is summed over all channels.
        """
        if not self._samples:
            return Check("normalisation", "not checked", "no sample could be read")
        mean = self._sum / self._values
        variance = (self._squares / self._values - mean.square()).clamp(min=1e-12)
        one = torch.ones_like(scale)
        hypotheses = {"right": (0 * one, one), "missing": (shift, scale), "double": (-shift / scale, 1 / scale)}
        likelihood = {name: _log_likelihood(mean, variance, *at) for name, at in hypotheses.items()}
        best = max(likelihood, key=likelihood.__getitem__)
        lost = _log_likelihood(mean, variance, mean, variance.sqrt()) - likelihood["right"]
        shown = ", ".join(f"{name} {value:.2f}" for name, value in likelihood.items())
        far = int((mean.abs() + variance.log().abs()).argmax())
        message = (
            f"log-likelihood a value of {self._samples} samples: {shown} (by the {whose} shift and scale); channel "
            f"{far} has mean {mean[far]:.2f} and std {variance[far].sqrt():.2f}"
        )
        margin = likelihood["right"] - max(likelihood["missing"], likelihood["double"])
        if best != RIGHT:
            remedy = {
                "missing": "say source = real of raw latents",
                "double": "say source = generated of latents that the encoder normalised",
            }[best]
            return Check(
                "normalisation", "fail", f"looks like {best} normalisation: {remedy}; {message}", margin, low=0
            )
        if lost > _STRANGE:
            message = f"likeliest is right, but they fit no hypothesis ({lost:.2f} nats a value are lost); {message}"
            return Check("normalisation", "warn", message, margin, low=0)
        return Check("normalisation", "pass", message, margin, low=0)


def _log_likelihood(mean: Tensor, variance: Tensor, mu: Tensor, sigma: Tensor) -> float:
    """Returns the mean log-likelihood of values with these means and variances a channel under normal distributions."""
    spread = (variance + (mean - mu).square()) / sigma.square()
    return float((-0.5 * (spread + 2 * sigma.log() + math.log(2 * math.pi))).mean())


def _normalisation(codec: Codec | None) -> tuple[Tensor, Tensor]:
    """Returns shift and scale of a codec, or the published ones; fp64 [24] each."""
    if codec is None:
        return LATENT_SHIFT.double(), LATENT_SCALE.double()
    if isinstance(codec, LinearCodec):
        return torch.zeros(LATENT_CHANNELS, dtype=torch.float64), codec.scale.double().cpu()
    return codec.shift.double().flatten().cpu(), codec.scale.double().flatten().cpu()


def _frames_of(shape: tuple[int, int, int], kind: str | None) -> int:
    """Returns how many frames a latent stands for."""
    return 1 if kind == "image" else 8 * shape[0]


def _loader(rows: _Rows) -> Check:
    """One sample of each latent shape, read by the trainer's own code."""
    data = DataSection(manifest="train.csv", global_batch_size=1, max_text_tokens=rows.max_tokens)
    samples = FlowSamples(rows.index, data, FlowSection(), rows.channels, held_out=True)
    wrong, chosen = [], rows.of_each_shape()
    for row in chosen:
        try:
            samples.read(row, None)
        except (InputError, OSError) as error:
            wrong.append(str(error))
    return _none("loader", wrong, f"a sample of each of {len(chosen)} latent shapes, as the trainer reads it")


def _compared_checks(compared: Sequence[Compared], least_psnr: float) -> Iterator[Check]:
    if not compared:
        return
    psnr = sorted(one.psnr for one in compared)
    median = psnr[len(psnr) // 2]
    yield _held(
        "PSNR", f"median {median:.1f} dB, least {psnr[0]:.1f} dB of {len(psnr)} samples", median, low=least_psnr
    )
    worst = max(compared, key=lambda one: abs(one.luma[1] - one.luma[0]))
    message = f"{worst.sample}: luma {worst.luma[0]:.3f} of the source, {worst.luma[1]:.3f} decoded"
    yield _held("luma", message, abs(worst.luma[1] - worst.luma[0]), high=_LUMA)
    for name, found in (
        ("pixels", [one.pixels for one in compared]),
        ("times", [one.times for one in compared if one.times]),
    ):
        if found:
            likely, share = likeliest(found)
            message = f"{likely} fits best" if likely == RIGHT else f"{likely} fits best, with {share:.2f} of the error"
            looks = f"looks like {likely}: it has {share:.2f} of the error that what was meant has"
            clearly = share < _CLEARLY
            yield Check(name, "fail" if clearly else "pass", looks if clearly else message, share, low=_CLEARLY)
    late = max(compared, key=lambda one: one.late)
    message = f"{late.sample}: a frame of the source is {late.late:.2f} frames of the set from its time, at most"
    yield _held("frame times", message, late.late, high=_LATE)


def _held(name: str, message: str, value: float, low: float | None = None, high: float | None = None) -> Check:
    """Returns a check whose value must lie in its bounds."""
    fine = (low is None or value >= low) and (high is None or value <= high)
    return Check(name, "pass" if fine else "fail", message, value, low, high)


def _none(name: str, wrong: Sequence[Any], message: str) -> Check:
    """Returns a check that nothing may be wrong."""
    return Check(name, "fail" if wrong else "pass", _some(wrong) if wrong else message, len(wrong), high=0)


def _some(wrong: Sequence[Any]) -> str:
    shown = "; ".join(str(one) for one in wrong[:_SHOWN])
    return shown + (f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
