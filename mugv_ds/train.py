"""Trains the DiT; started by `deepspeed`, one process a device.

deepspeed --hostfile hostfiles/localhost --no_ssh --node_rank 0 --master_addr 127.0.0.1 \\
    mugv_ds/train.py --config ds_configs/debug.json --set schedule.steps=20
"""

import os
import time

from mugv_ds.engine.guard.signals import SIGNALS

if __name__ == "__main__" and "RANK" in os.environ:
    SIGNALS.listen()  # from here on a signal ends nothing half-way: what is imported below takes seconds

from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from mugv_ds.config import ConfigError, Status, TrainConfig
from mugv_ds.config.command import fit_to_launch, leave, training_command
from mugv_ds.config.console import say
from mugv_ds.config.environment import read_environment
from mugv_ds.config.run import overview

if TYPE_CHECKING:  # the rest of the package is imported when it is needed: a wrong command line answers at once
    import numpy as np

    from mugv_ds.checkpoint.manifest import StartWeights
    from mugv_ds.checkpoint.store import Store
    from mugv_ds.data.manifest import Shape
    from mugv_ds.data.run_data import RunData
    from mugv_ds.engine.ema import PowerEma
    from mugv_ds.engine.evaluate.reference import ReferenceModel
    from mugv_ds.engine.metrics import Expected
    from mugv_ds.engine.preview import Evaluations, Previews
    from mugv_ds.engine.process import Process
    from mugv_ds.engine.reward.old_policy import OldPolicy
    from mugv_ds.engine.reward.rounds import Rounds


@dataclass(frozen=True)
class Start:
    """A process that has joined its run.

    Attributes:
        config: with the levels of recomputation that "auto" chose. process: this one. data: of the run.
        engine: holds the weights that the run starts from, if it starts afresh. weights: that it started from.
    """

    config: TrainConfig
    process: "Process"
    data: "RunData"
    engine: Any  # DeepSpeed's PipelineEngine
    weights: "StartWeights"


def start(config: TrainConfig, resume: bool = True) -> Start:
    """Joins the launch, opens the data and builds the engine.

    A run that goes on from a checkpoint needs nothing of the weights that it started from, which may be gone; one with
    adapters loads them again.

    Args:
        resume: whether a checkpoint in `checkpoint.dir` is what the run goes on from.

    Raises:
        InputError: config, data or weights cannot be used. PeerError: another rank met an error.
        Stopped: a rank was asked to stop.
    """
    from mugv_ds.checkpoint.places import place_of
    from mugv_ds.data.run_data import RunData
    from mugv_ds.engine.build import build_engine
    from mugv_ds.engine.guard.stopping import stop_if_asked
    from mugv_ds.engine.preflight import preflight
    from mugv_ds.engine.process import check_same, start_process
    from mugv_ds.parallel.offload import check_host_memory
    from mugv_ds.plan.cost import sample_cost
    from mugv_ds.plan.predict import predict_host_memory
    from mugv_ds.weights.start import check_resumed_base, check_start_features, find_weights, put_start, saved_start

    process = start_process(config)
    stop_if_asked(process.host)
    if config.guard.preflight:
        preflight(config, process, place_of(config.checkpoint, process.rank))
    data = RunData(config, sample_cost(config), process.layout.data, process.host.first_then_all)
    stop_if_asked(process.host)
    check_same(data.content(), process.host, "all hosts must read the same files; copy them anew and start again")
    saved = process.host.first(lambda: saved_start(config) if resume else None)
    weights = find_weights(config, saved, process.host.first)
    if saved is None and weights.path and not config.checkpoint.accept_changed_data:
        process.host.first(lambda: check_start_features(weights.path, data.text_encoder))
    if saved is not None and config.lora is not None and weights.digest is not None:
        process.host.first(lambda: check_resumed_base(weights, config))
    config = settled(config, process, data)
    load = put_start(weights, config, fresh=saved is None)
    if config.parallel.offload != "none":
        needed = predict_host_memory(config, process.layout, data)
        process.host.attempt(lambda: check_host_memory(needed, read_environment().local_size))
    engine = build_engine(config, process, data.typical_shape, weights=load, shapes=len(data.shapes))
    stop_if_asked(process.host)
    return Start(config, process, data, engine, weights)


