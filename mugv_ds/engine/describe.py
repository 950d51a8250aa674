"""What a config will run, in words, before any process or device is touched."""

from itertools import pairwise

import torch

from mugv_ds.config.deepspeed import deepspeed_config, gradient_accumulation
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import open_index
from mugv_ds.models.dit import Embedders
from mugv_ds.models.flops import train_flops
from mugv_ds.models.layers import Block, FinalLayer
from mugv_ds.models.memory import GIB, predict_memory
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout
from mugv_ds.parallel.pipeline import stage_boundaries


def layer_parameters(config: DiTConfig) -> list[int]:
    """Parameters of embedders, each block and the final layer."""
    with torch.device("meta"):
        embed, block, final = (
            sum(p.numel() for p in part(config).parameters()) for part in (Embedders, Block, FinalLayer)
        )
    return [embed, *[block] * config.depth, final]


def describe(config: TrainConfig, world_size: int | None) -> str:
    """Layout, parameters and predicted memory by stage, samples, tokens and FLOPs a step, and the merged config.

    Args:
        world_size: processes; None takes as many as the config's layout needs.

    Raises:
        ConfigError: the config cannot run on this many processes. ManifestError: the manifest cannot be used.
    """
    parallel, data, dit = config.parallel, config.data, config.model.dit()
    wanted = (parallel.data or 1) * parallel.sequence * parallel.pipeline
    layout = Layout.fit(parallel, world_size or wanted)
    accumulation = gradient_accumulation(config, layout.data)
    engine = deepspeed_config(config, layout.data)

    shapes = open_index(data.manifest, data.index_dir).shapes()
    largest = patch_grid(*shapes.max(axis=0).tolist()).tokens
    boundaries = stage_boundaries(dit, layout.pipeline, largest, data.max_text_tokens)
    parameters = layer_parameters(dit)
    lines = [
        f"layout: {layout.world_size} processes = data {layout.data} × sequence {layout.sequence} "
        f"× pipeline {layout.pipeline}",
        f"parameters: {sum(parameters):,} ({config.model.preset}, {config.model.precision})",
    ]
    held = data.micro_batch_size * -(-largest // layout.sequence)
    for stage, (first, last) in enumerate(pairwise(boundaries)):
        here = sum(parameters[first:last])
        line = f"  stage {stage}: layers {first}–{last - 1}, {here:,} parameters"
        if config.model.precision == "bf16":
            memory = predict_memory(
                dit,
                parameters=here,
                blocks=last - first - (first == 0) - (last == len(parameters)),
                replicas=layout.replicas,
                tokens_held=held,
                in_flight=min(layout.pipeline - stage, accumulation),
                recompute=parallel.activation_checkpointing,
                fp32_accumulation=engine["data_types"]["grad_accum_dtype"] == "fp32",
                averages=len(config.ema.sigma_rel),
            )
            line += f", about {memory.peak / GIB:.1f} GiB a device at the largest shape"
        lines.append(line)
    lines.append(
        f"samples a step: {data.global_batch_size} = data {layout.data} × accumulation {accumulation} "
        f"× micro-batch {data.micro_batch_size}"
    )
    buckets: dict[tuple[int, ...], int] = {}
    for shape in map(tuple, shapes.tolist()):
        buckets[shape] = buckets.get(shape, 0) + 1
    for shape, rows in sorted(buckets.items()):
        tokens = patch_grid(*shape).tokens
        model, hardware = (
            data.global_batch_size * train_flops(dit, tokens, data.max_text_tokens, recompute) / 1e12
            for recompute in ("off", parallel.activation_checkpointing)
        )
        lines.append(
            f"  latent {'×'.join(map(str, shape))} ({rows} rows): {tokens:,} tokens a sample, "
            f"{tokens * data.global_batch_size:,} a step, {model:,.3f} model TFLOP a step, "
            f"{hardware:,.3f} with what is recomputed"
        )
    return "\n".join([*lines, "config:", config.model_dump_json(indent=2)])
