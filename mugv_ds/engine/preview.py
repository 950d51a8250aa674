"""Videos of fixed prompts while the model trains: some to look at, and some whose measures are curves."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from mugv_ds.config.console import say
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Index
from mugv_ds.data.noise import gaussian
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.readers import FlowSamples
from mugv_ds.data.sample import SampleError, read_row
from mugv_ds.data.video import video_name, write_mp4
from mugv_ds.engine.metrics import Recorder
from mugv_ds.engine.optional import OptionalOutput
from mugv_ds.engine.preview_codec import Codec, PreviewCodec
from mugv_ds.engine.process import Process
from mugv_ds.engine.sampled import Prompt, RowSampler
from mugv_ds.models.fp8 import fp8_off
from mugv_ds.parallel.inference import PipelinedModel
from mugv_ds.parallel.pipeline import DiTPipeline


class SampledRows(ABC):
    """Samples the first rows of a manifest as the model is. All ranks call each method together.

    The data ranks share the rows out, and all ranks the decoding of each. A row's noise is keyed by (data.seed, sample
    id), so that its videos differ by the weights alone, at every step and in every layout.

    Args:
        key: of the section of the config that says what is sampled.
        config: the run. process: this process. module: its stage.
        index: the section's manifest.
        sample: `mugv_ds.sampling.sampler.sample_latents`. load_codec: `mugv_ds.weights.codec.load_codec`.
        weights: has the weights that are to be sampled with in the model for the while of the context; all ranks enter
            and leave it together.

    Raises:
        ConfigError: the manifest is too short, or a row, the null text or the codec cannot be used.
        PeerError: another rank says why.
    """

    def __init__(
        self,
        key: str,
        config: TrainConfig,
        process: Process,
        module: DiTPipeline,
        index: Index,
        sample: Callable[..., Tensor],
        load_codec: Callable[..., Codec],
        weights: Callable[[], AbstractContextManager] = nullcontext,
    ) -> None:
        self._key, self._section, self._data, self._flow = key, config.sampled[key], config.data, config.flow
        self._process, self._module, self._weights = process, module, weights
        self._sampler = RowSampler(
            sample,
            PipelinedModel(module),
            config.flow,
            config.data.default_fps,
            steps=self._section.steps,
            guidance=self._section.guidance,
            first_frame=self._section.first_frame,
            device=process.device,
        )
        process.host.attempt(lambda: self._read(index, config.model.dit().caption_channels))
        sizes = {(row.height, row.width) for row in self._rows}
        path = self._section.codec
        self._codec = None if path is None else PreviewCodec(path, load_codec, process, sizes, f"{key}.codec")

    @abstractmethod
    def _take(self, step: int, number: int, made: Tensor | np.ndarray, recorder: Recorder) -> None:
        """Does on rank 0 what is done with the latent of a row, or with its frames."""

    def _read(self, index: Index, channels: int) -> None:
        count = self._section.count
        if count > len(index):
            raise ConfigError(
                f"{self._key}.count = {count}: {self._section.manifest} has {len(index)} rows; use at most that many"
            )
        self._rows = [index.row(row) for row in range(count)]
        # Replicas without a row of their own repeat the last, so that all stay in step.
        first, step = self._process.coordinates.data, self._process.layout.data
        mine = [min(begin + first, count - 1) for begin in range(0, count, step)]
        self._prompts = [self._prompt(index, row, channels) for row in mine]
        self._null_text = FlowSamples(index, self._data, self._flow, channels).null_text()

    def _prompt(self, index: Index, row: int, channels: int) -> Prompt:
        tokens = self._data.max_text_tokens
        try:
            sample = read_patiently(
                lambda: read_row(index, row, channels=channels, max_text_tokens=tokens), index.files
            )
        except SampleError as error:
            raise ConfigError(f"{self._key}.manifest: {error}; repair the file or leave the row out") from error
        return Prompt.of(sample)

    def write(self, step: int, recorder: Recorder, alive: Callable[[], None]) -> None:
        """Samples the rows after `step` steps, and does with them what they are for.

        Args:
            recorder: of the run. alive: called now and then, on all ranks equally often; may end it by an error.
        """
        with self._weights(), fp8_off(self._module):
            latents = self._latents(alive)
        with nullcontext() if self._codec is None else self._codec.on_device():
            for number, latent in enumerate(latents):
                alive()  # the others have waited while rank 0 wrote
                frames = self._decode(number, latent, alive)
                if self._process.rank == 0:
                    self._take(step, number, latent if frames is None else frames, recorder)

    def _latents(self, alive: Callable[[], None]) -> list[Tensor]:
        """[24, T, H, W] of every row, on the CPU of all ranks."""
        layout, latents = self._process.layout, []
        for turn, prompt in enumerate(self._prompts):
            mine = self._latent(prompt, alive)
            rows = self._rows[turn * layout.data : (turn + 1) * layout.data]
            for replica, row in enumerate(rows):
                own = replica == self._process.coordinates.data
                latent = mine if own else mine.new_empty(LATENT_CHANNELS, *row.latent_shape)
                dist.broadcast(latent, replica * layout.sequence)
                latents.append(latent.cpu())
        return latents

    def _latent(self, prompt: Prompt, alive: Callable[[], None]) -> Tensor:
        """The latent [24, T, H, W] of a prompt, on every rank of the replica."""
        row = prompt.row
        noise = gaussian(self._data.seed, row.sample_id, 0, (LATENT_CHANNELS, *row.latent_shape))
        return self._sampler([prompt], noise[None], self._null_text, alive)[0]

    def _decode(self, number: int, latent: Tensor, alive: Callable[[], None]) -> np.ndarray | None:
        """The frames of a row's latent on rank 0; None elsewhere, and on all ranks where there is nothing to see."""
        if self._codec is None:
            return None
        row = self._rows[number]
        if not latent.isfinite().all():
            if self._process.rank == 0:
                line = f"warning: {self._key} of {row.sample_id}: the latent is not finite, and is not decoded"
                say(line, error=True)
            return None
        return self._codec.decode(latent, self._sampler.gives_first_frame(row), alive)


