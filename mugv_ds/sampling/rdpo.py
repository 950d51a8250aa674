"""Preference pairs without annotators, of real clips and a model's own samples of their captions.

RDPO (Qian et al. 2025, arXiv 2506.18655) carries a real clip back to noise by the flow's ODE and draws the sample of
that noise: it moves as the clip does and looks as the model's samples do. It is the better side; a sample of the same
caption from random noise is the worse one. RealDPO (Cheng et al. 2025, arXiv 2510.14955) has the clip itself for the
better side, which is cheaper, and which the model may also tell from a sample by what has nothing to do with motion.

Work is cut into units, batches of clips of one latent shape. What a unit gives lies in shards, one for each of `PARTS`,
and each is on the disk before the next is begun: a list that is killed goes on with the part that it was at.

Shape suffixes: B batch, T latent frames, H and W latent height and width, L text tokens, C width of the text features.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.manifest import Index, Shape
from mugv_ds.data.noise import gaussian
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.sample import SampleError, read_row, stored_text
from mugv_ds.data.shards import MAX_SHARD_BYTES, find, read_header, read_tensor, write_shard
from mugv_ds.data.storage import open_file
from mugv_ds.files.atomic import HALF, write_atomically
from mugv_ds.models import reuse
from mugv_ds.objectives.flow import resolution_shift, sampling_times
from mugv_ds.sampling.run import Denoiser, Workers
from mugv_ds.sampling.sampler import Velocity, euler, guided_velocity, invert

PARTS = ("text_features", "noise", "better", "worse")
MADE_NAME = "rdpo.json"

_MAX_JSON_BYTES = 1 << 20
_HEADER_BYTES = 1 << 22  # of a shard, at most
_LIMITS = {"steps": (1, 10_000), "guidance": (0, 1000), "shift": (1e-3, 1000), "corrections": (0, 100)}
_LIMITS |= {"seed": (0, (1 << 63) - 1), "default_fps": (0.1, 1000), "max_text_tokens": (2, 10_000)}

Content = dict[str, Tensor]  # of a shard, by key


@dataclass(frozen=True)
class PairSettings:
    """How pairs are made.

    Args:
        better: "reconstructed": drawn again from the clip's noise (RDPO); "real": the clip itself (RealDPO).
        steps, guidance: of the sampler, both ways; at guidance 1 the null text is not needed.
        shift: the timestep shift; None for the resolution's, see `objectives.flow.resolution_shift`.
        corrections: see `sampler.invert`.
        seed: the worse side's noise is keyed by it and the sample id.
        first_frame: whether the clip's first latent frame is given clean, to both sides (image-to-video).
        default_fps: frames a second of a row that does not say.
        max_text_tokens: length that captions are padded to.
        null_text: path of guidance's negative features, in the manifest's folder; None at guidance 1.

    Raises:
        InputError: a value makes no sense.
    """

    better: Literal["reconstructed", "real"] = "reconstructed"
    steps: int = 25
    guidance: float = 1.0
    shift: float | None = None
    corrections: int = 1
    seed: int = 0
    first_frame: bool = False
    default_fps: float = 30.0
    max_text_tokens: int = 300
    null_text: str | None = None

    def __post_init__(self) -> None:
        for name, (least, most) in _LIMITS.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise InputError(f"{name} {value:g}: must be {least:g} to {most:g}")
        if (self.guidance == 1) != (self.null_text is None):
            raise InputError(
                f"guidance {self.guidance:g}: guidance other than 1 takes the features of a null text, and 1 takes none"
            )


class Unit(NamedTuple):
    """Clips that are worked on at once: rows of the manifest, of one latent shape (T, H, W)."""

    number: int
    shape: Shape
    rows: tuple[int, ...]


class Clips(NamedTuple):
    """The clips of a unit, on the CPU; the texts are padded to `max_text_tokens`."""

    ids: list[str]
    latent: Tensor  # fp32 [B, 24, T, H, W]
    text: Tensor  # fp32 [B, L, C]
    text_mask: Tensor  # bool [B, L]
    fps: Tensor  # fp32 [B]


def cut_into_units(index: Index, rows: int | None, batch: int) -> list[Unit]:
    """Cuts the first `rows` rows whose latents can be read, or all of them, into units of at most `batch` clips.

    Raises:
        InputError: there are fewer such rows, or a shard cannot hold so many latents of one shape.
    """
    readable = np.flatnonzero(index.shapes().any(axis=1))
    if rows is not None and not 1 <= rows <= len(readable):
        raise InputError(f"--rows {rows}: must be 1 to {len(readable)}, the rows that can be read")
    chosen = readable[:rows]
    units: list[Unit] = []
    for shape, members in zip(*group_by_shape(index.shapes()[chosen]), strict=True):
        size = 4 * LATENT_CHANNELS * int(np.prod(shape))
        if batch * size > MAX_SHARD_BYTES - _HEADER_BYTES:
            most = (MAX_SHARD_BYTES - _HEADER_BYTES) // size
            raise InputError(f"--batch {batch}: a shard holds {most} latents of {'×'.join(map(str, shape))}; take less")
        of_shape = chosen[members].tolist()
        for start in range(0, len(of_shape), batch):
            units.append(Unit(len(units), shape, tuple(of_shape[start : start + batch])))
    return units


class PairFiles:
    """The shards of a set of pairs, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def claim(self, made: dict[str, Any]) -> None:
        """Says in `rdpo.json` what makes the pairs, or finds that said, and removes what a killed process left.

        Pairs that were made otherwise are never taken for these.

        Args:
            made: of JSON types.

        Raises:
            InputError: the folder holds pairs that were made otherwise.
        """
        made, path = json.loads(json.dumps(made)), self.folder / MADE_NAME
        for part in PARTS:
            (self.folder / part).mkdir(parents=True, exist_ok=True)
            for left in (self.folder / part).iterdir():
                if HALF.fullmatch(left.name):
                    left.unlink()
        if not path.exists():
            with write_atomically(path) as stream:
                stream.write((json.dumps(made, indent=2, sort_keys=True) + "\n").encode())
            return
        try:
            there = json.loads(read_text_file(path, _MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: not what pairs were made with: {error}; name another --out") from None
        if there != made:
            there = there if isinstance(there, dict) else {}
            names = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
            raise InputError(f"{path}: made with another {', '.join(names)}; name another --out, or remove this one")

    def there(self, units: Iterable[Unit]) -> list[tuple[str, int]]:
        """Returns which parts of which units are there: (part, number of the unit)."""
        return [(part, unit.number) for unit in units for part in PARTS if self.path(part, unit).exists()]

    def path(self, part: str, unit: Unit) -> Path:
        """Returns the path of a shard."""
        return self.folder / part / f"u{unit.number:06d}.safetensors"

    def reference(self, part: str, unit: Unit, row: int) -> str:
        """Returns what a manifest in the folder calls a row's tensor."""
        return f"{self.path(part, unit).relative_to(self.folder)}#{key_of(row)}"

    def save(self, part: str, unit: Unit, content: Content) -> None:
        """Writes a shard."""
        write_shard(self.path(part, unit), content)

    def load(self, part: str, unit: Unit, keys: Sequence[str]) -> list[Tensor]:
        """Reads tensors of a shard.

        Raises:
            InputError: it is damaged.
        """
        path = self.path(part, unit)
        try:
            with open_file(path) as blob:
                entries = read_header(blob)
                return [read_tensor(blob, key, find(entries, key, blob.name)) for key in keys]
        except SampleError as error:
            raise InputError(f"{error}; delete {path}, and it is made anew") from error


def key_of(row: int) -> str:
    """Returns the key of a row's tensors in shards: sample ids may be what no key can be."""
    return f"{row:08d}"


def error_key(row: int) -> str:
    """Returns the key of how far a row's better side is from the clip, ‖better − clip‖ / ‖clip‖, fp32 [1]."""
    return f"{row:08d}.error"


class PairMaker:
    """Makes the shards of pairs, as one of all processes that do.

    Args:
        index: the manifest. channels: C. settings: of all pairs.
        files: of the pairs. workers: the processes. device: of this process.
    """

    def __init__(
        self,
        index: Index,
        channels: int,
        settings: PairSettings,
        files: PairFiles,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self._index, self._channels, self._settings = index, channels, settings
        self._files, self._workers, self._device = files, workers, device

    def run(self, units: Sequence[Unit], load: Callable[[], Denoiser]) -> None:
        """Makes what is not there yet; all processes call it together.

        Args:
            load: loads the model; on all processes, if there is anything to do.

        Raises:
            InputError: a sample or a text cannot be read, or the model makes what is not finite.
        """
        there = {tuple(one) for one in self._workers.first(lambda: self._files.there(units))}
        parts = [part for part in PARTS if part != "noise" or self._settings.better == "reconstructed"]
        missing = {unit: [part for part in parts if (part, unit.number) not in there] for unit in units}
        pending = [unit for unit in units if missing[unit]]
        if pending:
            denoiser, null_text = load(), self._null_text()
            for unit in pending[self._workers.replica :: self._workers.replicas]:
                begin = time.perf_counter()
                self._make(unit, missing[unit], denoiser, null_text)
                if self._workers.writes:
                    clips = f"{len(unit.rows)} clips of {'×'.join(map(str, unit.shape))}"
                    seconds = time.perf_counter() - begin
                    print(f"unit {unit.number + 1} of {len(units)}, {clips}: {seconds:.1f} s", flush=True)
        self._workers.attempt(lambda: None)  # the shards of other replicas are there

    def _make(self, unit: Unit, missing: list[str], denoiser: Denoiser, null_text: tuple[Tensor, Tensor]) -> None:
        """Makes the missing parts of a unit, on all processes of a replica together."""
        clips = self._read(unit)
        flow = Flow(denoiser, clips, null_text, self._settings, self._workers, self._device)
        keys = [key_of(row) for row in unit.rows]

        def save(part: str, tensors: Iterable[Tensor], more: Content | None = None) -> None:
            if self._workers.writes:
                self._files.save(part, unit, dict(zip(keys, tensors, strict=True)) | (more or {}))

        if "text_features" in missing:
            pairs = zip(clips.text, clips.text_mask, strict=True)
            save("text_features", [text_LC[mask_L] for text_LC, mask_L in pairs])
        if "noise" in missing:
            noise = flow.invert()
            save("noise", noise)
        elif "better" in missing and self._settings.better == "reconstructed":
            noise = torch.stack(self._files.load("noise", unit, keys))
        if "better" in missing:
            better = clips.latent if self._settings.better == "real" else flow.sample(noise)
            off = (better - clips.latent).flatten(1).norm(dim=1) / clips.latent.flatten(1).norm(dim=1)
            errors = {error_key(row): error[None] for row, error in zip(unit.rows, off, strict=True)}
            save("better", better, errors)
        if "worse" in missing:
            shape, seed = tuple(clips.latent.shape[1:]), self._settings.seed
            save("worse", flow.sample(torch.stack([gaussian(seed, f"worse {name}", 0, shape) for name in clips.ids])))

    def _read(self, unit: Unit) -> Clips:
        given = {"channels": self._channels, "max_text_tokens": self._settings.max_text_tokens}
        self._index.fetch((row, True) for row in unit.rows)
        samples = [
            read_patiently(lambda row=row: read_row(self._index, row, **given), self._index.files) for row in unit.rows
        ]
        return Clips(
            ids=[sample.row.sample_id for sample in samples],
            latent=torch.stack([sample.latent for sample in samples]),
            text=torch.stack([sample.text for sample in samples]),
            text_mask=torch.stack([sample.text_mask for sample in samples]),
            fps=torch.tensor([sample.row.fps or self._settings.default_fps for sample in samples]),
        )

    def _null_text(self) -> tuple[Tensor, Tensor] | None:
        """Features [L, C] and mask [L] of guidance's negative text; None at guidance 1."""
        path, files, tokens = self._settings.null_text, self._index.files, self._settings.max_text_tokens
        return path and read_patiently(lambda: stored_text(files, path, self._channels, tokens), files)


class Flow:
    """The flow's ODE through the clips of a unit, both ways; on all processes of a replica together.

    Args:
        null_text: see `PairMaker`. The others are those of `PairMaker`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        clips: Clips,
        null_text: tuple[Tensor, Tensor] | None,
        settings: PairSettings,
        workers: Workers,
        device: torch.device,
    ) -> None:
        self._denoiser, self._clips, self._settings, self._device = denoiser, clips, settings, device
        text, mask, fps, latent = (
            tensor.to(device) for tensor in (clips.text, clips.text_mask, clips.fps, clips.latent)
        )
        self._latent, (frames, height, width) = latent, latent.shape[2:]
        self._noised_BT = torch.ones(len(latent), frames, dtype=torch.bool, device=device)
        if settings.first_frame and frames > 1:  # of an image nothing would be left to draw
            self._noised_BT[:, 0] = False
        negative_text, negative_mask = text, mask  # which nobody looks at, at guidance 1
        if null_text is not None:
            negative_text, negative_mask = (part.to(device).expand(len(latent), *part.shape) for part in null_text)
        self._velocity: Velocity = guided_velocity(
            denoiser.call,
            frame_mask=self._noised_BT,
            text=text,
            text_mask=mask,
            negative_text=negative_text,
            negative_mask=negative_mask,
            fps=fps,
            guidance=settings.guidance,
            pair=workers.pair,
        )
        shift = settings.shift or resolution_shift(LATENT_STRIDE * height, LATENT_STRIDE * width, frames)
        self._times = F.pad(sampling_times(settings.steps, shift), (0, 1))

    def invert(self) -> Tensor:
        """Returns the noise [B, 24, T, H, W] that the clips are drawn of; frames given clean stay what they are."""
        return self._run(lambda: invert(self._velocity, self._latent, self._times, self._settings.corrections))

    def sample(self, noise: Tensor) -> Tensor:
        """Draws the samples [B, 24, T, H, W] of noise of that shape."""
        start = torch.where(self._noised_BT[:, None, :, None, None], noise.to(self._device), self._latent)
        return self._run(lambda: euler(self._velocity, start, self._times))

    @torch.no_grad()
    def _run(self, solve: Callable[[], Tensor]) -> Tensor:
        with reuse.hold_text(self._denoiser.module):
            found = solve().cpu()
        for name, latent in zip(self._clips.ids, found, strict=True):
            if not latent.isfinite().all():
                raise InputError(
                    f"sample {name}: the DiT made latents that are not finite: its weights are damaged, or overflow; "
                    "or --corrections is too large"
                )
        return found
