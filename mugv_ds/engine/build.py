"""One place that starts DeepSpeed: the process group, the stage of this rank, the optimizer, the engine."""

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.engine import PipelineEngine

from mugv_ds.config.deepspeed import deepspeed_config
from mugv_ds.config.errors import ConfigError, PeerError
from mugv_ds.config.schema import OptimizerSection, TrainConfig
from mugv_ds.engine.objective import Objective
from mugv_ds.engine.process import Agreement, check_same_config
from mugv_ds.engine.schedule import rate_factor
from mugv_ds.models.attention import (
    BACKENDS,
    MASKED_BACKENDS,
    Attention,
    MaskedAttention,
    installed_backends,
    installed_masked_backends,
)
from mugv_ds.models.choose_attention import Trial, choose_attention, choose_masked_attention
from mugv_ds.models.fp8 import check_fp8, use_fp8
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout, Place, sequence_group
from mugv_ds.parallel.pipeline import DiTPipeline, stage_boundaries
from mugv_ds.parallel.ulysses import Ulysses

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_AFTER_WATCHDOG = timedelta(minutes=5)
MAX_BUCKETS = 64  # shapes that a compiled segment may be compiled for

T = TypeVar("T")


@dataclass(frozen=True)
class Process:
    """This process among all.

    Attributes:
        rank: global. layout, place: of all ranks, and of this one in it. device: that it computes on.
        group: the ranks that share a sequence; None where it is not shared.
        agreement: what all ranks exchange on the host.
    """

    rank: int
    layout: Layout
    place: Place
    device: torch.device
    group: dist.ProcessGroup | None
    agreement: Agreement

    @property
    def sequence_source(self) -> int:
        """The global rank that reads for this one's sequence group."""
        return self.rank - self.place.sequence

    def first(self, function: Callable[[], T]) -> T:
        """What `function` gives on rank 0, on all ranks; of the types that JSON has.

        Raises:
            PeerError: on the others, when it failed on rank 0.
        """
        value, failure = None, None
        if self.rank == 0:
            try:
                value = function()
            except Exception as error:
                failure = error
        self.agreement.fail_together(failure)
        return self.agreement.values(value)[0]

    def first_then_all(self, function: Callable[[], T]) -> T:
        """Calls `function` on rank 0, and then, what it prepared being there, on the others.

        Raises:
            PeerError: on the others, when it failed on rank 0.
        """
        failure = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as error:
                failure = error
        failed = torch.tensor([failure is not None], dtype=torch.int32, device=self.device)
        dist.broadcast(failed, 0)
        if failure is not None:
            raise failure
        if failed.item():
            raise PeerError("rank 0 failed, and says why")
        return result if self.rank == 0 else function()


