"""What a run samples itself: rows of a manifest, by its own model, under its own layout.

Shape suffixes: B batch, T latent frames, H and W latent height and width, L text tokens, C width of the text features.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mugv_ds.config.schema import FlowSection
from mugv_ds.data.manifest import Row
from mugv_ds.data.sample import Sample
from mugv_ds.parallel.inference import PipelinedModel


@dataclass(frozen=True)
class Prompt:
    """What a video is sampled of, on the CPU."""

    row: Row
    text: Tensor  # fp32 [L, C]
    text_mask: Tensor  # bool [L]
    first: Tensor  # fp32 [24, 1, H, W]: the first latent frame

    @classmethod
    def of(cls, sample: Sample) -> "Prompt":
        """Takes what is needed of a row that was read."""
        return cls(sample.row, sample.text, sample.text_mask, sample.latent[:, :1].clone())


@dataclass(frozen=True)
class RowSampler:
    """Samples latents. All ranks of a replica call it together and with the same prompts.

    Args:
        sample: `mugv_ds.sampling.sampler.sample_latents`. model: of the run.
        flow: section of the config. default_fps: of rows that do not say.
        steps, guidance, first_frame: see `config.schema.SampledSection`.
        device: of this rank.
    """

    sample: Callable[..., Tensor]
    model: PipelinedModel
    flow: FlowSection
    default_fps: float
    steps: int
    guidance: float
    first_frame: bool
    device: torch.device

    def __call__(
        self,
        prompts: Sequence[Prompt],
        noise: Tensor,
        null_text: tuple[Tensor, Tensor] | None,
        alive: Callable[[], None],
    ) -> Tensor:
        """Samples latents [B, 24, T, H, W].

        Args:
            prompts: B, of one latent shape. noise: of the shape of the result.
            null_text: features [L, C] and mask [L] that guidance subtracts; None at guidance 1, which looks at none.
            alive: called before each evaluation of the model.
        """

        def model(*inputs: Tensor) -> Tensor:
            alive()
            return self.model(*inputs)

        row = prompts[0].row
        reference, frame_mask = torch.zeros_like(noise), torch.ones(len(prompts), noise.shape[2], dtype=torch.bool)
        if self.gives_first_frame(row):
            reference[:, :, :1] = torch.stack([prompt.first for prompt in prompts])
            frame_mask[:, 0] = False
        text, text_mask = (torch.stack([getattr(p, name) for p in prompts]) for name in ("text", "text_mask"))
        negative_text, negative_mask = text, text_mask
        if null_text is not None:
            negative_text, negative_mask = (part.expand(len(prompts), *part.shape) for part in null_text)
        given = {
            "noise": noise,
            "reference": reference,
            "frame_mask": frame_mask,
            "text": text,
            "text_mask": text_mask,
            "negative_text": negative_text,
            "negative_mask": negative_mask,
            "fps": torch.tensor([self.fps(prompt.row) for prompt in prompts], dtype=torch.float32),
        }
        return self.sample(
            model,
            **{name: value.to(self.device) for name, value in given.items()},
            height=row.height,
            width=row.width,
            steps=self.steps,
            guidance=self.guidance,
            shift=None if self.flow.shift == "resolution" else self.flow.shift,
        )

    def gives_first_frame(self, row: Row) -> bool:
        """Tells whether the first latent frame of a row is given clean; of an image nothing would be left to sample."""
        return self.first_frame and row.latent_shape[0] > 1

    def fps(self, row: Row) -> float:
        """Returns the frames a second of a row's video."""
        return row.fps or self.default_fps
