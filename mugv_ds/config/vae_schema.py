"""The schema of a config that trains the VideoVAE: every key with its type, default and meaning.

The paper names the losses (MSE, L1, perceptual, KL, GAN, an adaptive L1) and the decoder's windows {1, 4, 8}, and gives
no weights, data, steps, batch, resolution or learning rate. "The ancestor" is Open-Sora 1.2, from whose VAE this one
descends; what it publishes is named as such, and the rest is ours.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.model import LATENT_STRIDE
from mugv_ds.config.operation_schema import PreflightSection
from mugv_ds.config.schema import (
    CheckpointSection,
    GuardSection,
    LoggingSection,
    OptimizerSection,
    ParallelSection,
    ScheduleSection,
    changed,
)
from mugv_ds.config.section import Count, Samples, Section, StepsOrNever
from mugv_ds.config.videovae import VideoVAEConfig

Pixels = Annotated[int, Field(ge=8, le=8192)]
Frames = Annotated[int, Field(ge=1, le=4096)]
LossWeight = Annotated[float, Field(ge=0, le=1e6)]
Width = Annotated[int, Field(ge=1, le=1 << 16)]


class VaeModelSection(Section):
    """The sizes of the VideoVAE, what of it is trained, and how it computes. Sizes that are not given are published."""

    block_out_channels: tuple[Width, Width, Width, Width] | None = Field(None, description="See `VideoVAEConfig`.")
    layers_per_block: int | None = Field(None, ge=1, le=64, description="See `VideoVAEConfig`.")
    norm_num_groups: Width | None = Field(None, description="See `VideoVAEConfig`.")
    temporal_filters: Width | None = Field(None, description="See `VideoVAEConfig`.")
    temporal_res_blocks: int | None = Field(None, ge=1, le=64, description="See `VideoVAEConfig`.")
    temporal_norm_groups: Width | None = Field(None, description="See `VideoVAEConfig`.")
    image_vae: str | None = Field(
        None,
        description="Folder of an image VAE as diffusers saves it (AutoencoderKL), from which the spatial half starts. "
        "The paper starts from SDXL's; not named where checkpoint.init_from is.",
    )
    train: Literal["temporal", "all"] = Field(
        "all", description="What learns. The ancestor freezes the spatial half in its first two stages."
    )
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="Dtype of weights and activations; the ancestor trains in bf16. Losses are fp32."
    )
    activation_checkpointing: bool = Field(
        False,
        description="Save only the inputs of the spatial half's blocks for the backward pass, which computes the rest "
        "again.",
    )

    @property
    def dtype(self) -> Literal["bf16", "fp32"]:
        """Returns the dtype of weights and activations."""
        return self.precision

    def videovae(self) -> VideoVAEConfig:
        """Returns the sizes: the published ones with this section's.

        Raises:
            ConfigError: the sizes do not fit together.
        """
        names = VideoVAEConfig.__dataclass_fields__
        return replace(VideoVAEConfig(), **{n: v for n in names if (v := getattr(self, n)) is not None})


class LengthSection(Section):
    """Clips of one length, and their share of the samples. Each step has clips of one length."""

    frames: Frames = Field(
        description="Frames of a clip, 8n or 8n + 1, cut at random from videos that have as many; 1: an image, or a "
        "frame of a video."
    )
    share: float = Field(gt=0, le=1e6, description="Share of the samples, relative to that of the other lengths.")


class VaeDataSection(Section):
    """The videos and images, and the batches that are made of them."""

    manifest: str = Field(
        description="CSV with sample_id, video_path and num_frames (1 for an image); paths are relative to its folder."
    )
    val_manifest: str | None = Field(None, description="CSV of held-out videos, of which all are measured.")
    size: tuple[Pixels, Pixels] = Field(
        description="Height and width, multiples of 8. Frames are scaled to cover them and cropped: at random in "
        "training, around the centre where they are held out. The ancestor: 256 × 256."
    )
    lengths: tuple[LengthSection, ...] = Field(
        min_length=1,
        description="Lengths of the clips. The ancestor: 17, later up to 34 frames and 20% images; it found that with "
        "one length alone others come out blurred.",
    )
    val_frames: Frames = Field(
        17, description="Frames of a held-out clip, 8n or 8n + 1, its first ones; one with fewer is refused."
    )
    val_window: Count = Field(6, description="Latent frames that held-out clips are decoded by; 6 as published.")
    global_batch_size: Samples = Field(description="Clips of an optimizer step, over all ranks and accumulation.")
    micro_batch_size: Samples = Field(1, description="Clips that a rank holds at once; the ancestor: 1.")
    num_workers: int = Field(8, ge=0, le=1024, description="Processes of a rank that decode videos.")
    seed: int = Field(6309, ge=0, lt=1 << 63, description="Seed of the order, the crops, the noise and the weights.")

    @model_validator(mode="after")
    def _fits_the_strides(self) -> "VaeDataSection":
        for side in self.size:
            if side % LATENT_STRIDE:
                raise ValueError(f"data.size = {list(self.size)}: must be multiples of {LATENT_STRIDE}")
        for key, frames in [("lengths", length.frames) for length in self.lengths] + [("val_frames", self.val_frames)]:
            if frames % LATENT_STRIDE > 1:
                below = frames // LATENT_STRIDE * LATENT_STRIDE
                raise ValueError(f"data.{key}: {frames} frames: must be 8n or 8n + 1; use {below or 1} or {below + 9}")
        if len({length.frames for length in self.lengths}) < len(self.lengths):
            raise ValueError("data.lengths: each number of frames may be named once")
        return self


class VaeLossSection(Section):
    """What is minimised: rec/exp(s) + s + λ·KL, s being the learned logvar, averaged over the elements compared.

    rec is the sum of what mse, l1 and perceptual weigh. The KL divergence is summed over a clip's latents and divided
    by the number of elements compared, which is the ancestor's ratio of the two sums.
    """

    target: Literal["features", "pixels"] = Field(
        "pixels",
        description="What is compared: pixels, or the features of the spatial half, as in the ancestor's first two "
        "stages.",
    )
    mse: LossWeight = Field(1.0, description="Weight of the squared error. Ours: no source gives it.")
    l1: LossWeight = Field(1.0, description="Weight of the absolute error; 1 in the ancestor, which has no other.")
    perceptual: LossWeight = Field(0.1, description="Weight of LPIPS (VGG16); the ancestor: 0.1. Pixels only.")
    perceptual_weights: str | None = Field(
        None,
        description="File of LPIPS's weights, which `make lpips` writes; needed where perceptual has an effect, and to "
        "measure LPIPS of held-out clips. null: it is not measured.",
    )
    perceptual_frames: Count | None = Field(
        None, description="Frames of a clip that LPIPS looks at, drawn anew each step (to save memory); null: all."
    )
    kl: LossWeight = Field(1e-6, description="Weight of the KL divergence; the ancestor: 1e-6.")
    identity: LossWeight = Field(
        0.0,
        description="Weight of the identity loss on images, for features: the mean squared distance of the latent to "
        "the spatial half's features under a fixed random orthonormal projection to the latent's channels. The "
        "ancestor's halves have the same channels and need no projection; that is ours.",
    )
    adaptive_after: StepsOrNever | None = Field(
        None,
        description="Step after which the absolute error is weighed by |Δt ∇² x̂|, the change in time of the "
        "reconstruction's Laplacian (without gradient, of mean 1). The paper: once the other losses are stable; null: "
        "never.",
    )
    windows: tuple[Count, ...] = Field(
        (1, 4, 8), min_length=1, description="Latent frames decoded together, drawn each step; 1, 4, 8 in the paper."
    )


class GanSection(Section):
    """A 3D PatchGAN with hinge loss, for the last stage. All values are ours where no source is named."""

    weight: LossWeight = Field(
        0.05,
        description="γ: the GAN's share of the gradient at the last temporal layer, relative to that of the rest. The "
        "paper: small. 0.05 in Open-Sora 2.0.",
    )
    warmup_steps: StepsOrNever = Field(
        1000, description="First steps of the run, in which the discriminator alone learns on the frozen VideoVAE."
    )
    ramp_steps: StepsOrNever = Field(5000, description="Steps after these over which γ grows from 0, linearly.")
    lr: float = Field(1e-4, gt=0, le=1, description="Learning rate of the discriminator; 1e-4 in Open-Sora 2.0.")
    width: Width = Field(64, description="Channels of the discriminator's first convolution, a multiple of 8.")

    @model_validator(mode="after")
    def _has_groups(self) -> "GanSection":
        if self.width % 8:
            raise ValueError(f"gan.width = {self.width}: must be a multiple of 8, the groups of its norms")
        return self


class VaePreviewSection(Section):
    """Reconstructions of held-out clips beside the originals, to look at."""

    every: StepsOrNever = Field(0, description="Steps between previews; the last step has some too. 0: none at all.")
    count: Count = Field(4, description="Clips of data.val_manifest that are shown, the first ones.")
    dir: str | None = Field(None, description="Folder of the videos. Required when preview.every > 0.")

    @model_validator(mode="after")
    def _is_complete(self) -> "VaePreviewSection":
        if self.every and self.dir is None:
            raise ValueError("preview.dir: required when preview.every > 0; give it, or set preview.every to 0")
        return self


class VaeTrainConfig(Section):
    """One training run of the VideoVAE. JSON files hold these sections; `extends` names a file that comes first."""

    model: VaeModelSection = VaeModelSection()
    data: VaeDataSection
    loss: VaeLossSection = VaeLossSection()
    gan: GanSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection
    checkpoint: CheckpointSection
    logging: LoggingSection
    preview: VaePreviewSection = VaePreviewSection()
    guard: GuardSection = GuardSection()
    preflight: PreflightSection = PreflightSection()
    deepspeed: dict[str, Any] = Field(
        default_factory=dict, description="Passed on to DeepSpeed after its keys are checked."
    )

    @property
    def parallel(self) -> ParallelSection:
        """Returns the layout: every rank is a data-parallel replica."""
        return ParallelSection()

    @model_validator(mode="after")
    def _fits_together(self) -> "VaeTrainConfig":
        """Checks what no section can check by itself."""
        try:
            self.model.videovae()
        except ConfigError as error:
            raise ValueError(f"model: {error}") from None
        for broken in (
            *self._contradictions(),
            *(f"{key}: has no effect {why}; leave it out" for key, why in self._idle()),
        ):
            raise ValueError(broken)
        return self

    def _contradictions(self) -> Iterator[str]:
        """Says which keys cannot be what they are together."""
        loss, data = self.loss, self.data
        pixels = loss.target == "pixels"
        if not loss.mse and not loss.l1:
            yield "loss.mse, loss.l1: both are 0, and nothing would be reconstructed; set one of them"
        if loss.perceptual and pixels and loss.perceptual_weights is None:
            yield (
                "loss.perceptual_weights: required when loss.perceptual > 0; `make lpips` writes "
                "data/lpips/vgg16.safetensors, or set loss.perceptual to 0"
            )
        if not pixels and self.model.train == "all":
            yield (
                'model.train = "all": with loss.target = "features" the spatial half is what is compared with, and has '
                'to stay; set it to "temporal"'
            )
        if not pixels and self.gan is not None:
            yield 'gan: judges pixels; set loss.target to "pixels", or leave it out'
        if self.model.image_vae is not None and self.checkpoint.init_from is not None:
            yield "model.image_vae, checkpoint.init_from: both name weights to start from; leave one of them out"
        if self.optimizer.weight_decay:
            yield "optimizer.weight_decay: must be 0: weights that are frozen, or take no part, would decay too"
        if data.global_batch_size % data.micro_batch_size:
            yield (
                f"data.micro_batch_size = {data.micro_batch_size}: does not divide data.global_batch_size = "
                f"{data.global_batch_size}"
            )
        if self.gan is not None and self.gan.warmup_steps >= self.schedule.steps:
            yield f"gan.warmup_steps = {self.gan.warmup_steps}: the run's {self.schedule.steps} steps end before"
        if self.preview.every and data.val_manifest is None:
            yield "data.val_manifest: required when preview.every > 0; name it, or set preview.every to 0"

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Names the keys whose values differ from the defaults and cannot change the run, and why they cannot."""
        schedule, loss = self.schedule, self.loss
        if schedule.kind == "constant":
            yield from changed("schedule", schedule, {"final_lr_ratio"}, 'with schedule.kind = "constant"')
        if self.logging.profile_step > schedule.steps:
            yield "logging.profile_step", f"after the last step, schedule.steps = {schedule.steps}"
        if self.data.val_manifest is None:
            why = "without data.val_manifest"
            yield from changed("logging", self.logging, {"eval_every"}, why)
            yield from changed("data", self.data, {"val_frames", "val_window"}, why)
        if self.checkpoint.resume == "never":
            why = 'with checkpoint.resume = "never"'
            yield from changed("checkpoint", self.checkpoint, {"accept_changed_data"}, why)
        of_the_dit = {"kind", "adamw_lr", "muon_momentum", "muon_scale", "width_reference"}
        yield from changed("optimizer", self.optimizer, of_the_dit, "on the VideoVAE, all of which AdamW moves alike")
        if "every" not in self.preview.model_fields_set:
            yield from changed("preview", self.preview, set(VaePreviewSection.model_fields), "without preview.every")
        if loss.target == "features":
            names = {"perceptual_frames", "adaptive_after", *(["perceptual"] if loss.perceptual else [])}
            yield from changed("loss", loss, names, 'with loss.target = "features"')
            yield from changed("model", self.model, {"activation_checkpointing"}, 'with loss.target = "features"')
        else:
            yield from changed("loss", loss, {"identity"}, 'with loss.target = "pixels"')
        if loss.target == "pixels" and not loss.perceptual:
            yield from changed("loss", loss, {"perceptual_frames"}, "with loss.perceptual = 0")
        if not loss.l1:
            yield from changed("loss", loss, {"adaptive_after"}, "with loss.l1 = 0")
        if loss.identity and all(length.frames > 1 for length in self.data.lengths):
            yield "loss.identity", "without images (a length of 1 frame) in data.lengths"
