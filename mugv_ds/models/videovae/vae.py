"""The VideoVAE: 8×8×8 in time, height and width, 24 channels, with the names and the arithmetic of the published one.

It works in units that know nothing of one another, always in the same shapes: a chunk of one clip's frames makes one
latent frame, a window of one clip's latent frames makes eight times as many features, and a few of these make frames.
So a batch and a stream give the same bits, and so do processes that share out the units: a caller may hand in the
function that runs them. Source: [C] of the specification, §1.5.

Shape suffixes: B clips, C = 24 latent channels, F video frames, T latent frames, H and W video height and width,
D feature channels, h = H/8 and w = W/8, f frames of a unit, n latent frames of a unit.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from mugv_ds.config.errors import InputError
from mugv_ds.config.model import LATENT_CHANNELS, LATENT_STRIDE
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.models.videovae.checks import PixelRange, check_latent, check_pixels, check_video
from mugv_ds.models.videovae.spatial import SpatialVAE
from mugv_ds.models.videovae.temporal import TemporalVAE

WINDOW = 6  # latent frames that the published code decodes together
FRAMES_AT_ONCE = 4  # in the spatial half, as in the published code
_LOGVAR_LIMITS = (-30.0, 20.0)

# Computes all units of a list, wherever it likes, and returns their results in the list's order.
Run = Callable[[list[Callable[[], Tensor]]], list[Tensor]]

# They are in the published weights and take no part in encoding or decoding, so they get no gradient from it and may
# not decay. In training `logvar` is the learned scale of the loss.
UNUSED_PARAMETERS = (
    "logvar",
    "spatial_vae.module.encoder.conv_norm_out.weight",
    "spatial_vae.module.encoder.conv_norm_out.bias",
    "spatial_vae.module.encoder.conv_out.weight",
    "spatial_vae.module.encoder.conv_out.bias",
    "spatial_vae.module.decoder.conv_in.weight",
    "spatial_vae.module.decoder.conv_in.bias",
)


def run_here(tasks: list[Callable[[], Tensor]]) -> list[Tensor]:
    """Computes one unit after the other."""
    return [task() for task in tasks]


class Unit(NamedTuple):
    """Consecutive frames of one clip of a batch: of the video for a chunk, of the latent for a window."""

    clip: int
    start: int
    stop: int


def chunk_units(batch: int, frames: int) -> list[Unit]:
    """Returns the units of encoding, each of which makes one latent frame: clip by clip, in the order of time.

    A chunk has 8 frames; where there are 8n + 1 frames, the first is a chunk of its own.

    Raises:
        InputError: `frames` is neither 8n nor 8n + 1, or 0.
    """
    lone = frames % LATENT_STRIDE
    if frames < 1 or lone > 1:
        shorter = f" or {frames - lone}" if frames > LATENT_STRIDE else ""
        raise InputError(
            f"a clip of {frames} frames: must be 8n or 8n + 1; cut it to {max(frames - lone + 1, 1)} (whose first "
            f"frame gets a latent of its own){shorter}"
        )
    starts = [0] * lone + list(range(lone, frames, LATENT_STRIDE))
    return [Unit(clip, *pair) for clip in range(batch) for pair in zip(starts, [*starts[1:], frames], strict=True)]


def window_units(batch: int, latents: int, window: int = WINDOW) -> list[Unit]:
    """Returns the units of decoding: in the order of time, and for each window all clips. The last may be shorter.

    Raises:
        InputError: `window` is not positive.
    """
    if window < 1:
        raise InputError(f"window = {window}: must be at least 1 latent frame (the published code takes {WINDOW})")
    starts = range(0, latents, window)
    return [Unit(clip, start, min(start + window, latents)) for start in starts for clip in range(batch)]


class VideoVAE(nn.Module):
    """The video autoencoder; `load_state_dict(strict=True)` takes the published weights.

    Attributes:
        config: its sizes.
        shift, scale: buffers [1, 24, 1, 1, 1]; a normalised latent is (z − shift) / scale. They come with the weights.
        logvar: scalar parameter of the training loss, see `UNUSED_PARAMETERS`.
    """

    def __init__(self, config: VideoVAEConfig | None = None) -> None:
        super().__init__()
        self.config = config or VideoVAEConfig()
        self.spatial_vae = SpatialVAE(self.config)
        self.temporal_vae = TemporalVAE(self.config)
        self.logvar = nn.Parameter(torch.tensor(4.0))
        self.register_buffer("shift", torch.zeros(1, LATENT_CHANNELS, 1, 1, 1))
        self.register_buffer("scale", torch.ones(1, LATENT_CHANNELS, 1, 1, 1))

    def posterior(
        self,
        video: Tensor,
        *,
        frames_at_once: int = FRAMES_AT_ONCE,
        any_size: bool = False,
        allow_nonnegative: bool = False,
        run: Run = run_here,
    ) -> tuple[Tensor, Tensor]:
        """Returns mean and log-variance, each [B, C, T, h, w] in fp32, of latents that are not normalised.

        Args:
            video: [B, 3, F, H, W] in [−1, 1], bf16 or fp32, on any device. F = 8n gives n latent frames. F = 8n + 1
                gives n + 1, of which the first is that of eight copies of the first frame.
            frames_at_once: frames that go through the spatial half together, which is what memory depends on.
            any_size: H and W need not be multiples of 8. The latent then has the floored size, but what is beyond it
                takes part, as in the published code; a cropped video gives another latent.
            allow_nonnegative: the pixels are in [−1, 1] though none is below 0.
            run: computes the units, see `encode_unit`.

        Raises:
            InputError: the video is none of that, or the model is in fp16.
        """
        self._check_self(frames_at_once)
        check_video(video, any_size=any_size, allow_nonnegative=allow_nonnegative)
        units = chunk_units(len(video), video.shape[2])
        return self._join(run([partial(self.encode_unit, video, unit, frames_at_once) for unit in units]), len(video))

    def encode(
        self, video: Tensor, sample: bool = False, generator: torch.Generator | None = None, **options
    ) -> Tensor:
        """Encodes pixels [B, 3, F, H, W] as normalised latents [B, C, T, h, w] in fp32.

        Args:
            video: see `posterior`.
            sample: draw from the posterior, as the published code always does; otherwise its mean is taken.
            generator: draws the noise; by default the CPU's own.
            options: those of `posterior`.

        Raises:
            InputError: see `posterior`.
        """
        return self._to_latent(*self.posterior(video, **options), sample, generator)

    def decode(self, latent: Tensor, **options) -> Tensor:
        """Decodes normalised latents [B, C, T, h, w] to pixels [B, 3, 8T, 8h, 8w] in fp32, not clamped.

        Where the video had 8n + 1 frames, the first 7 are to be dropped: all 8 show its first frame.

        Args:
            latent: fp32, bf16 or fp16, on any device.
            options: those of `decode_windows`.

        Raises:
            InputError: the latent is none of that, or the model is in fp16.
        """
        return torch.cat(list(self.decode_windows(latent, **options)), dim=2)

    def encode_chunks(
        self,
        frames: Iterable[Tensor],
        *,
        still_first: bool = False,
        sample: bool = False,
        generator: torch.Generator | None = None,
        frames_at_once: int = FRAMES_AT_ONCE,
        any_size: bool = False,
        allow_nonnegative: bool = False,
    ) -> Iterator[Tensor]:
        """Yields what `encode` returns, one latent frame [B, C, 1, h, w] at a time, and holds one chunk of frames.

        Args:
            frames: [B, 3, H, W] each, in the order of time.
            still_first: there are 8n + 1 frames, and the first has a latent of its own.
            sample, generator: see `encode`. The other arguments are those of `posterior`.

        Raises:
            InputError: see `posterior`. Only after the last latent is it known that there are neither 8n frames (8n + 1
                with `still_first`), or that no pixel of a clip was below 0.
        """
        self._check_self(frames_at_once)
        held: list[Tensor] = []
        given, wanted = 0, 1 if still_first else LATENT_STRIDE
        seen = PixelRange()
        for frame in frames:
            held.append(frame)
            given += 1
            if len(held) < wanted:
                continue
            if len({one.shape for one in held}) > 1 or frame.ndim != 4:
                raise InputError(
                    f"frames {given - len(held)} to {given - 1} must be [B, 3, H, W] of one size, got "
                    f"{', '.join(str(list(one.shape)) for one in held)}"
                )
            video = torch.stack(held, dim=2)
            seen = seen.join(check_pixels(video, any_size=any_size))
            held, wanted = [], LATENT_STRIDE
            units = [Unit(clip, 0, video.shape[2]) for clip in range(len(video))]
            moments = [self.encode_unit(video, unit, frames_at_once) for unit in units]
            del video
            yield self._to_latent(*self._join(moments, len(units)), sample, generator)
        if held or not given:
            raise InputError(
                f"a clip of {given} frames: must be 8n, or 8n + 1 with still_first=True; the last {len(held)} were not "
                "encoded"
            )
        if not allow_nonnegative:
            seen.refuse_nonnegative()

    def decode_windows(
        self,
        latent: Tensor,
        *,
        window: int = WINDOW,
        frames_at_once: int = FRAMES_AT_ONCE,
        windows_at_once: int = 1,
        run: Run = run_here,
    ) -> Iterator[Tensor]:
        """Yields what `decode` returns, window by window, each [B, 3, 8n, 8h, 8w].

        Call it without gradients: otherwise every window's activations stay.

        Args:
            latent: see `decode`.
            window: latent frames that are decoded together; none is influenced by another window.
            frames_at_once: see `posterior`.
            windows_at_once: windows whose features and frames are held together, for `run` to have more to share out.
            run: computes the units: first windows, see `decode_unit`, then frames, see `decode_features`.

        Raises:
            InputError: see `decode`.
        """
        self._check_self(frames_at_once)
        check_latent(latent)
        batch, units = len(latent), window_units(len(latent), latent.shape[2], window)
        if windows_at_once < 1:
            raise InputError(f"windows_at_once = {windows_at_once}: must be at least 1")
        at_once = batch * windows_at_once
        for first in range(0, len(units), at_once):
            yield from self._decode_units(latent, units[first : first + at_once], frames_at_once, run)

    def encode_unit(self, video: Tensor, unit: Unit, frames_at_once: int = FRAMES_AT_ONCE) -> Tensor:
        """Returns the moments [2·C, h, w] of the latent frame that a chunk makes; video [B, 3, F, H, W] as checked.

        The features of a lone frame are repeated eight times.
        """
        frame_f3HW = video[unit.clip, :, unit.start : unit.stop].transpose(0, 1).to(self.logvar).contiguous()
        feature_fDhw = torch.cat([self.spatial_vae.encode(part) for part in frame_f3HW.split(frames_at_once)])
        if len(feature_fDhw) == 1:
            feature_fDhw = feature_fDhw.expand(LATENT_STRIDE, -1, -1, -1)
        moment_1C1hw = self.temporal_vae.encode(feature_fDhw.transpose(0, 1)[None].contiguous())
        return moment_1C1hw[0, :, 0]

    def decode_unit(self, latent: Tensor, unit: Unit) -> Tensor:
        """Returns the features [8n, D, h, w] of a window; normalised latent [B, C, T, h, w] as checked."""
        latent_1Cnhw = latent[unit.clip, None, :, unit.start : unit.stop].to(self.scale.device, torch.float32)
        z_1Cnhw = latent_1Cnhw * self.scale.float() + self.shift.float()
        return self.temporal_vae.decode(z_1Cnhw.to(self.logvar.dtype).contiguous())[0].transpose(0, 1).contiguous()

    def decode_features(self, feature_fDhw: Tensor) -> Tensor:
        """Returns the frames [f, 3, H, W] in fp32 of a few features, which are independent of one another."""
        return self.spatial_vae.decode(feature_fDhw).float()

    def _decode_units(self, latent: Tensor, units: list[Unit], frames_at_once: int, run: Run) -> list[Tensor]:
        """Returns the videos [B, 3, 8n, 8h, 8w] of all clips' windows, one for each window."""
        groups = [
            feature_fDhw.split(frames_at_once)
            for feature_fDhw in run([partial(self.decode_unit, latent, unit) for unit in units])
        ]
        frames = iter(run([partial(self.decode_features, part) for parts in groups for part in parts]))
        videos = [torch.cat([next(frames) for _ in parts]).transpose(0, 1) for parts in groups]
        return [torch.stack(videos[start : start + len(latent)]) for start in range(0, len(videos), len(latent))]

    def _join(self, moments: list[Tensor], batch: int) -> tuple[Tensor, Tensor]:
        """Returns mean and clamped log-variance, each [B, C, T, h, w] in fp32, of the moments of all `chunk_units`."""
        return self.split_moments(rearrange(torch.stack(moments).float(), "(b t) c h w -> b c t h w", b=batch))

    @staticmethod
    def split_moments(moment_BCThw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns mean and clamped log-variance, each [B, C, T, h, w], of moments [B, 2·C, T, h, w]."""
        mean, logvar = moment_BCThw.chunk(2, dim=1)
        return mean, logvar.clamp(*_LOGVAR_LIMITS)

    def _to_latent(
        self, mean: Tensor, logvar: Tensor, sample: bool = False, generator: torch.Generator | None = None
    ) -> Tensor:
        """Returns normalised latents of a posterior; the noise of one latent frame is drawn after the other's.

        Args:
            mean, logvar: [B, C, T, h, w] fp32. sample, generator: see `encode`.
        """
        if sample:
            frames = zip(mean.unbind(2), logvar.unbind(2), strict=True)
            mean = torch.stack([_draw(*frame, generator) for frame in frames], dim=2)
        return (mean - self.shift.float()) / self.scale.float()

    def _check_self(self, frames_at_once: int) -> None:
        if frames_at_once < 1:
            raise InputError(f"frames_at_once = {frames_at_once}: must be at least 1")
        if self.logvar.dtype not in (torch.float32, torch.bfloat16):
            raise InputError(f"the VideoVAE is in {self.logvar.dtype}: must be float32 or bfloat16, others overflow")


def _draw(mean_BChw: Tensor, logvar_BChw: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draws from the posterior of one latent frame."""
    device = generator.device if generator else "cpu"
    noise_BChw = torch.randn(mean_BChw.shape, generator=generator, device=device).to(mean_BChw.device)
    return mean_BChw + torch.exp(0.5 * logvar_BChw.contiguous()) * noise_BChw
