"""What an optimizer step takes, in seconds and in bytes, by part: of a config's model under any layout.

The schedule is 1F1B (Narayanan et al. 2019, PipeDream-Flush): with p stages and m micro-batches a step lasts as long as
m + p − 1 of them take on the slowest stage. Each micro-batch's bf16 gradients are reduce-scattered while its backward
pass runs, and after the step the weights are gathered while AdamW runs.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby, pairwise
from math import prod

import torch

from mugv_ds.config.deepspeed import deepspeed_config
from mugv_ds.config.model import LATENT_CHANNELS, DiTConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.data.manifest import Shape
from mugv_ds.models.attention import query_parts
from mugv_ds.models.dit import Embedders
from mugv_ds.models.flops import SampleCost
from mugv_ds.models.layers import Block, FinalLayer
from mugv_ds.models.lora import adapter_shapes
from mugv_ds.models.matrices import chunks_of
from mugv_ds.models.rope import patch_grid
from mugv_ds.parallel.layout import Layout, stage_boundaries
from mugv_ds.plan.calibration import load_calibration
from mugv_ds.plan.memory import ON_HOST, Memory, predict_memory
from mugv_ds.plan.steps import Bucket
from mugv_ds.plan.timing import Pass, Piece, Terms, Timing

_BF16 = 2
_ACCUMULATED = {"fp32": 10.0, "bf16": 6.0}  # bytes that adding a reduced gradient to those before reads and writes
_GATHERED_PARTS = 8  # of the weights, each of which is gathered while the next is computed
_PACKED_ROWS = 14  # of a micro-batch that a stage sends on beside tokens and text, see `parallel.pipeline.pack`
_BALANCED_ROWS = 16_384  # tokens among which a sample's seconds are taken by `SampleSeconds`
DIGITS = 6  # that these are rounded to, so that every machine has the same


@lru_cache(256)
def layer_parameters(config: DiTConfig) -> tuple[int, ...]:
    """Parameters of embedders, each block and the final layer."""
    with torch.device("meta"):
        embed, block, final = (
            sum(p.numel() for p in part(config).parameters()) for part in (Embedders, Block, FinalLayer)
        )
    return (embed, *[block] * config.depth, final)


@lru_cache(256)
def matrix_parameters(config: DiTConfig) -> tuple[int, ...]:
    """Those of each layer that Muon moves, see `models.matrices`."""
    with torch.device("meta"):
        parts = (("", Embedders(config)), ("blocks.0.", Block(config)))
    embed, block = (
        sum(p.numel() for name, p in part.named_parameters() if chunks_of(prefix + name)) for prefix, part in parts
    )
    return (embed, *[block] * config.depth, 0)


def trained_parameters(config: TrainConfig) -> tuple[int, ...]:
    """Those that are trained: adapters alone, or all."""
    dit = config.model.dit()
    if config.lora is None:
        return layer_parameters(dit)
    adapters = sum(prod(shape) for shape in adapter_shapes(dit, config.lora).values())
    return (0, *[adapters // dit.depth] * dit.depth, 0)


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage holds.

    Attributes:
        first, last: layers [first, last). parameters: all. trained: of them. matrices: of these, those that Muon moves.
    """

    number: int
    first: int
    last: int
    blocks: int
    parameters: int
    trained: int
    matrices: int
    has_embedders: bool
    has_final: bool


@lru_cache(4096)
def _boundaries(dit: DiTConfig, stages: int, tokens: int, text_tokens: int) -> tuple[int, ...]:
    return tuple(stage_boundaries(dit, stages, tokens, text_tokens))


Runs = tuple[tuple[str, int], ...]  # levels of blocks that follow one another, each with how many have it


@lru_cache(4096)
def runs_of(levels: tuple[str, ...]) -> Runs:
    """Returns the levels of blocks that follow one another."""
    return tuple((level, len(list(group))) for level, group in groupby(levels))


def level_name(levels: tuple[str, ...]) -> str:
    """Says the level of all blocks, or how many have which."""
    counts = Counter(levels)
    return levels[0] if len(counts) == 1 else " + ".join(f"{count} {level}" for level, count in counts.items())


