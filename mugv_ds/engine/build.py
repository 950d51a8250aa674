"""One place that starts DeepSpeed: the process group, the stage of this rank, the optimizer, the engine."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import nn

from mugv_ds.config.deepspeed import deepspeed_config, gradient_accumulation
from mugv_ds.config.schema import OptimizerSection, TrainConfig
from mugv_ds.engine.distributed_optimizer import make_engine
from mugv_ds.engine.objective import Objective
from mugv_ds.engine.process import Process
from mugv_ds.engine.schedule import rate_factor
from mugv_ds.models.attention import Attention, MaskedAttention
from mugv_ds.models.choose_attention import fastest_masked_attention, named_attention
from mugv_ds.models.compile import SHAPES, compile_blocks
from mugv_ds.models.fp8 import check_fp8, use_fp8
from mugv_ds.models.kept_attention import KeptAttention, check_kept, statistics_of
from mugv_ds.models.matrices import chunks_of, rate_multiplier
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import stage_boundaries
from mugv_ds.parallel.offload import Offload
from mugv_ds.parallel.pipeline import DiTPipeline
from mugv_ds.parallel.ulysses import Ulysses

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def build_engine(
    config: TrainConfig,
    process: Process,
    shape: tuple[int, int, int],
    weights: Callable[[list[tuple[str, torch.nn.Module]]], None] | None = None,
    shapes: int = SHAPES,
) -> PipelineEngine:
    """Makes the DeepSpeed engine around this rank's `DiTPipeline`.

    Args:
        shape: latent (T, H, W) of a typical sample, by whose cost the stages are balanced.
        weights: called with the stage's layers (`DiTPipeline.named_layers`) to put other weights than the initial in.
        shapes: number of latent shapes of the run, held-out and previewed ones too, for `model.compile`.

    Raises:
        ConfigError: fp8 is asked for and cannot run here. PeerError: or on another rank.
    """
    if config.model.precision == "fp8":
        process.host.attempt(lambda: check_fp8(process.device, config.model.fp8_backend))
    module = build_stage(config, process, shape)
    if config.model.precision == "fp8":
        put_in_fp8(module, config, process.layout.data)
    if config.model.compile:
        switched = config.lora is not None and config.preference is not None  # blocks run with adapters on and off
        compile_blocks(module.blocks, shapes * 2 if switched else shapes)
    if weights is not None:
        # One replica of each stage reads them; DeepSpeed sends them to the others.
        reads = process.coordinates.data == process.coordinates.sequence == 0
        process.host.attempt(lambda: weights(module.named_layers()) if reads else None)
    optimizer = make_optimizer(module.named_layers(), config.optimizer, config.widths, process.device)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(rate_factor, config.schedule))
    return make_engine(module, optimizer, schedule, deepspeed_config(config, process.layout.data))


def put_in_fp8(module: DiTPipeline, config: TrainConfig, replicas: int) -> None:
    """Puts those of a stage's blocks into fp8 that the config names.

    Weights are rounded once a step where it has several micro-batches.
    """
    keeps_weights = config.data.budget is not None or gradient_accumulation(config, replicas) > 1
    for number, block in enumerate(module.blocks, start=module.first_block):
        if number in config.model.blocks_in_fp8():
            use_fp8(block, config.model.fp8_backend, keeps_weights)


def build_stage(config: TrainConfig, process: Process, shape: tuple[int, int, int]) -> DiTPipeline:
    """Makes this rank's stage with its initial weights, and chooses how it attends; see `build_engine`."""
    layout, dit = process.layout, config.model.dit()
    objective = Objective(config.preference, config.reward, process.group, layout.sequence)
    attention = pick_attention(config, process, shape)
    module = DiTPipeline(
        dit,
        layout=layout,
        boundaries=stage_boundaries(dit, layout.pipeline, patch_grid(*shape).tokens, config.data.max_text_tokens),
        ulysses=Ulysses(process.group, layout.sequence, process.coordinates.sequence, attention),
        loss=objective,
        terms=objective.terms,
        recompute=config.parallel.levels(dit.depth),
        lora=config.lora,
        seed=config.data.seed,
        widths=config.widths,
        dtype=DTYPES[config.model.dtype],
        device=process.device,
    )
    if config.parallel.offload != "none":
        offload = Offload(process.device)
        for block in module.blocks:
            block.keep, block.keep_input = offload.keep, config.parallel.offload == "all"
    cross_attention = pick_cross_attention(config, process, shape)
    for block in module.blocks:
        block.cross_attn.attend = cross_attention
    return module


