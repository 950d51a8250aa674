"""What a config will run, in words, before any process or device is touched."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from math import prod
from typing import NamedTuple

import torch

from mugv_ds.config.deepspeed import deepspeed_config
from mugv_ds.config.model import DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.data.buckets import group_by_shape
from mugv_ds.data.manifest import Shape
from mugv_ds.data.plan import Plan, Stream
from mugv_ds.data.run_data import RunData
from mugv_ds.models.dit import Embedders
from mugv_ds.models.flops import SampleCost, step_flops
from mugv_ds.models.layers import Block, FinalLayer
from mugv_ds.models.lora import adapter_shapes
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.models.videovae.vae import WINDOW
from mugv_ds.parallel.layout import Layout, stage_boundaries
from mugv_ds.plan.memory import GIB, Memory, predict_decoding, predict_memory, predict_sampling


def layer_parameters(config: DiTConfig) -> list[int]:
    """Parameters of embedders, each block and the final layer."""
    with torch.device("meta"):
        embed, block, final = (
            sum(p.numel() for p in part(config).parameters()) for part in (Embedders, Block, FinalLayer)
        )
    return [embed, *[block] * config.depth, final]


def trained_parameters(config: TrainConfig) -> list[int]:
    """Those that are trained: adapters alone, or all."""
    dit = config.model.dit()
    if config.lora is None:
        return layer_parameters(dit)
    adapters = sum(prod(shape) for shape in adapter_shapes(dit, config.lora).values())
    return [0, *[adapters // dit.depth] * dit.depth, 0]


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


def describe(config: TrainConfig, world_size: int | None, codec_sizes: Callable[[str], VideoVAEConfig | None]) -> str:
    """Writes down layout, parameters and predicted memory by stage, a step's samples and FLOPs, and the merged config.

    Args:
        world_size: processes; None takes as many as the config's layout needs.
        codec_sizes: `mugv_ds.weights.codec.read_codec_sizes`, for the memory of what is sampled.

    Raises:
        ConfigError: the config cannot run on this many processes. ManifestError: a manifest cannot be used.
        CheckpointError: `preview.codec` or `evaluation.codec` is no codec.
    """
    parallel = config.parallel
    wanted = (parallel.data or 1) * parallel.sequence * parallel.pipeline
    layout = Layout.fit(parallel, world_size or wanted)
    data = RunData(config, SampleCost.of(config), layout.data)
    buckets = buckets_of(data.plan, layout.data)
    parameters, trained = layer_parameters(config.model.dit()), trained_parameters(config)
    adapters = f", and {sum(trained):,} of the adapters, which alone are trained" if config.lora is not None else ""
    lines = [
        f"layout: {layout.world_size} processes = data {layout.data} × sequence {layout.sequence} "
        f"× pipeline {layout.pipeline}",
        f"parameters: {sum(parameters):,} ({config.model.preset}, {config.model.precision}){adapters}",
        *_stage_lines(config, layout, data.typical_shape, buckets, parameters, trained),
        *(_bucket_line(config, layout, bucket) for bucket in buckets),
        *(
            line
            for what in _sampled(config, data)
            for line in _sampled_line(config, layout, data, parameters, trained, codec_sizes, what)
        ),
    ]
    return "\n".join([*lines, "config:", config.model_dump_json(indent=2)])


def _stage_lines(
    config: TrainConfig,
    layout: Layout,
    typical_shape: Shape,
    buckets: list[Bucket],
    parameters: list[int],
    trained: list[int],
) -> Iterator[str]:
    """A line for each pipeline stage: its layers, their parameters and, in bf16, the predicted memory of a device."""
    dit, tokens = config.model.dit(), patch_grid(*typical_shape).tokens

    boundaries = stage_boundaries(dit, layout.pipeline, tokens, config.data.max_text_tokens)
    for stage, (first, last) in enumerate(pairwise(boundaries)):
        here = sum(parameters[first:last])
        line = f"  stage {stage}: layers {first}–{last - 1}, {here:,} parameters"
        if config.model.precision == "bf16":
            blocks = last - first - (first == 0) - (last == len(parameters))
            peaks = (
                _memory(
                    config,
                    layout,
                    **_split(config, here, sum(trained[first:last])),
                    blocks=blocks,
                    tokens_held=bucket.micro * -(-bucket.tokens // layout.sequence),
                    in_flight=min(layout.pipeline - stage, bucket.accumulation),
                ).peak
                for bucket in buckets
            )
            line += f", about {max(peaks) / GIB:.1f} GiB a device at the largest shape"
        else:  # fp8 linears keep their inputs beside, and fp32 doubles what is kept
            line += f", memory not predicted in {config.model.precision}"
        yield line


def _split(config: TrainConfig, parameters: int, trained: int) -> dict[str, int]:
    """Returns how many of a stage's parameters are trained and how many are frozen, for `predict_memory`."""
    return {"parameters": trained, "frozen": 0 if config.lora is None else parameters}


