"""What a config will run, in words, before any process or device is touched."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from mugv_ds.config.errors import InputError
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.videovae import VideoVAEConfig
from mugv_ds.data.manifest import Shape
from mugv_ds.data.run_data import RunData
from mugv_ds.models.flops import card_peak_tflops, step_flops
from mugv_ds.models.rope import patch_grid
from mugv_ds.models.videovae import VideoVAE
from mugv_ds.models.videovae.vae import WINDOW
from mugv_ds.parallel.layout import Layout
from mugv_ds.plan.calibration import Calibration, calibration_of
from mugv_ds.plan.cost import Setup, layer_parameters, sample_cost, step_time, trained_parameters
from mugv_ds.plan.levels import fill_device, with_levels
from mugv_ds.plan.memory import GIB, Memory, predict_decoding, predict_sampling
from mugv_ds.plan.steps import Bucket, Kind, expected_shapes, given_kinds, kinds_of, missing_manifests
from mugv_ds.plan.timing import Timing

_SHOWN_SHARE = 0.005  # of a step's time, below which a term is not named


def describe(
    config: TrainConfig,
    world_size: int | None,
    codec_sizes: Callable[[str], VideoVAEConfig | None],
    card: str | None = None,
) -> str:
    """Writes down layout, parameters, predicted memory and time, a step's samples and FLOPs, and the merged config.

    Where manifests are missing, that is said and the steps are those of the shape of `data.budget`, or else of the
    published model's.

    Args:
        world_size: processes; None takes as many as the config's layout needs.
        codec_sizes: `mugv_ds.weights.codec.read_codec_sizes`, for the memory of what is sampled.
        card: name of the device; None takes that of `data.budget.machine`, or of the first calibration that is shipped.

    Raises:
        ConfigError: the config cannot run on this many processes. ManifestError: a manifest cannot be used.
        CheckpointError: `preview.codec` or `evaluation.codec` is no codec.
    """
    parallel = config.parallel
    wanted = (parallel.data or 1) * parallel.sequence * parallel.pipeline
    layout = Layout.fit(parallel, world_size or wanted)
    data, missing = None, missing_manifests(config)
    cost = sample_cost(config)
    if missing:
        kinds = given_kinds(config, expected_shapes(config))
    else:
        data = RunData(config, cost, layout.data)
        kinds = kinds_of(data.plan, config.schedule.steps)
    buckets = [kind.bucket(config, config.data, cost, layout.data) for kind in kinds]
    typical = typical_shape(kinds, cost.cost) if data is None else data.typical_shape
    setup = Setup.of(config, layout, typical)
    if config.parallel.activation_checkpointing == "auto":
        calibration = _calibration(config, card)
        memory, timing = (calibration.machine.memory_bytes, Timing(calibration)) if calibration else (None, None)
        config = with_levels(config, fill_device(config, setup, buckets, memory, timing))
        setup = Setup.of(config, layout, typical)
    trained = sum(trained_parameters(config))
    adapters = f", and {trained:,} of the adapters, which alone are trained" if config.lora is not None else ""
    lines = [
        f"layout: {layout.world_size} processes = data {layout.data} × sequence {layout.sequence} "
        f"× pipeline {layout.pipeline}",
        f"recomputes: {setup.level}",
        f"parameters: {sum(layer_parameters(setup.dit)):,} ({config.model.preset}, {config.model.precision}){adapters}",
        *_missing_lines(config, missing),
        *_stage_lines(config, setup, buckets),
        *(_bucket_line(config, layout, bucket) for bucket in buckets),
        *_time_lines(config, setup, buckets, card),
        *(
            line
            for what in (() if data is None else _sampled(config, data))
            for line in _sampled_line(config, setup, codec_sizes, what)
        ),
    ]
    return "\n".join([*lines, "config:", config.model_dump_json(indent=2)])


def typical_shape(kinds: Iterable[Kind], cost: Callable[[Shape], float]) -> Shape:
    """Returns the shape whose sample costs the most, as `RunData.typical_shape` does."""
    return max(sorted({kind.shape for kind in kinds}), key=cost)


def _missing_lines(config: TrainConfig, missing: list[str]) -> Iterator[str]:
    """Says what is not there, and what is taken in its place."""
    if missing:
        source = "of data.budget" if config.data.budget is not None else "of the published model (720p, 5 s)"
        shapes = ", ".join("×".join(map(str, shape)) for shape in expected_shapes(config))
        yield f"  missing: {', '.join(missing)}; what follows is for the shape {source}, latent {shapes}"


def _stage_lines(config: TrainConfig, setup: Setup, buckets: list[Bucket]) -> Iterator[str]:
    """A line for each pipeline stage: its layers, their parameters and, in bf16, the predicted memory of a device."""
    for stage in setup.stages:
        line = f"  stage {stage.number}: layers {stage.first}–{stage.last - 1}, {stage.parameters:,} parameters"
        if config.model.precision == "bf16":
            memory = setup.memory(stage, buckets)
            line += f", about {memory.peak / GIB:.1f} GiB a device at the largest shape ({_parts(memory)})"
            if setup.offload != "none":
                line += f", and {memory.host / GIB:.1f} GiB of host memory"
        else:  # fp8 linears keep their inputs beside, and fp32 doubles what is kept
            line += f", memory not predicted in {config.model.precision}"
        yield line


def _parts(memory: Memory) -> str:
    return ", ".join(f"{name} {size / GIB:.1f}" for name, size in memory.parts().items() if size / GIB >= 0.05)


def _calibration(config: TrainConfig, card: str | None) -> Calibration | None:
    """That of the card; without one that of `data.budget.machine`, or the first that is shipped."""
    return calibration_of(card, config.data.budget.machine if config.data.budget is not None and card is None else None)


def _time_lines(config: TrainConfig, setup: Setup, buckets: list[Bucket], card: str | None) -> Iterator[str]:
    """A line for each kind of step with its predicted time, where a calibration says it."""
    if config.model.precision != "bf16":
        yield f"  time not predicted in {config.model.precision}"
        return
    calibration = _calibration(config, card)
    if calibration is None:
        yield f"  time not predicted: no calibration of {card or 'any machine'} is shipped; `make calibrate` makes one"
        return
    try:
        times = [step_time(setup, bucket, Timing(calibration)) for bucket in buckets]
    except InputError as error:
        yield f"  time not predicted: {error}"
        return
    name = calibration.machine.device
    for bucket, time in zip(buckets, times, strict=True):
        flops = step_flops(
            config, bucket.shape, samples=bucket.samples + bucket.companions, companions=bucket.companions
        )
        tokens = (bucket.samples + bucket.companions) * bucket.tokens / time.total
        line = (
            f"  {bucket.stream}, latent {'×'.join(map(str, bucket.shape))}: about {time.total:.3g} s a step on {name}"
        )
        line += f", {tokens:,.0f} tokens/s"
        peak = card_peak_tflops(name)
        if peak is not None:
            line += f", MFU {flops.model_flops / time.total / setup.layout.world_size / peak / 1e12:.1%}"
        shares = ((term, seconds / time.total) for term, seconds in time.terms.items())
        yield f"{line} ({', '.join(f'{term} {share:.0%}' for term, share in shares if share >= _SHOWN_SHARE)})"


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
    config: TrainConfig, setup: Setup, codec_sizes: Callable[[str], VideoVAEConfig | None], what: Sampled
) -> Iterator[str]:
    """A line with the predicted memory of videos: of a device of the largest stage."""
    vae = None if what.codec is None else codec_sizes(what.codec)
    shape = max(what.shapes, key=lambda shape: patch_grid(*shape).tokens)
    tokens = patch_grid(*shape).tokens
    line = f"  {what.name}, latent {'×'.join(map(str, shape))} at most: {tokens:,} tokens"
    if config.model.precision != "bf16":
        yield f"{line}; memory not predicted in {config.model.precision}"
        return
    resident = max(setup.memory(stage, ()).resident for stage in setup.stages)
    held = what.batch * -(-tokens // setup.layout.sequence)
    sampling = resident + predict_sampling(setup.dit, tokens_held=held)
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
    accumulation = bucket.samples // bucket.micro // layout.data
    items = f" ({bucket.items} rows or pairs)" if bucket.items else ""
    return (
        f"  {bucket.stream}, latent {'×'.join(map(str, bucket.shape))}{items}: "
        f"{bucket.tokens:,} tokens a sample; samples a step: {bucket.samples} = data {layout.data} × accumulation "
        f"{accumulation} × micro-batch {bucket.micro}; {bucket.tokens * bucket.samples:,} tokens, "
        f"{model:,.3f} model TFLOP a step, {hardware:,.3f} with what runs again"
    )