def start_process(config: TrainConfig) -> Process:
    """Joins the process group that the launcher describes in the environment.

    Raises:
        ConfigError: the layout does not fit the number of processes, or the ranks' configs differ.
        PeerError: another rank's config differs.
    """
    # DeepSpeed 0.19 calls a collective that torch 2.13 has renamed, and every rank would say so.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    device = torch.device(accelerator.device_name(local_rank))
    if device.type == "cpu":
        # Its shared-memory collectives would be compiled at start; gloo does what a CPU run needs.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        local_processes = int(os.environ.get("LOCAL_SIZE", os.environ["WORLD_SIZE"]))
        torch.set_num_threads(max((os.cpu_count() or 1) // local_processes, 1))
    else:
        accelerator.set_device(local_rank)
    # Later than the watchdog, which can say who holds the run up.
    timeout = timedelta(seconds=config.guard.timeout_s) + _AFTER_WATCHDOG
    deepspeed.init_distributed("gloo" if device.type == "cpu" else "nccl", verbose=False, timeout=timeout)
    agreement = Agreement(dist.new_group(backend="gloo", timeout=timeout))
    check_same_config(config, agreement)
    layout = Layout.fit(config.parallel, int(os.environ["WORLD_SIZE"]))
    rank = dist.get_rank()
    return Process(rank, layout, layout.place(rank), device, sequence_group(layout, rank), agreement)


def build_engine(
    config: TrainConfig,
    process: Process,
    shape: tuple[int, int, int],
    weights: Callable[[list[tuple[str, torch.nn.Module]]], None] | None = None,
) -> PipelineEngine:
    """The DeepSpeed engine around this rank's `DiTPipeline`.

    Args:
        shape: latent (T, H, W) of a typical sample, by whose cost the stages are balanced.
        weights: called with the stage's layers (`DiTPipeline.named_layers`) to put other weights than the initial in.

    Raises:
        ConfigError: fp8 is asked for and cannot run here. PeerError: or on another rank.
    """
    layout, dit = process.layout, config.model.dit()
    if config.model.precision == "fp8":
        failure = None
        try:
            check_fp8(process.device)
        except ConfigError as error:
            failure = error
        process.agreement.fail_together(failure)
    objective = Objective(config.preference, process.group, layout.sequence)
    module = DiTPipeline(
        dit,
        layout=layout,
        boundaries=stage_boundaries(dit, layout.pipeline, patch_grid(*shape).tokens, config.data.max_text_tokens),
        ulysses=Ulysses(process.group, layout.sequence, process.place.sequence, pick_attention(config, process, shape)),
        loss=objective,
        terms=objective.terms,
        recompute=config.parallel.activation_checkpointing,
        seed=config.data.seed,
        dtype=DTYPES[config.model.dtype],
        device=process.device,
    )
    if config.model.precision == "fp8":
        for block in module.blocks:
            use_fp8(block)
    cross_attention = pick_cross_attention(config, process, shape)
    for block in module.blocks:
        block.cross_attn.attend = cross_attention
    if config.model.compile:
        torch._dynamo.config.recompile_limit = MAX_BUCKETS
        for block in module.blocks:
            block.compile_segments()
    if weights is not None:
        weights(module.named_layers())
    optimizer = adamw(module.parameters(), config.optimizer, process.device)
    engine, *_ = deepspeed.initialize(
        model=module,
        optimizer=optimizer,
        lr_scheduler=torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, config.schedule)),
        config=deepspeed_config(config, layout.data),
    )
    return engine


def pick_attention(config: TrainConfig, process: Process, shape: tuple[int, int, int]) -> Attention:
    """The attention that the config names or, with "auto", the fastest right one on rank 0; the same on all ranks."""
    if config.model.attention != "auto":
        return BACKENDS[config.model.attention]
    return _first_rank_picks(
        process,
        "self-attention",
        BACKENDS,
        lambda: choose_attention(
            installed_backends(process.device),
            tokens=patch_grid(*shape).tokens,
            heads=config.model.dit().num_heads // process.layout.sequence,
            dtype=DTYPES[config.model.dtype],
            device=process.device,
        ),
    )


def pick_cross_attention(config: TrainConfig, process: Process, shape: tuple[int, int, int]) -> MaskedAttention:
    """The fastest right attention to the caption on rank 0; the same on all ranks."""
    return _first_rank_picks(
        process,
        "cross-attention",
        MASKED_BACKENDS,
        lambda: choose_masked_attention(
            installed_masked_backends(process.device),
            tokens=-(-patch_grid(*shape).tokens // process.layout.sequence),
            text_tokens=config.data.max_text_tokens,
            heads=config.model.dit().num_heads,
            dtype=DTYPES[config.model.dtype],
            device=process.device,
        ),
    )


def _first_rank_picks(
    process: Process, title: str, backends: dict[str, T], choose: Callable[[], tuple[str, list[Trial]]]
) -> T:
    """The backend that `choose` names on rank 0, which prints the trials."""
    names = list(backends)
    chosen = torch.zeros((), dtype=torch.int32, device=process.device)
    if process.rank == 0:
        name, trials = choose()
        print("\n".join([f"{title}, forward and backward:", *map(str, trials), f"taken: {name}"]), flush=True)
        chosen.fill_(names.index(name))
    dist.broadcast(chosen, 0)
    return backends[names[chosen.item()]]


def adamw(parameters, section: OptimizerSection, device: torch.device) -> torch.optim.AdamW:
    """AdamW; on a GPU as one fused kernel."""
    return torch.optim.AdamW(
        list(parameters),
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=device.type == "cuda",
    )
