"""Reconstructions of held-out clips while the VideoVAE trains, beside the originals, on disk and in the trackers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.clips import Clips
from mugv_ds.data.video import contact_sheet, to_frames, video_name, write_mp4
from mugv_ds.engine.metrics import Recorder
from mugv_ds.engine.optional import OptionalOutput
from mugv_ds.engine.process import Process
from mugv_ds.engine.vae.validate import Reconstructor
from mugv_ds.models.videovae.vae import VideoVAE

_FPS = 8.0  # of the previews, whatever the clips have: slow enough to see


class VaePreviews:
    """Writes the first held-out clips, each beside its reconstruction, and a contact sheet of all.

    Rank 0 makes them all; the others wait at `alive`.

    Args:
        config: the run. process: this process. vae: trained. clips: held out.

    Raises:
        ConfigError: there are fewer clips than are to be shown.
    """

    def __init__(self, config: VaeTrainConfig, process: Process, vae: VideoVAE, clips: Clips) -> None:
        self._section, self._process, self._clips = config.preview, process, clips
        if self._section.count > len(clips.index):
            raise ConfigError(
                f"preview.count = {self._section.count}: {config.data.val_manifest} has {len(clips.index)} rows; use "
                "at most that many"
            )
        self._reconstruct = Reconstructor(vae, clips, config.data.val_window, process.device)
        self._output = OptionalOutput(f"preview.dir = {self._section.dir}")

    def write(self, step: int, recorder: Recorder, alive: Callable[[], None]) -> None:
        """Makes the previews after `step` steps; where the folder does not take them, that is said once.

        Args:
            recorder: of the run. alive: called now and then, on all ranks equally often; may end it by an error.

        Raises:
            ConfigError: a clip cannot be read. PeerError: on the other ranks.
        """
        shown = []
        for item in range(self._section.count):
            pair = self._process.host.attempt(
                lambda item=item: self._reconstruct(item) if self._process.rank == 0 else None
            )
            if pair is not None:
                shown.append((self._clips.name(item), *map(_uint8, pair)))
            alive()
        if self._process.rank == 0:
            self._output.attempt(lambda: self._write(step, shown, recorder))

    def _write(self, step: int, shown: list[tuple[str, np.ndarray, np.ndarray]], recorder: Recorder) -> None:
        folder = Path(self._section.dir) / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        rows = []
        for number, (name, original, reconstruction) in enumerate(shown):
            both = np.concatenate([original, reconstruction], axis=2)
            path = folder / video_name(number, name)
            video = Path(f"{path}.mp4")
            write_mp4(video, both, _FPS)
            recorder.video(step, f"preview/{path.name}", video)
            rows += [(name, original), (f"{name}, reconstructed after {step} steps", reconstruction)]
        contact_sheet(folder / "sheet.png", rows)


def _uint8(video_F3HW: Tensor) -> np.ndarray:
    """Pixels of one clip as uint8 RGB frames [F, H, W, 3]."""
    return to_frames(video_F3HW.transpose(0, 1)[None].cpu().to(torch.float32))[0].numpy()