def pick_attention(config: TrainConfig, process: Process, shape: tuple[int, int, int]) -> Attention:
    """Returns the attention that the config names or, with "auto", the fastest right one on rank 0, on all ranks.

    Raises:
        ConfigError: the recompute level keeps what the backend that is named does not give.
    """
    levels, name = config.parallel.levels(config.model.dit().depth), config.model.attention
    backends = None
    if "attention" in levels:
        check_kept(name, process.device)
        backends = {name: KeptAttention(of) for name, of in statistics_of(process.device).items()}
    return named_attention(
        name,
        backends=backends,
        tokens=patch_grid(*shape).tokens,
        heads=config.model.dit().num_heads // process.layout.sequence,
        dtype=DTYPES[config.model.dtype],
        device=process.device,
        first=process.host.first,
    )


def pick_cross_attention(config: TrainConfig, process: Process, shape: tuple[int, int, int]) -> MaskedAttention:
    """Returns the fastest right attention to the caption on rank 0, on all ranks."""
    return fastest_masked_attention(
        tokens=-(-patch_grid(*shape).tokens // process.layout.sequence),
        text_tokens=config.data.max_text_tokens,
        heads=config.model.dit().num_heads,
        dtype=DTYPES[config.model.dtype],
        device=process.device,
        first=process.host.first,
    )


def make_optimizer(
    layers: Iterable[tuple[str, nn.Module]],
    section: OptimizerSection,
    widths: tuple[int, int] | None,
    device: torch.device,
) -> torch.optim.AdamW:
    """Makes the optimizer of a stage, with a group for each of its learning rates, of which Muon has one at most.

    What Muon moves, and how rates follow the width, is in `models.matrices`. A step's decay, rate · weight_decay, stays
    what it is at the width that the rate was tuned at, as in the released code of Yang et al. 2022.

    Args:
        layers: each with the prefix of its names. widths: of the model, and that which the rate was tuned at; None:
            nothing follows the width.
    """
    groups: dict[tuple[bool, float], dict[nn.Parameter, int | None]] = {}
    for prefix, layer in layers:
        for name, parameter in layer.named_parameters():
            if parameter.requires_grad:
                chunks = chunks_of(prefix + name) if section.kind == "muon" else None
                mover = "adamw" if chunks is None else section.muon_scale
                multiplier = rate_multiplier(prefix + name, mover, *widths) if widths else 1.0
                groups.setdefault((chunks is not None, multiplier), {})[parameter] = chunks
    given = []
    for (is_muon, multiplier), chunks in sorted(groups.items(), key=_as_gradients_leave):
        base = section.lr if is_muon or section.kind == "adamw" else section.adamw_lr or section.lr
        group = {"params": list(chunks), "lr": base * multiplier, "weight_decay": section.weight_decay / multiplier}
        if is_muon:
            group |= {"chunks": chunks, "momentum": section.muon_momentum, "scale": section.muon_scale}
        given.append(group)
    return adamw(given, section, device)


def _as_gradients_leave(group: tuple[tuple[bool, float], Any]) -> tuple[bool, bool]:
    """Sorts the groups of `make_optimizer` as their gradients are reduced: last those that the embedders are among."""
    is_muon, multiplier = group[0]
    return not is_muon and multiplier == 1.0, not is_muon


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