class Previews(SampledRows):
    """Writes the first rows of `preview.manifest`, sampled as the model is, to disk and to the trackers.

    Where the folder does not take them, that is said once.
    """

    def __init__(self, config: TrainConfig, process: Process, *given: Any, **options: Any) -> None:
        super().__init__("preview", config, process, *given, **options)
        self._output = OptionalOutput(f"preview.dir = {config.preview.dir}")
        if process.rank == 0:
            self._output.attempt(lambda: Path(self._section.dir).mkdir(parents=True, exist_ok=True))

    def _take(self, step: int, number: int, made: Tensor | np.ndarray, recorder: Recorder) -> None:
        self._output.attempt(lambda: self._write(step, number, made, recorder))

    def _write(self, step: int, number: int, made: Tensor | np.ndarray, recorder: Recorder) -> None:
        """Writes a row's latent, or its frames."""
        row, folder = self._rows[number], Path(self._section.dir) / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / video_name(number, row.caption or row.sample_id)
        if isinstance(made, Tensor):
            save_file({"latent": made}, f"{path}.safetensors")
            return
        video = Path(f"{path}.mp4")
        write_mp4(video, made, self._sampler.fps(row))
        recorder.video(step, f"preview/{path.name}", video)


class Evaluations(SampledRows):
    """Measures the first rows of `evaluation.manifest`, sampled as the model is, and writes the means to TensorBoard.

    Args:
        measure: measures uint8 RGB frames [F, H, W, 3] of a caption, which start with an image [H, W, 3] or with None;
            see `mugv_ds.evaluation.measures`.
        The others are those of `SampledRows`.
    """

    def __init__(
        self,
        measure: Callable[[np.ndarray, str, np.ndarray | None], dict[str, float]],
        config: TrainConfig,
        process: Process,
        *given: Any,
        **options: Any,
    ) -> None:
        super().__init__("evaluation", config, process, *given, **options)
        self._measure = measure
        self._found: dict[str, list[float]] = {}  # on rank 0, of the rows that were sampled after this step

    def write(self, step: int, recorder: Recorder, alive: Callable[[], None]) -> None:
        """Samples and measures the rows; see `SampledRows.write`."""
        self._found = {}
        super().write(step, recorder, alive)
        if self._process.rank == 0:
            means = {f"evaluation/{name}": float(np.mean(values)) for name, values in self._found.items()}
            recorder.write(step, means.items())

    def _take(self, step: int, number: int, made: Tensor | np.ndarray, recorder: Recorder) -> None:
        if isinstance(made, Tensor):  # its latent was not finite, as a warning says
            return
        row = self._rows[number]
        # The frame that was given is the first one, as the codec shows it: of the image there is no more.
        image = made[0] if self._sampler.gives_first_frame(row) else None
        for name, value in self._measure(made, row.caption or "", image).items():
            self._found.setdefault(name, []).append(value)