def settled(config: TrainConfig, process: "Process", data: "RunData") -> TrainConfig:
    """Returns the config with the levels of recomputation that "auto" chooses on rank 0; any other config as it is."""
    if config.parallel.activation_checkpointing != "auto":
        return config
    import torch

    from mugv_ds.models.kept_attention import statistics_of
    from mugv_ds.plan.levels import with_levels
    from mugv_ds.plan.predict import run_levels

    is_gpu = process.device.type == "cuda"
    memory = torch.cuda.get_device_properties(process.device).total_memory if is_gpu else None
    machine = {"card": process.card, "memory": memory, "keeping": list(statistics_of(process.device))}
    levels = process.host.first(lambda: list(run_levels(config, process.layout, data, **machine)))
    return with_levels(config, levels)


def reference_model(config: TrainConfig, run: Start, fresh: bool) -> "ReferenceModel":
    """Makes the reference of a preference run. fresh: whether the engine holds its weights."""
    from mugv_ds.engine.evaluate.reference import ReferenceModel
    from mugv_ds.weights.start import FrozenWeights

    weights = FrozenWeights(run.weights, config)
    return ReferenceModel(config, run.process, run.engine, run.data, weights, held=fresh)


def make_rounds(config: TrainConfig, run: Start, store: "Store", old: "OldPolicy") -> "Rounds":
    """Makes the rounds of a run that learns from a reward."""
    from mugv_ds.checkpoint.fragments import refresh_weights
    from mugv_ds.config.errors import CheckpointError, PeerError
    from mugv_ds.engine.evaluate.evaluate import Evaluator
    from mugv_ds.engine.feed import Feed
    from mugv_ds.engine.reward.rounds import Rounds
    from mugv_ds.models.lora import adapter_sizes
    from mugv_ds.sampling.sampler import sample_latents
    from mugv_ds.weights.codec import load_codec
    from mugv_ds.weights.start import FrozenWeights

    start, host = FrozenWeights(run.weights, config), run.process.host

    def sizes() -> tuple[float, float]:
        if config.lora is None:
            return start.distance((piece.name, piece.start, piece.tensors["weight"]) for piece in store.fragments)
        place = run.process.coordinates  # of the replicas of a stage, one counts
        return adapter_sizes(run.engine.module) if place.data == place.sequence == 0 else (0.0, 0.0)

    def distance() -> float:
        try:
            own = host.attempt(sizes)
        except (CheckpointError, PeerError) as error:  # the weights that the run started from are gone
            if host.rank == 0:
                say(f"warning: reward/distance: {error}")
            return float("nan")
        moved, size = map(sum, zip(*host.gather(own), strict=True))
        return (moved / size) ** 0.5

    feed = Feed(run.engine.module, run.process, config.data, config.model.dit().caption_channels)
    return Rounds(
        config,
        run.process,
        run.engine.module,
        Evaluator(run.process, run.engine, feed, config.data.num_workers),
        run.data,
        old=old,
        refresh=partial(refresh_weights, run.engine),
        sample=sample_latents,
        load_codec=load_codec,
        distance=distance,
    )


def make_previews(config: TrainConfig, run: Start, ema: "PowerEma") -> "Previews":
    """Makes the previews of a run, by its weights or by one of their averages."""
    from mugv_ds.engine.preview import Previews

    return Previews(config, run.process, run.engine.module, run.data.previewed, *_sampler(run, ema, config.preview.ema))


def make_evaluations(config: TrainConfig, run: Start, ema: "PowerEma") -> "Evaluations":
    """Makes the evaluations of a run, likewise.

    Raises:
        ConfigError: OpenCV is not installed.
    """
    from mugv_ds.engine.preview import Evaluations

    try:
        from mugv_ds.evaluation.measures import measure
    except ImportError as error:
        raise ConfigError(f"evaluation.every: {error}; pip install 'mugv_ds[evaluation]', or set it to 0") from None
    from mugv_ds.prepare.demo.judge import demo_measures

    def measure_row(frames: "np.ndarray", caption: str, image: "np.ndarray | None") -> dict[str, float]:
        return measure(frames, image) | demo_measures(frames, caption)

    given = (config, run.process, run.engine.module, run.data.evaluated)
    return Evaluations(measure_row, *given, *_sampler(run, ema, config.evaluation.ema))


def _sampler(run: Start, ema: "PowerEma", sigma_rel: float | None) -> tuple[Any, ...]:
    """Returns what samples, what loads codecs, and what has the weights, or an average of them, in the model."""
    from mugv_ds.checkpoint.fragments import refresh_weights
    from mugv_ds.sampling.sampler import sample_latents
    from mugv_ds.weights.codec import load_codec

    average = partial(ema.in_model, sigma_rel, partial(refresh_weights, run.engine))
    return sample_latents, load_codec, nullcontext if sigma_rel is None else average


