"""Videos of fixed prompts while the model trains, on disk and in TensorBoard."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_CHANNELS
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Index, Row
from mugv_ds.data.noise import gaussian
from mugv_ds.data.patience import read_patiently
from mugv_ds.data.readers import FlowSamples
from mugv_ds.data.sample import SampleError, read_row
from mugv_ds.data.video import encode_gif, to_frames, video_name, write_mp4
from mugv_ds.engine.metrics import Recorder
from mugv_ds.engine.optional import OptionalOutput
from mugv_ds.engine.process import Process
from mugv_ds.models.codec import LinearCodec
from mugv_ds.parallel.inference import PipelinedModel
from mugv_ds.parallel.pipeline import DiTPipeline


@dataclass(frozen=True)
class Prompt:
    """What one preview starts from, on the CPU."""

    row: Row
    text: Tensor  # fp32 [L, C]
    text_mask: Tensor  # bool [L]
    first: Tensor  # fp32 [24, 1, H, W]: the first latent frame


class Previews:
    """Samples the first rows of a manifest with the weights as they are. All ranks call each method together.

    The data ranks share the rows out. A row's noise is keyed by (data.seed, sample id), so that its previews differ by
    the weights alone, at every step and in every layout.

    Args:
        config: the run. process: this process. module: its stage.
        index: the manifest `preview.manifest`.
        sample: `mugv_ds.sampling.sampler.sample_latents`.

    Raises:
        ConfigError: the manifest is too short, or a row, the null text or the codec cannot be used.
        PeerError: another rank says why.
    """

    def __init__(
        self,
        config: TrainConfig,
        process: Process,
        module: DiTPipeline,
        index: Index,
        sample: Callable[..., Tensor],
    ) -> None:
        self._section, self._data, self._flow = config.preview, config.data, config.flow
        self._process, self._model, self._sample = process, PipelinedModel(module), sample
        self._output = OptionalOutput(f"preview.dir = {config.preview.dir}")
        process.host.attempt(lambda: self._read(index, config.model.dit().caption_channels))

    def _read(self, index: Index, channels: int) -> None:
        count = self._section.count
        if count > len(index):
            raise ConfigError(
                f"preview.count = {count}: {self._section.manifest} has {len(index)} rows; use at most that many"
            )
        self._rows = [index.row(row) for row in range(count)]
        # Replicas without a row of their own repeat the last, so that all stay in step.
        first, step = self._process.coordinates.data, self._process.layout.data
        mine = [min(begin + first, count - 1) for begin in range(0, count, step)]
        self._prompts = [self._prompt(index, row, channels) for row in mine]
        self._null_text = FlowSamples(index, self._data, self._flow, channels).null_text()
        if self._process.rank == 0:
            self._codec = self._load_codec()
            self._output.attempt(lambda: Path(self._section.dir).mkdir(parents=True, exist_ok=True))

    def _prompt(self, index: Index, row: int, channels: int) -> Prompt:
        tokens = self._data.max_text_tokens
        try:
            sample = read_patiently(lambda: read_row(index, row, channels=channels, max_text_tokens=tokens), index.root)
        except SampleError as error:
            raise ConfigError(f"preview.manifest: {error}; repair the file or leave the row out") from error
        return Prompt(sample.row, sample.text, sample.text_mask, sample.latent[:, :1].clone())

    def _load_codec(self) -> LinearCodec | None:
        path = self._section.codec
        if path is None:
            return None
        try:
            return LinearCodec.load(path)
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ConfigError(f"preview.codec = {path}: not a codec: {str(error).splitlines()[0]}") from error

    def write(self, step: int, recorder: Recorder, alive: Callable[[], None]) -> None:
        """Makes the previews after `step` steps; where the folder does not take them, that is said once.

        Args:
            recorder: of the run. alive: called now and then, on all ranks equally often; may end it by an error.
        """
        latents = self._latents(alive)
        if self._process.rank == 0:
            self._output.attempt(lambda: self._write(step, latents, recorder))

    def _latents(self, alive: Callable[[], None]) -> list[Tensor]:
        """[24, T, H, W] of every row, on the CPU of rank 0; nothing on other ranks."""
        layout, latents = self._process.layout, []
        for turn, prompt in enumerate(self._prompts):
            mine = self._latent(prompt, alive)
            rows = self._rows[turn * layout.data : (turn + 1) * layout.data]
            for replica, row in enumerate(rows):
                own = replica == self._process.coordinates.data
                latent = mine if own else mine.new_empty(LATENT_CHANNELS, *row.latent_shape)
                dist.broadcast(latent, replica * layout.sequence)
                if self._process.rank == 0:
                    latents.append(latent.cpu())
        return latents

    def _latent(self, prompt: Prompt, alive: Callable[[], None]) -> Tensor:
        """The latent [24, T, H, W] of a prompt, on every rank of the replica."""

        def model(*given: Tensor) -> Tensor:
            alive()
            return self._model(*given)

        row, device = prompt.row, self._process.device
        shape = (LATENT_CHANNELS, *row.latent_shape)
        noise = gaussian(self._data.seed, row.sample_id, 0, shape)
        reference, frame_mask = torch.zeros_like(noise), torch.ones(shape[1], dtype=torch.bool)
        if self._section.first_frame and len(frame_mask) > 1:
            reference[:, :1], frame_mask[0] = prompt.first, False
        null_text, null_mask = self._null_text
        given = {
            "noise": noise,
            "reference": reference,
            "frame_mask": frame_mask,
            "text": prompt.text,
            "text_mask": prompt.text_mask,
            "negative_text": null_text,
            "negative_mask": null_mask,
            "fps": torch.tensor(self._fps(row)),
        }
        latents = self._sample(
            model,
            **{name: value[None].to(device) for name, value in given.items()},
            height=row.height,
            width=row.width,
            steps=self._section.steps,
            guidance=self._section.guidance,
            shift=None if self._flow.shift == "resolution" else self._flow.shift,
        )
        return latents[0]

    def _write(self, step: int, latents: list[Tensor], recorder: Recorder) -> None:
        folder = Path(self._section.dir) / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for number, (row, latent) in enumerate(zip(self._rows, latents, strict=True)):
            self._write_one(folder / video_name(number, row.caption or row.sample_id), row, latent, step, recorder)

    def _write_one(self, path: Path, row: Row, latent: Tensor, step: int, recorder: Recorder) -> None:
        if self._codec is None:
            save_file({"latent": latent}, f"{path}.safetensors")
            return
        frames = to_frames(self._codec.decode(latent[None]))[0].numpy()
        write_mp4(Path(f"{path}.mp4"), frames, self._fps(row))
        recorder.write_gif(step, f"preview/{path.name}", encode_gif(frames, self._fps(row)))

    def _fps(self, row: Row) -> float:
        return row.fps or self._data.default_fps