@dataclass(frozen=True)
class Setup:
    """A model and how it is trained.

    Attributes:
        dit, trained: its sizes, and the parameters of each layer that are trained. has_muon: whether Muon moves some.
        text_tokens: L. layout: of the ranks. levels: of recomputation, of each block. offload: of activations.
        gradients: "fp32" or "bf16".
        averages: of the weights. bucket: elements of gradients that are reduced together.
        typical_tokens: of the sample by whose cost stages are balanced. reduced_bytes: of a gradient on its way.
        is_adapted: whether adapters alone are trained. reference_passes: forward passes beside, of a preference sample.
    """

    dit: DiTConfig
    trained: tuple[int, ...]
    text_tokens: int
    layout: Layout
    levels: tuple[str, ...]
    offload: str
    gradients: str
    averages: int
    bucket: int
    typical_tokens: int
    reduced_bytes: int = _BF16
    is_adapted: bool = False
    has_muon: bool = False
    reference_passes: int = 0

    @classmethod
    def of(cls, config: TrainConfig, layout: Layout, typical_shape: Shape) -> "Setup":
        """Returns that of a config under a layout. typical_shape: see `RunData.typical_shape`.

        Raises:
            ConfigError: there are more stages than blocks.
        """
        engine = deepspeed_config(config, layout.data)
        is_kto = config.preference is not None and config.preference.objective == "kto"
        return cls(
            dit=config.model.dit(),
            trained=trained_parameters(config),
            text_tokens=config.data.max_text_tokens,
            layout=layout,
            levels=config.parallel.levels(config.model.dit().depth),
            offload=config.parallel.offload,
            gradients=engine.get("data_types", {}).get("grad_accum_dtype", "fp32"),
            averages=len(config.ema.sigma_rel) + (config.reward is not None),  # the old policy is one too
            bucket=engine["zero_optimization"]["reduce_bucket_size"],
            reduced_bytes=4 if engine.get("communication_data_type") == "fp32" else _BF16,
            typical_tokens=patch_grid(*typical_shape).tokens,
            is_adapted=config.lora is not None,
            has_muon=config.optimizer.kind == "muon",
            reference_passes=is_kto + (config.preference is not None and config.lora is not None),
        )

    @cached_property
    def stages(self) -> list[Stage]:
        """Returns the pipeline's stages.

        Raises:
            ConfigError: there are more than blocks.
        """
        parameters = layer_parameters(self.dit)
        boundaries = _boundaries(self.dit, self.layout.pipeline, self.typical_tokens, self.text_tokens)
        return [
            Stage(
                number=number,
                first=first,
                last=last,
                blocks=last - first - (first == 0) - (last == len(parameters)),
                parameters=sum(parameters[first:last]),
                trained=sum(self.trained[first:last]),
                matrices=sum(matrix_parameters(self.dit)[first:last]) if self.has_muon else 0,
                has_embedders=first == 0,
                has_final=last == len(parameters),
            )
            for number, (first, last) in enumerate(pairwise(boundaries))
        ]

    @cached_property
    def unlike_stages(self) -> list[Stage]:
        """Returns the stages that differ in what they compute, one of each."""
        unlike = {(self.runs(s), s.has_embedders, s.has_final): s for s in reversed(self.stages)}
        return list(unlike.values())

    def runs(self, stage: Stage) -> Runs:
        """Returns the levels of a stage's blocks."""
        first = max(stage.first - 1, 0)
        return runs_of(self.levels[first : first + stage.blocks])

    @property
    def level(self) -> str:
        """Returns the levels in words."""
        return level_name(self.levels)

    def memory(self, stage: Stage, buckets: Iterable[Bucket], runs: Runs | None = None) -> Memory:
        """Predicts the memory of a device of a stage, in those steps in which it is the most.

        Args:
            buckets: kinds of steps; where there are none nothing is trained meanwhile.
            runs: levels in the place of the stage's own.
        """
        sizes = self.text_tokens, self.dit.caption_channels, self.dit.num_heads
        held = _held(tuple(buckets), self.layout.sequence, self.layout.pipeline - stage.number, *sizes)
        runs = self.runs(stage) if runs is None else runs
        return max((self._memory(stage, runs, *of) for of in held), key=lambda memory: memory.peak)

    def _memory(
        self, stage: Stage, runs: Runs, tokens_held: int, text_held: int, in_flight: int, batch_bytes: float
    ) -> Memory:
        return predict_memory(
            self.dit,
            parameters=stage.trained,
            matrices=stage.matrices,
            frozen=stage.parameters if self.is_adapted else 0,
            blocks=stage.blocks,
            replicas=self.layout.replicas,
            tokens_held=tokens_held,
            text_held=text_held,
            in_flight=in_flight,
            recompute=runs,
            offload=self.offload,
            fp32_accumulation=self.gradients == "fp32",
            averages=self.averages,
            is_sharded=self.layout.sequence > 1,
            batch_bytes=batch_bytes,
            bucket=self.bucket,
        )

    def largest_memory(self, buckets: Sequence[Bucket]) -> Memory:
        """Returns the memory of the device that holds the most, over all stages and kinds of steps."""
        return max((self.memory(stage, buckets) for stage in self.stages), key=lambda memory: memory.peak)


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by part; they add up.

    Attributes:
        terms: what the device waits for, by name: see `step_time`.
        hidden: of reduction, gather and offload, what goes on beside other work and is not waited for.
    """

    terms: dict[str, float]
    hidden: dict[str, float]

    @property
    def total(self) -> float:
        return sum(self.terms.values())


def step_time(setup: Setup, bucket: Bucket, timing: Timing) -> StepTime:
    """Predicts the seconds of a step of this kind.

    Returns:
        By name: products, attention forward and backward, kernels (all others of blocks, embedders and loss), exchange
        (all-to-alls, and what goes between stages), host (waiting for it to launch a block), pipeline bubble, reference
        (forward passes of a preference run), reduction (what the backward pass does not hide, and adding up), gather,
        optimizer, offload, data.

    Raises:
        InputError: the calibration has no group of devices, and the layout has.
    """
    layout, dit, count = setup.layout, setup.dit, bucket.accumulation
    piece = piece_of(setup, bucket)
    ends = timing.ends(dit.hidden_size, piece.rows, bucket.micro)

    def seconds_of(stage: Stage) -> tuple[Terms, Terms]:
        return blocks_pass(setup, setup.runs(stage), piece, timing)

    stage = max(setup.unlike_stages, key=lambda stage: _stage_pass(stage, *seconds_of(stage), ends).both)
    forward, backward = seconds_of(stage)
    passes = _stage_pass(stage, forward, backward, ends)
    whole = forward.plus(backward)
    terms = {
        "products": count * whole.products,
        "attention forward": count * whole.attention_forward,
        "attention backward": count * whole.attention_backward,
        "kernels": count * (whole.kernels + _share_of_ends(stage) * ends.both),
        "exchange": count * whole.exchange,
        "host": count * whole.host,
    }
    if layout.pipeline > 1:
        terms["pipeline bubble"] = (layout.pipeline - 1) * passes.both
        sent = _BF16 * bucket.micro * dit.hidden_size * (piece.rows // bucket.micro + _PACKED_ROWS + setup.text_tokens)
        terms["exchange"] += 2 * (count + layout.pipeline - 1) * timing.send(sent, layout.replicas)
    if setup.reference_passes and bucket.preferred:
        terms["reference"] = setup.reference_passes * bucket.preferred * passes.forward
    hidden = _reduction(setup, stage, passes, count, timing, terms)
    terms["offload"], hidden["offload"] = _offload(setup, stage, piece, forward, backward, count, timing)
    sample = _sample_bytes(bucket.shape, setup.text_tokens, dit.caption_channels)
    terms["data"] = count * timing.copy("to_device", bucket.micro * sample)
    return StepTime(terms, hidden)


@lru_cache(1 << 14)  # of all levels of a layout it is the same
def _held(
    buckets: tuple[Bucket, ...], sequence: int, stages_left: int, text_tokens: int, caption_channels: int, heads: int
) -> list[tuple[int, int, int, float]]:
    """What a device holds in the kinds of steps that can take the most of it.

    Returns:
        (tokens of a micro-batch on a rank, rows of its texts' keys and values, micro-batches in flight, bytes of the
        step's samples); those of which no other has as much of everything. Nothing where there are no steps.
    """
    held = set()
    for bucket in buckets:
        tokens = -(-bucket.tokens // sequence)
        # Cross-attention has the keys and values, and a copy of both for each part of the queries.
        rows = bucket.micro * text_tokens * (2 + 2 * query_parts(bucket.micro, tokens, text_tokens, heads))
        samples = bucket.micro * bucket.accumulation
        read = samples * _sample_bytes(bucket.shape, text_tokens, caption_channels)
        held.add((bucket.micro * tokens, rows, min(stages_left, bucket.accumulation), read))
    largest: list[tuple[int, int, int, float]] = []
    for one in sorted(held, reverse=True):
        if not any(all(a >= b for a, b in zip(other, one, strict=True)) for other in largest):
            largest.append(one)
    return largest or [(0, 0, 0, 0.0)]


def _share_of_ends(stage: Stage) -> float:
    return (stage.has_embedders + stage.has_final) / 2


def piece_of(setup: Setup, bucket: Bucket) -> Piece:
    """Returns what a block is given in these steps."""
    dit, sequence = setup.dit, setup.layout.sequence
    return Piece(dit.hidden_size, dit.num_heads, bucket.micro, bucket.tokens, sequence, setup.text_tokens)


def blocks_pass(setup: Setup, runs: Runs, piece: Piece, timing: Timing) -> tuple[Terms, Terms]:
    """Seconds of a micro-batch's passes through blocks of these levels, forward and backward."""
    forward = backward = Terms()
    for level, count in runs:
        one = timing.block(piece, level, setup.is_adapted)
        forward, backward = forward.plus(one[0], count), backward.plus(one[1], count)
    return forward, backward


def _stage_pass(stage: Stage, forward: Terms, backward: Terms, ends: Pass) -> Pass:
    """Seconds of a micro-batch's passes through a stage. forward, backward: through its blocks."""
    share = _share_of_ends(stage)
    return Pass(forward.total + share * ends.forward, backward.total + share * ends.backward)


def _reduction(
    setup: Setup, stage: Stage, passes: Pass, count: int, timing: Timing, terms: dict[str, float]
) -> dict[str, float]:
    """Adds the terms of gradients, weights and optimizer; returns what is hidden of them.

    Gradients are copied into buckets, reduced, and added up. Beside the backward pass a collective costs what computing
    gets slower by; after it there remain what did not fit in, and in any case the last bucket. See
    `engine.distributed_optimizer`.
    """
    replicas, trained = setup.layout.replicas, stage.trained
    shard = trained / replicas
    scattered = timing.collective("reduce_scatter", replicas, setup.reduced_bytes * trained)
    last = scattered * min(setup.bucket / max(trained, 1), 1.0)
    beside = min(scattered - last, passes.backward)
    waited = count * (timing.slowdown * beside + (scattered - last - beside)) + last
    moved = (_BF16 + setup.reduced_bytes) * trained + _ACCUMULATED[setup.gradients] * shard
    terms["reduction"] = waited + count * timing.copy("on_device", moved / 2)  # a copy reads and writes
    terms["optimizer"] = timing.optimizer(shard, setup.averages)
    gathered = timing.collective("all_gather", replicas, _BF16 * trained)
    last = gathered / _GATHERED_PARTS
    terms["gather"] = last + max(gathered - last - timing.optimizer(shard, 0), 0.0)
    return {"reduction": max(count * scattered - waited, 0.0), "gather": gathered - terms["gather"]}


def _offload(
    setup: Setup, stage: Stage, piece: Piece, forward: Terms, backward: Terms, count: int, timing: Timing
) -> tuple[float, float]:
    """Seconds that copies to and from the host are waited for, and that they take beside the blocks' passes."""
    if setup.offload == "none":
        return 0.0, 0.0
    moved = ON_HOST[setup.offload] * _BF16 * piece.rows * piece.width
    out, back = (stage.blocks * timing.copy(kind, moved) for kind in ("to_host", "to_device"))
    waited = max(out - forward.total, 0.0) + max(back - backward.total, 0.0)
    return count * waited, count * (out + back - waited)


def _sample_bytes(shape: Shape, text_tokens: int, caption_channels: int) -> float:
    """Bytes that a sample's latent, its target (fp32) and its text take."""
    return 2 * 4.0 * LATENT_CHANNELS * prod(shape) + 4.0 * text_tokens * caption_channels


@dataclass(frozen=True)
class SampleSeconds(SampleCost):
    """What one sample asks of a device, with predicted seconds in the place of FLOPs.

    They are those of blocks without recomputation on one device, of as many samples of the shape as make about 16,384
    tokens: steps then depend neither on the layout nor on what is recomputed.

    Args:
        timing: of the machine that `data.budget.machine` names. The others are those of `SampleCost`.
    """

    timing: Timing | None = None

    def cost(self, shape: Shape) -> float:
        """Returns the seconds of a sample's forward and backward pass on one device."""
        tokens = patch_grid(*shape).tokens
        batch = max(_BALANCED_ROWS // tokens, 1)
        piece = Piece(self.config.hidden_size, self.config.num_heads, batch, tokens, 1, self.text_tokens)
        forward, backward = self.timing.block(piece, "off", self.lora is not None)
        return float(f"{self.config.depth * (forward.total + backward.total) / batch:.{DIGITS}g}")

    unit = "s"


def sample_cost(config: TrainConfig) -> SampleCost:
    """Returns what the run's samples cost, by `data.budget.by`: FLOPs, or seconds on the machine that it names.

    Raises:
        InputError: there is no calibration of that machine.
    """
    costs = SampleCost.of(config)
    budget = config.data.budget
    if budget is None or budget.by == "flops":
        return costs
    return SampleSeconds(**vars(costs), timing=Timing(load_calibration(budget.machine)))
