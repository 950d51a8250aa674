"""A clip as the costly steps see it: some of its frames, decoded from the source video.

Shape suffixes: N frames, H and W height and width; the last dimension of 3 is RGB.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np

from mugv_ds.config.errors import InputError, Status

Row = dict[str, Any]  # of a fragment, by the names of its columns
Score = Callable[["Sequence[ClipView]"], list[Row]]  # what a step's `load` returns: one row a clip, in their order


class WeightsError(InputError):
    """A model's weights are missing, of another model, or hold more than tensors. The message names the file."""

    status = Status.FAILED


class FrameReader(Protocol):
    """Decodes frames of a video: `prepare.frames.read_frames`."""

    def __call__(
        self, path: Path, pts: Sequence[int], *, crop: tuple[int, int, int, int], size: tuple[int, int]
    ) -> Sequence[np.ndarray]:
        """Returns uint8 RGB [H, W, 3] of `size`, one for each of these presentation times."""


@dataclass(frozen=True)
class ClipView:
    """A clip whose frames can be looked at.

    Attributes:
        clip, video: their ids. root: folder of videos. relative: path of the video in it.
        pts: presentation times of all frames of the clip, ascending.
        height, width: as shown: cropped, turned, and with square pixels.
        read: decodes frames.
        crop: lines of the decoded frames that are cut away: top, bottom, left, right.
        duration: in seconds.
        caption: of the clip, for steps that read it; None if it has none that can be used.
    """

    clip: str
    video: str
    root: Path
    relative: str
    pts: Sequence[int] = field(repr=False)
    height: int
    width: int
    read: FrameReader = field(repr=False, compare=False)
    crop: tuple[int, int, int, int] = (0, 0, 0, 0)
    duration: float = 0.0
    caption: str | None = None

    @property
    def path(self) -> Path:
        """Returns where the video is."""
        return self.root / self.relative

    def frames(
        self, count: int, *, longest: int | None = None, shortest: int | None = None, part: tuple[int, int] = (0, 1)
    ) -> np.ndarray:
        """Decodes frames evenly spaced by presentation time, from the first to the last; of one, the middle one.

        Args:
            count: N; a clip with fewer frames repeats some.
            longest, shortest: the side of which, one of them, is made this many pixels; frames are never enlarged.
            part: (k, n) for the k-th, from 0 on, of n parts of the clip, of equal duration.

        Returns:
            uint8 RGB [N, H, W, 3].

        Raises:
            OSError, ValueError: the video cannot be read or decoded.
        """
        pts = np.asarray(self.pts, np.int64)
        number, parts = part
        span = (int(pts[-1]) - int(pts[0])) / parts
        places = np.linspace(0, 1, count) if count > 1 else np.array([0.5])
        wanted = int(pts[0]) + span * (number + places)
        later = np.searchsorted(pts, wanted).clip(max=len(pts) - 1)
        earlier = (later - 1).clip(min=0)
        nearest = np.where(wanted - pts[earlier] <= pts[later] - wanted, earlier, later)
        own = (max if longest else min)(self.height, self.width)
        scale = min(1.0, (longest or shortest or own) / own)
        size = (max(1, round(self.height * scale)), max(1, round(self.width * scale)))
        return np.stack(self.read(self.path, pts[nearest].tolist(), crop=self.crop, size=size))


def score_each(clips: Sequence[ClipView], score: Callable[[ClipView], Row]) -> list[Row]:
    """Returns one row a clip: what `score` returns, with the clip's id; or its id and `error`, if decoding fails.

    Raises:
        OSError: the folder of videos is gone.
    """
    rows = []
    for clip in clips:
        try:
            rows.append({"clip": clip.clip, "error": None, **score(clip)})
        except (OSError, ValueError, av.error.FFmpegError) as error:
            rows.append({"clip": clip.clip, "error": why(clip, error)})
    return rows


def why(clip: ClipView, error: Exception) -> str:
    """Returns the words of an error for a clip's row, which must not depend on where the folder of videos lies.

    Raises:
        OSError: the error itself, if that folder is gone, as when a mount vanishes: it tells nothing about the clip.
    """
    if isinstance(error, OSError) and not clip.root.is_dir():
        raise error
    return words(error).replace(f"{clip.root}/", "")


def words(error: Exception) -> str:
    """Returns the first line of an error's message, not too long."""
    return (str(error).strip().partition("\n")[0] or type(error).__name__)[:300]
