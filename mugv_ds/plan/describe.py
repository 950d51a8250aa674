"""What a config will run, in words, before any process or device is touched."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch

from mugv_ds.config.deepspeed import deepspeed_config
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.run_data import RunData
from mugv_ds.models.dit import Embedders
from mugv_ds.models.flops import SampleCost, step_flops
from mugv_ds.models.layers import Block, FinalLayer
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout, stage_boundaries
from mugv_ds.plan.memory import GIB, predict_memory


def layer_parameters(config: DiTConfig) -> list[int]:
    """Parameters of embedders, each block and the final layer."""
    with torch.device("meta"):
        embed, block, final = (
            sum(p.numel() for p in part(config).parameters()) for part in (Embedders, Block, FinalLayer)
        )
    return [embed, *[block] * config.depth, final]


class Bucket(NamedTuple):
    """The steps of one latent shape of a stream. items: in the stream. samples: of a step, without companions."""

    stream: str
    shape: Shape
    items: int
    tokens: int
    samples: int
    micro: int
    accumulation: int

    @classmethod
    def of(cls, stream: Stream, shape: Shape, data_ranks: int) -> "Bucket":
        size = stream.sizes[shape]
        items = int((stream.shapes == shape).all(axis=1).sum())
        samples, micro = stream.item_size * size.step, stream.item_size * size.micro
        tokens = patch_grid(*shape).tokens
        return cls(stream.name, shape, items, tokens, samples, micro, samples // micro // data_ranks)


def buckets_of(plan: Plan, data_ranks: int) -> list[Bucket]:
    """By stream and shape."""
    return [
        Bucket.of(stream, shape, data_ranks) for stream in plan.streams for shape in group_by_shape(stream.shapes)[0]
    ]


def describe(config: TrainConfig, world_size: int | None) -> str:
    """Writes down layout, parameters and predicted memory by stage, a step's samples and FLOPs, and the merged config.

    Args:
        world_size: processes; None takes as many as the config's layout needs.

    Raises:
        ConfigError: the config cannot run on this many processes. ManifestError: a manifest cannot be used.
    """
    parallel = config.parallel
    wanted = (parallel.data or 1) * parallel.sequence * parallel.pipeline
    layout = Layout.fit(parallel, world_size or wanted)
    data = RunData(config, SampleCost.of(config), layout.data)
    buckets = buckets_of(data.plan, layout.data)
    parameters = layer_parameters(config.model.dit())
    lines = [
        f"layout: {layout.world_size} processes = data {layout.data} × sequence {layout.sequence} "
        f"× pipeline {layout.pipeline}",
        f"parameters: {sum(parameters):,} ({config.model.preset}, {config.model.precision})",
        *_stage_lines(config, layout, data.typical_shape, buckets, parameters),
        *(_bucket_line(config, layout, bucket) for bucket in buckets),
    ]
    return "\n".join([*lines, "config:", config.model_dump_json(indent=2)])


def _stage_lines(
    config: TrainConfig, layout: Layout, typical_shape: Shape, buckets: list[Bucket], parameters: list[int]
) -> Iterator[str]:
    """A line for each pipeline stage: its layers, their parameters and, in bf16, the predicted memory of a device."""
    dit, tokens = config.model.dit(), patch_grid(*typical_shape).tokens

    boundaries = stage_boundaries(dit, layout.pipeline, tokens, config.data.max_text_tokens)
    for stage, (first, last) in enumerate(pairwise(boundaries)):
        here = sum(parameters[first:last])
        line = f"  stage {stage}: layers {first}–{last - 1}, {here:,} parameters"
        if config.model.precision == "bf16":
            accumulation = deepspeed_config(config, layout.data)["data_types"]["grad_accum_dtype"]
            peaks = (
                predict_memory(
                    dit,
                    parameters=here,
                    blocks=last - first - (first == 0) - (last == len(parameters)),
                    replicas=layout.replicas,
                    tokens_held=bucket.micro * -(-bucket.tokens // layout.sequence),
                    in_flight=min(layout.pipeline - stage, bucket.accumulation),
                    recompute=config.parallel.activation_checkpointing,
                    fp32_accumulation=accumulation == "fp32",
                    averages=len(config.ema.sigma_rel),
                ).peak
                for bucket in buckets
            )
            line += f", about {max(peaks) / GIB:.1f} GiB a device at the largest shape"
        else:  # fp8 linears keep their inputs beside, and fp32 doubles what is kept
            line += f", memory not predicted in {config.model.precision}"
        yield line


def _bucket_line(config: TrainConfig, layout: Layout, bucket: Bucket) -> str:
    """What a step of one latent shape holds and costs."""
    model, hardware = (flops / 1e12 for flops in step_flops(config, bucket.shape, samples=bucket.samples, companions=0))
    return (
        f"  {bucket.stream}, latent {'×'.join(map(str, bucket.shape))} ({bucket.items} rows or pairs): "
        f"{bucket.tokens:,} tokens a sample; samples a step: {bucket.samples} = data {layout.data} × accumulation "
        f"{bucket.accumulation} × micro-batch {bucket.micro}; {bucket.tokens * bucket.samples:,} tokens, "
        f"{model:,.3f} model TFLOP a step, {hardware:,.3f} with what runs again"
    )