def _memory(config: TrainConfig, layout: Layout, **stage: int) -> Memory:
    """Predicts the memory of a device of one stage; see `predict_memory`."""
    accumulation = deepspeed_config(config, layout.data)["data_types"]["grad_accum_dtype"]
    return predict_memory(
        config.model.dit(),
        **stage,
        replicas=layout.replicas,
        recompute=config.parallel.activation_checkpointing,
        fp32_accumulation=accumulation == "fp32",
        averages=len(config.ema.sigma_rel) + (config.reward is not None),  # the old policy is one too
    )


class Sampled(NamedTuple):
    """Videos that a run samples. shapes: latent (T, H, W) of the rows. batch: of a replica. codec: path, or None."""

    name: str
    shapes: list[Shape]
    batch: int
    codec: str | None


def _sampled(config: TrainConfig, data: RunData) -> Iterator[Sampled]:
    for key, index in (("preview", data.previewed), ("evaluation", data.evaluated)):
        if index is not None:
            section = config.sampled[key]
            rows = index.shapes()[: section.count].tolist()
            yield Sampled(f"{key}s", list(map(tuple, rows)), 1, section.codec)
    if data.prompts is not None:
        shapes = list(data.prompts.buckets().by_shape)
        yield Sampled("rollouts", shapes, config.reward.sample_batch, config.reward.codec)


def _sampled_line(
    config: TrainConfig,
    layout: Layout,
    data: RunData,
    parameters: list[int],
    trained: list[int],
    codec_sizes: Callable[[str], VideoVAEConfig | None],
    what: Sampled,
) -> Iterator[str]:
    """A line with the predicted memory of videos: of a device of the largest stage."""
    dit, vae = config.model.dit(), None if what.codec is None else codec_sizes(what.codec)
    shape = max(what.shapes, key=lambda shape: patch_grid(*shape).tokens)
    tokens = patch_grid(*shape).tokens
    line = f"  {what.name}, latent {'×'.join(map(str, shape))} at most: {tokens:,} tokens"
    if config.model.precision != "bf16":
        yield f"{line}; memory not predicted in {config.model.precision}"
        return
    boundaries = stage_boundaries(
        dit, layout.pipeline, patch_grid(*data.typical_shape).tokens, config.data.max_text_tokens
    )
    resident = max(
        _memory(
            config,
            layout,
            **_split(config, sum(parameters[first:last]), sum(trained[first:last])),
            blocks=0,
            tokens_held=0,
            in_flight=0,
        ).resident
        for first, last in pairwise(boundaries)
    )
    sampling = resident + predict_sampling(dit, tokens_held=what.batch * -(-tokens // layout.sequence))
    line += f", about {sampling / GIB:.1f} GiB a device while they are sampled"
    if vae is not None:
        decoding = resident + predict_decoding(vae, parameters=vae_parameters(vae), latent=shape, window=WINDOW)
        line += f" and {decoding / GIB:.1f} while the VideoVAE decodes them"
    yield line


def vae_parameters(config: VideoVAEConfig) -> int:
    """Parameters of a VideoVAE."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in VideoVAE(config).parameters())


def _bucket_line(config: TrainConfig, layout: Layout, bucket: Bucket) -> str:
    """What a step of one latent shape holds and costs."""
    model, hardware = (flops / 1e12 for flops in step_flops(config, bucket.shape, samples=bucket.samples, companions=0))
    return (
        f"  {bucket.stream}, latent {'×'.join(map(str, bucket.shape))} ({bucket.items} rows or pairs): "
        f"{bucket.tokens:,} tokens a sample; samples a step: {bucket.samples} = data {layout.data} × accumulation "
        f"{bucket.accumulation} × micro-batch {bucket.micro}; {bucket.tokens * bucket.samples:,} tokens, "
        f"{model:,.3f} model TFLOP a step, {hardware:,.3f} with what runs again"
    )