def own_overview(config: TrainConfig, run: Start) -> dict[str, str]:
    """Returns what runs, on what and with what; see `config.run.overview`."""
    from mugv_ds.plan.cost import layer_parameters, level_name

    layout, data = run.process.layout, run.data
    held_out = "none held out" if data.validation is None else f"{len(data.validation):,} held out"
    width, reference = config.widths or (None, None)
    ruled = {} if reference is None else {"width rule": f"{width:,}, with the rate of {reference:,}"}
    return {
        "model": f"{config.model.preset}, {sum(layer_parameters(config.model.dit())):,} parameters, "
        f"{config.model.precision}" + ("" if config.lora is None else f", adapters of rank {config.lora.rank}"),
        **ruled,
        "device": f"{layout.world_size} × {run.process.card or 'CPU'}",
        "layout": f"data {layout.data} × sequence {layout.sequence} × pipeline {layout.pipeline}; "
        f"recomputes {level_name(config.parallel.levels(config.model.dit().depth))}",
        "data": f"{config.data.manifest}: {len(data.train):,} rows, {len(data.shapes)} shapes; {held_out}",
    }


def expected_steps(config: TrainConfig, run: Start) -> "dict[tuple[str, Shape], Expected]":
    """Predicts seconds and memory of the run's steps on this machine, by stream and shape, and prints the mean step."""
    from mugv_ds.engine.metrics import Expected
    from mugv_ds.plan.predict import predict_steps

    card = run.process.card
    if card is None or config.model.precision != "bf16":
        return {}
    steps = predict_steps(config, run.process.layout, run.data, card)
    say(steps.line)
    return {kind: Expected(step.seconds, step.peak_gib) for kind, step in steps.by_kind.items()}


def train(config: TrainConfig) -> int:
    """Runs the training that `config` describes, as one of the processes of the launch.

    Returns:
        The exit status: 0 at the end of the run, 75 when it was asked to stop and saved before.

    Raises:
        InputError: config, data, weights or checkpoint cannot be used. TrainingError: the run cannot go on.
        PeerError: another rank met an error. Stopped: a rank was asked to stop before the first step.
    """
    import torch.distributed as dist

    from mugv_ds.checkpoint.store import Store
    from mugv_ds.engine.ema import PowerEma
    from mugv_ds.engine.loop import Trainer
    from mugv_ds.engine.reward.old_policy import OldPolicy

    config = fit_to_launch(config)
    if config is None:
        return Status.DONE
    run = start(config)
    config, process, data, engine = run.config, run.process, run.data, run.engine
    store = Store(config, process, engine, data.order(), run.weights, data.text_encoder)
    masters = [fragment.tensors["weight"] for fragment in store.fragments]
    ema = PowerEma(masters, config.ema.sigma_rel)
    store.extra_kinds = ema.averages
    old = None
    if config.reward is not None:
        old = OldPolicy(masters, config.reward.old_decay, config.reward.old_decay_max)
        store.extra_kinds = store.extra_kinds | old.kinds
    try:
        previews = data.previewed and make_previews(config, run, ema)
        evaluations = data.evaluated and make_evaluations(config, run, ema)
        began = time.perf_counter()
        taken = store.restore()
        restored = time.perf_counter() - began
        if process.rank == 0:
            fresh = f"starting fresh, from {run.weights.path or 'initial weights'}"
            say(overview(config, own_overview(config, run)))
            say(f"going on after step {taken}" if taken else fresh)
        reference = None
        if config.preference is not None and config.lora is None:  # with adapters it is the base, at every step
            reference = reference_model(config, run, fresh=not taken)
            reference.open_files()
        rounds = old and make_rounds(config, run, store, old)
        expected = expected_steps(config, run) if process.rank == 0 else {}
        trainer = Trainer(
            config,
            process,
            engine,
            data=data,
            reference=reference,
            ema=ema,
            store=store,
            previews=previews,
            evaluations=evaluations,
            rounds=rounds,
            expected=expected,
        )
        stopped = trainer.run(taken, restored)
    finally:
        store.close()
    dist.destroy_process_group()  # without it some processes abort at exit
    return Status.AGAIN if stopped else Status.DONE


def main(argv: list[str] | None = None) -> int:
    """Parses the command line; returns the exit status, one of `config.errors.Status`."""
    return training_command(argv, __doc__, TrainConfig, train, dry_run)


def dry_run(config: TrainConfig, world_size: int | None) -> str:
    """Returns what `--dry-run` prints."""
    import torch

    from mugv_ds.plan.describe import describe
    from mugv_ds.weights.codec import read_codec_sizes

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return describe(config.fitted(world_size or 1), world_size, read_codec_sizes, card)


if __name__ == "__main__":
    leave(main())
