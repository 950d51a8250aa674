"""What a config will run, in words, before any process or device is touched."""

from itertools import pairwise
from typing import NamedTuple

import torch

from mugv_ds.config.deepspeed import deepspeed_config
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.readers import Sources
from mugv_ds.data.run_data import flow_reader, make_plan, open_manifests, preference_reader
from mugv_ds.models.dit import Embedders
from mugv_ds.models.flops import train_flops
from mugv_ds.models.layers import Block, FinalLayer
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout
from mugv_ds.parallel.pipeline import stage_boundaries
from mugv_ds.plan.memory import GIB, predict_memory


def layer_parameters(config: DiTConfig) -> list[int]:
    """Parameters of embedders, each block and the final layer."""
    with torch.device("meta"):
        embed, block, final = (
            sum(p.numel() for p in part(config).parameters()) for part in (Embedders, Block, FinalLayer)
        )
    return [embed, *[block] * config.depth, final]


class Bucket(NamedTuple):
    """The steps of one latent shape of a stream. units: in the stream. samples: of a step, without companions."""

    stream: str
    shape: Shape
    units: int
    tokens: int
    samples: int
    micro: int
    accumulation: int

    @classmethod
    def of(cls, stream: Stream, shape: Shape, data_ranks: int) -> "Bucket":
        size = stream.sizes[shape]
        units = int((stream.shapes == shape).all(axis=1).sum())
        samples, micro = stream.unit * size.step, stream.unit * size.micro
        tokens = patch_grid(*shape).tokens
        return cls(stream.name, shape, units, tokens, samples, micro, samples // micro // data_ranks)


def buckets_of(plan: Plan, data_ranks: int) -> list[Bucket]:
    """By stream and shape."""
    return [
        Bucket.of(stream, shape, data_ranks) for stream in plan.streams for shape in group_by_shape(stream.shapes)[0]
    ]


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
    engine = deepspeed_config(config, layout.data)
    manifests = open_manifests(config)
    annotated = (preference_reader(config, index) for index in manifests.sources)
    readers = Sources((flow_reader(config, manifests.train), *annotated))
    plan = make_plan(config, manifests, readers, layout.data)

    largest = patch_grid(*manifests.typical_shape).tokens
    boundaries = stage_boundaries(dit, layout.pipeline, largest, data.max_text_tokens)
    parameters = layer_parameters(dit)
    lines = [
        f"layout: {layout.world_size} processes = data {layout.data} × sequence {layout.sequence} "
        f"× pipeline {layout.pipeline}",
        f"parameters: {sum(parameters):,} ({config.model.preset}, {config.model.precision})",
    ]
    buckets = buckets_of(plan, layout.data)
    for stage, (first, last) in enumerate(pairwise(boundaries)):
        here = sum(parameters[first:last])
        line = f"  stage {stage}: layers {first}–{last - 1}, {here:,} parameters"
        if config.model.precision == "bf16":
            peaks = (
                predict_memory(
                    dit,
                    parameters=here,
                    blocks=last - first - (first == 0) - (last == len(parameters)),
                    replicas=layout.replicas,
                    tokens_held=bucket.micro * -(-bucket.tokens // layout.sequence),
                    in_flight=min(layout.pipeline - stage, bucket.accumulation),
                    recompute=parallel.activation_checkpointing,
                    fp32_accumulation=engine["data_types"]["grad_accum_dtype"] == "fp32",
                    averages=len(config.ema.sigma_rel),
                ).peak
                for bucket in buckets
            )
            line += f", about {max(peaks) / GIB:.1f} GiB a device at the largest shape"
        lines.append(line)
    for bucket in buckets:
        model, hardware = (
            bucket.samples * train_flops(dit, bucket.tokens, data.max_text_tokens, recompute) / 1e12
            for recompute in ("off", parallel.activation_checkpointing)
        )
        lines.append(
            f"  {bucket.stream}, latent {'×'.join(map(str, bucket.shape))} ({bucket.units} rows or pairs): "
            f"{bucket.tokens:,} tokens a sample; samples a step: {bucket.samples} = data {layout.data} × accumulation "
            f"{bucket.accumulation} × micro-batch {bucket.micro}; {bucket.tokens * bucket.samples:,} tokens, "
            f"{model:,.3f} model TFLOP a step, {hardware:,.3f} with what is recomputed"
        )
    return "\n".join([*lines, "config:", config.model_dump_json(indent=2)])
