"""The codec of sampled videos: on the device only for the while that they are decoded, by all ranks together.

Shape suffixes: T latent frames, h and w latent height and width, F video frames, H and W video height and width.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from mugv_ds.config.console import say
from mugv_ds.config.errors import CheckpointError, ConfigError, InputError
from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.data.video import to_frames
from mugv_ds.engine.process import Process
from mugv_ds.models.codec import LinearCodec
from mugv_ds.models.videovae import VideoVAE, check_conv3d
from mugv_ds.parallel.codec import decode_windows_parallel

Codec = LinearCodec | VideoVAE


class PreviewCodec:
    """Decodes latents. All ranks make it together, and call each method together.

    A VideoVAE lies in host memory. On a GPU it decodes in bf16, where a check of the device at the start says that this
    is right, else in fp32; on a CPU in fp32. The demo's codec decodes on rank 0, on the CPU.

    Args:
        path: the value of `key`. load: `mugv_ds.weights.codec.load_codec`. process: this process.
        sizes: (height, width) of the videos in pixels.
        key: of the config, such as "preview.codec".

    Raises:
        ConfigError: the file holds no codec. PeerError: rank 0 says so.
    """

    def __init__(
        self,
        path: str,
        load: Callable[..., Codec],
        process: Process,
        sizes: Collection[tuple[int, int]],
        key: str = "preview.codec",
    ) -> None:
        self._path, self._load, self._process, self._key = path, load, process, key
        on_gpu = process.device.type == "cuda"
        self._codec = self._read(torch.bfloat16 if on_gpu else torch.float32)
        if on_gpu and self._is_shared and not process.host.all(self._computes_right(sizes)):
            self._codec = self._read(torch.float32)

    @property
    def _is_shared(self) -> bool:
        return isinstance(self._codec, VideoVAE)

    def _read(self, dtype: torch.dtype) -> Codec:
        """Reads it on all ranks; rank 0 first, so that a bad file is one error."""

        def read() -> Codec:
            try:
                return self._load(self._path, dtype=dtype)
            except CheckpointError as error:
                raise ConfigError(f"{self._key}: {error}") from None

        return self._process.host.first_then_all(read)

    def _computes_right(self, sizes: Collection[tuple[int, int]]) -> bool:
        device = self._process.device
        try:
            for height, width in sorted(sizes):
                check_conv3d(device, height=height, width=width, config=self._codec.config)
        except InputError as error:
            line = f"warning: {self._key}: {error}; it decodes in float32, which takes twice the memory"
            say(line, error=True)
            return False
        finally:
            torch.cuda.empty_cache()
        return True

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Has a VideoVAE on the device; what it and decoding took there is given free afterwards."""
        if not self._is_shared:
            yield
            return
        device = self._process.device
        self._codec.to(device)
        try:
            yield
        finally:
            self._codec.cpu()
            if device.type == "cuda":
                torch.cuda.empty_cache()

    def decode(self, latent: Tensor, first_is_given: bool, alive: Callable[[], None]) -> np.ndarray | None:
        """Decodes a latent [24, T, h, w], the same on all ranks.

        The VideoVAE decodes a window at a time, whose frames all ranks share out one by one, so that a device holds one
        window and works at one frame, whatever the length (`plan.memory.predict_decoding`). A first frame that was
        given is decoded by itself, as it was encoded, and the windows begin behind it, as the published sampler has it.

        Args:
            first_is_given: whether latent frame 0 was. It then makes one frame, the last of its eight, which are one
                still where the clip has 8n + 1 frames.
            alive: called once a window, on all ranks.

        Returns:
            uint8 RGB [F, H, W, 3] on rank 0; None on the others.
        """
        if self._is_shared:
            return self._decode_shared(latent, first_is_given, alive)
        return to_frames(self._codec.decode(latent[None]))[0].numpy() if self._process.rank == 0 else None

    def _decode_shared(self, latent: Tensor, first_is_given: bool, alive: Callable[[], None]) -> np.ndarray | None:
        parts = latent[None].tensor_split([1], dim=2) if first_is_given else [latent[None]]
        kept = []
        for part in parts:
            for window in decode_windows_parallel(self._codec, part, windows_at_once=1, frames_at_once=1):
                alive()
                if self._process.rank == 0:
                    kept.append(to_frames(window)[0].cpu())
        if not kept:
            return None
        return torch.cat(kept)[LATENT_STRIDE - 1 if first_is_given else 0 :].numpy()
