"""What held-out clips lose: PSNR, SSIM and LPIPS of their reconstructions, also at the edges of decoder windows.

Shape suffixes: F frames, H and W height and width; 3 is RGB.
"""

from collections.abc import Callable
from math import fsum

import torch
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.clips import Clips
from mugv_ds.data.readers import stack
from mugv_ds.engine.process import Process
from mugv_ds.files.tensor_file import SampleError
from mugv_ds.models.videovae.perceptual import Lpips
from mugv_ds.models.videovae.vae import VideoVAE
from mugv_ds.objectives.reconstruction import at_edges, psnr, ssim

_FRAMES_AT_ONCE = 16  # that are measured together


class Reconstructor:
    """Reconstructs held-out clips with the posterior's mean, as who uses the weights does.

    Args:
        vae: as it is. clips: that are read. window: latent frames decoded together. device: to compute on.
    """

    def __init__(self, vae: VideoVAE, clips: Clips, window: int, device: torch.device) -> None:
        self._vae, self._clips, self._window, self._device = vae, clips, window, device

    @torch.no_grad()
    def __call__(self, item: int) -> tuple[Tensor, Tensor]:
        """Returns a clip and its reconstruction, each fp32 [F, 3, H, W], on the device.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            video_13FHW = stack(self._clips.read(item, 0)).pixels(self._device)
        except SampleError as error:
            raise ConfigError(f"data.val_manifest: {error}; repair the file or leave the row out") from error
        self._vae.eval()  # the guard's stopwatch counts passes in training alone
        latent = self._vae.encode(video_13FHW, allow_nonnegative=True)
        decoded = self._vae.decode(latent, window=self._window)[:, :, -video_13FHW.shape[2] :]
        self._vae.train()
        return video_13FHW[0].transpose(0, 1), decoded[0].transpose(0, 1).clamp(-1, 1)


class VaeValidation:
    """Measures all held-out clips; the ranks share them out, and the results depend on no layout.

    Args:
        config: the run. process: this process. vae: trained. perceptual: LPIPS, or None. clips: held out.
    """

    def __init__(
        self, config: VaeTrainConfig, process: Process, vae: VideoVAE, perceptual: Lpips | None, clips: Clips
    ) -> None:
        self._process, self._perceptual, self._clips = process, perceptual, clips
        self._reconstruct = Reconstructor(vae, clips, config.data.val_window, process.device)
        still_first = clips.frames % LATENT_STRIDE == 1
        self._edge_F = at_edges(clips.frames, config.data.val_window, still_first)

    def run(self, alive: Callable[[], None]) -> dict[str, float]:
        """Returns each measure's mean over all frames, those at window edges and those elsewhere. All ranks call it.

        Args:
            alive: called now and then, on all ranks equally often; may end it by an error.

        Raises:
            ConfigError: a clip cannot be read. PeerError: by another rank.
        """
        rank, ranks, count = self._process.rank, self._process.layout.data, len(self._clips.index)
        measured: list[dict[str, list[float]]] = []
        for first in range(0, count, ranks):
            item = first + rank
            found = self._process.host.attempt(lambda item=item: self._measure(item) if item < count else None)
            measured += [of_rank for of_rank in self._process.host.gather(found) if of_rank is not None]
            alive()
        return self._means(measured)

    def _measure(self, item: int) -> dict[str, list[float]]:
        """The measures of each frame of a clip."""
        parts: dict[str, list[Tensor]] = {}
        for x, y in zip(*(video.split(_FRAMES_AT_ONCE) for video in self._reconstruct(item)), strict=True):
            parts.setdefault("psnr", []).append(psnr(y, x))
            parts.setdefault("ssim", []).append(ssim(y, x))
            if self._perceptual is not None:
                with torch.no_grad():
                    parts.setdefault("lpips", []).append(self._perceptual(y, x))
        return {name: torch.cat([part.reshape(-1) for part in of]).tolist() for name, of in parts.items()}

    def _means(self, measured: list[dict[str, list[float]]]) -> dict[str, float]:
        edge, means = self._edge_F.tolist(), {}
        for name in measured[0]:
            groups = {"": [], "_at_edges": [], "_elsewhere": []}
            for clip in measured:
                for value, is_edge in zip(clip[name], edge, strict=True):
                    groups[""].append(value)
                    groups["_at_edges" if is_edge else "_elsewhere"].append(value)
            means |= {name + suffix: fsum(values) / len(values) for suffix, values in groups.items() if values}
        return means
