"""Starts DeepSpeed's engines for the VideoVAE and, with a GAN, for its discriminator."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn

from mugv_ds.config.deepspeed import engine_config, micro_batches
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import OptimizerSection, ScheduleSection
from mugv_ds.config.vae_schema import VaeTrainConfig
from mugv_ds.data.noise import generator
from mugv_ds.engine.build import DTYPES, adamw
from mugv_ds.engine.distributed_optimizer import make_engine
from mugv_ds.engine.process import Process
from mugv_ds.engine.schedule import rate_factor
from mugv_ds.engine.vae.objective import DiscriminatorObjective, VaeObjective
from mugv_ds.models.videovae.device import check_conv3d
from mugv_ds.models.videovae.discriminator import PatchDiscriminator
from mugv_ds.models.videovae.perceptual import Lpips
from mugv_ds.models.videovae.training import freeze, initial_video_vae
from mugv_ds.models.videovae.vae import VideoVAE

DISCRIMINATOR = "discriminator."  # before the names of its parameters in checkpoints


@dataclass(frozen=True)
class VaeEngines:
    """The engines of a run.

    Attributes:
        vae: of the VideoVAE. discriminator: None without a GAN. perceptual: LPIPS on the device, or None.
    """

    vae: DeepSpeedEngine
    discriminator: DeepSpeedEngine | None
    perceptual: Lpips | None

    @property
    def others(self) -> dict[str, DeepSpeedEngine]:
        """Returns the further engines by the prefix of their parameters' names."""
        return {} if self.discriminator is None else {DISCRIMINATOR: self.discriminator}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of every parameter by its name in checkpoints."""
        return {
            of_engine + prefix + name: tuple(parameter.shape)
            for of_engine, engine in {"": self.vae, **self.others}.items()
            for prefix, layer in engine.module.named_layers()
            for name, parameter in layer.named_parameters()
        }


def build_vae_engines(
    config: VaeTrainConfig, process: Process, weights: Callable[[VideoVAE], None] | None = None
) -> VaeEngines:
    """Makes the engines with initial weights.

    Frozen parameters are in the optimizer too, where they stay as they are for want of a gradient: so a checkpoint
    holds all of the VideoVAE, in fp32, whatever is trained.

    Args:
        weights: called to put others in than the initial ones.

    Raises:
        InputError: LPIPS's weights or those that `weights` reads cannot be used, the batch does not split, or the
            device computes bf16 wrong.
        PeerError: or on another rank.
    """
    host, ranks = process.host, process.layout.data
    if config.model.precision == "bf16":
        host.attempt(lambda: check_bf16(config, process.device))
    accumulation = micro_batches(config.data.global_batch_size, config.data.micro_batch_size, ranks)
    vae = initial_video_vae(config.model.videovae(), config.data.seed)
    if weights is not None:
        host.attempt(lambda: weights(vae) if process.rank == 0 else None)  # DeepSpeed sends them to the others
    # DeepSpeed sends parameters as bytes, as which none without dimensions can be seen.
    vae.logvar = nn.Parameter(vae.logvar.detach().view(1))
    path = config.loss.perceptual_weights
    perceptual = None if path is None else host.attempt(lambda: Lpips.load(path)).to(process.device)
    discriminator = None
    if config.gan is not None:
        drawn = int(generator("discriminator", config.data.seed).integers(1 << 62))
        discriminator = PatchDiscriminator(config.gan.width, drawn)
    start = partial(_engine, config, process, accumulation)
    vae_engine = start(
        VaeObjective(vae, config, perceptual, discriminator, partial(_mean_over_ranks, ranks)), config.optimizer
    )
    freeze(vae, spatial=config.model.train == "temporal")
    vae.spatial_vae.recompute = config.model.activation_checkpointing
    if discriminator is None:
        return VaeEngines(vae_engine, None, perceptual)
    optimizer = config.optimizer.model_copy(update={"lr": config.gan.lr})
    return VaeEngines(vae_engine, start(DiscriminatorObjective(discriminator), optimizer, frozen_steps=0), perceptual)


def check_bf16(config: VaeTrainConfig, device: torch.device) -> None:
    """Checks that a device computes the VideoVAE's convolutions in bf16 right; see `check_conv3d`.

    Raises:
        InputError: it does not. On a CPU oneDNN leaves garbage in some of their gradients (seen with torch 2.13).
    """
    if device.type != "cpu":
        height, width = config.data.size
        check_conv3d(device, height=height, width=width, config=config.model.videovae())
    elif torch.backends.mkldnn.enabled:
        raise ConfigError(
            "model.precision = bf16: on a CPU gradients of 3D convolutions in bf16 are wrong; set it to fp32"
        )


def _engine(
    config: VaeTrainConfig,
    process: Process,
    accumulation: int,
    module: nn.Module,
    section: OptimizerSection,
    frozen_steps: int | None = None,
) -> DeepSpeedEngine:
    """The engine of a module, whose learning rate follows the schedule over the steps in which it learns."""
    if frozen_steps is None:
        frozen_steps = 0 if config.gan is None else config.gan.warmup_steps
    schedule: ScheduleSection = config.schedule.model_copy(update={"steps": config.schedule.steps - frozen_steps})
    module.to(process.device, DTYPES[config.model.dtype])
    optimizer = adamw(module.parameters(), section, process.device)
    deepspeed_config = engine_config(
        config.deepspeed,
        dtype=config.model.dtype,
        micro=config.data.micro_batch_size,
        accumulation=accumulation,
        replicas=process.layout.data,
        clipping=config.optimizer.gradient_clipping,
    )
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, schedule))
    return make_engine(module, optimizer, rates, deepspeed_config)


def _mean_over_ranks(ranks: int, value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / ranks
