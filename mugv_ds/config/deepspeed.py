"""The dict for `deepspeed.initialize(config=…)`: the user's "deepspeed" section, checked, plus what follows from ours.

DeepSpeed ignores a top-level key that it does not know, and unknown keys of some sections: a misspelt one is lost in
silence. Every key, at the top and inside the objects, is therefore looked up here, and its value checked. The tables
are those of DeepSpeed 0.19.8 (`runtime/config.py`, `runtime/constants.py`, `runtime/zero/config.py`, `comm/config.py`),
spelt out so that reading a config does not import DeepSpeed; a test compares them with it.
All layouts, one stage included, run DeepSpeed's PipelineEngine, which many of its settings do not reach.
"""

import copy
import difflib
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

from mugv_ds.config.errors import ConfigError
from mugv_ds.config.schema import TrainConfig

_TYPE_NAMES = {dict: "an object", bool: "true or false", str: "a string", list: "a list", int: "a whole number"}
_TYPE_NAMES |= {float: "a number"}


class Choice(NamedTuple):
    """A string of a few."""

    values: tuple[str, ...]


class Range(NamedTuple):
    """A number between two, which count."""

    kind: type[int] | type[float]
    lowest: float
    highest: float


# Elements of a bucket of gradients unless the config says otherwise: 200 MB in bf16, half a block of the 10B. What
# is reduced after the backward pass is over, with nothing left to hide it, is a bucket or two.
BUCKET_ELEMENTS = 100_000_000

Kind = type | Choice | Range
_ELEMENTS = Range(int, 1, 1 << 40)

# Keys that work with the pipeline engine, and what is allowed inside the objects.
ALLOWED: dict[str, Kind] = {
    "zero_optimization": dict,
    "data_types": dict,
    "communication_data_type": Choice(("fp32", "bf16")),
    "comms_logger": dict,
    "log_level": Choice(("debug", "info", "warning", "error", "critical")),
    "dump_state": bool,
    "memory_breakdown": bool,
    "disable_python_gc": bool,
}
ALLOWED_INSIDE: dict[str, dict[str, Kind]] = {
    "data_types": {"grad_accum_dtype": Choice(("fp32", "bf16"))},
    "comms_logger": {"enabled": bool, "prof_all": bool, "prof_ops": list, "verbose": bool, "debug": bool},
    "zero_optimization": {
        "stage": int,
        "reduce_bucket_size": _ELEMENTS,
    },
}

_NO_EFFECT = "has no effect on a pipeline of transformer blocks; leave it out"
_REMOVED = "DeepSpeed has removed it; leave it out"
_PRECISION = "the precision comes from model.precision; set that to bf16, fp8 or fp32"
_LAYOUT = "its ranks would skip gradient averaging over the sequence; set parallel.data, .sequence and .pipeline"
_PROFILE = "crashes with pipeline stages; step times and model FLOPs are logged every logging.every steps"
_MONITOR = "counts sequence ranks as samples and records evaluations as steps; set our logging section (logging.dir)"
_OFFLOAD = "the pipeline engine cannot offload; share the memory over more ranks with our parallel section"
_REDUCTION = "has no effect: our optimizer reduce-scatters every bucket of gradients and takes their mean; leave it out"
_LATER_STAGE = "has no effect with ZeRO-1; leave it out"
_ITS_CHECKPOINTS = "concerns DeepSpeed's checkpoints; ours are set in our checkpoint section"

# Keys that DeepSpeed knows and that are ours to set, or wrong here; with what to do instead.
REFUSED: dict[str, str] = {
    "train_batch_size": "derived; set data.global_batch_size",
    "train_micro_batch_size_per_gpu": "derived; set data.micro_batch_size",
    "gradient_accumulation_steps": "derived; set data.global_batch_size and data.micro_batch_size",
    "gradient_clipping": "derived; set optimizer.gradient_clipping",
    "optimizer": "derived; use our optimizer section (optimizer.lr and so on)",
    "scheduler": "derived; use our schedule section (schedule.kind and so on)",
    "steps_per_print": "DeepSpeed's own report counts sequence ranks as samples; set logging.every",
    "zero_allow_untested_optimizer": "derived; the optimizer is AdamW, which ZeRO supports",
    "bf16": _PRECISION,
    "bfloat16": _PRECISION,
    "fp16": _PRECISION,
    "torch_autocast": _PRECISION,
    "mesh_param": _LAYOUT,
    "sequence_parallel_size": _LAYOUT,
    "data_parallel_size": _LAYOUT,
    "checkpoint": "checkpoints are written by us, not by DeepSpeed; see our checkpoint section",
    "pipeline": "set parallel.pipeline for the stages and parallel.activation_checkpointing for recomputation; "
    "pipeline.use_reentrant=false would keep everything that it recomputes",
    "activation_checkpointing": "not read by the pipeline engine; set parallel.activation_checkpointing",
    "wall_clock_breakdown": _PROFILE,
    "flops_profiler": _PROFILE,
    "prescale_gradients": _REDUCTION,
    "gradient_predivide_factor": _REDUCTION,
    "gradient_allreduce_op": "gradients have to be averaged, as the loss is; leave it out",
    "managed_gradient_accumulation": "the pipeline engine always accumulates itself; leave it out",
    "seq_parallel_communication_data_type": "belongs to sequence_parallel_size; set communication_data_type",
    "data_efficiency": "samples come from our loader; see the data section",
    "dataloader_drop_last": "samples come from our loader; see the data section",
    "tensorboard": _MONITOR,
    "wandb": _MONITOR,
    "csv_monitor": _MONITOR,
    "comet": _MONITOR,
    "zero_force_ds_cpu_optimizer": _OFFLOAD,
    "timers": _NO_EFFECT,
    "aio": _NO_EFFECT,
    "autotuning": _NO_EFFECT,
    "compile": _NO_EFFECT,
    "datastates_ckpt": _NO_EFFECT,
    "disable_allgather": _NO_EFFECT,
    "expert_parallel": _NO_EFFECT,
    "hybrid_engine": _NO_EFFECT,
    "tensor_parallel": _NO_EFFECT,
    "use_data_before_expert_parallelism": _NO_EFFECT,
    "vocabulary_size": _NO_EFFECT,
    "weight_quantization": _NO_EFFECT,
    "amp": f"{_REMOVED}, and set model.precision",
    "curriculum_learning": _REMOVED,
    "compression_training": _REMOVED,
    "eigenvalue": _REMOVED,
    "elasticity": _REMOVED,
    "graph_harvesting": _REMOVED,
    "nebula": _REMOVED,
    "progressive_layer_drop": _REMOVED,
    "quantize_training": _REMOVED,
    "sparse_attention": _REMOVED,
    "sparse_gradients": _REMOVED,
}
# The same inside the objects, where the value that DeepSpeed takes by default is accepted.
REFUSED_INSIDE: dict[str, dict[str, tuple[Any, str]]] = {
    "comms_logger": {},
    "data_types": {
        "param_dtype": (None, _PRECISION),
        "buffer_dtype": (None, "has no effect: the model has no buffers; leave it out"),
        "keep_in_fp32_modules": ("auto", "has no effect: the model has no buffers; leave it out"),
    },
    "zero_optimization": {
        "round_robin_gradients": (False, _REDUCTION),
        "parameter_alignment": (False, _REDUCTION),
        "compute_grad_norm": (True, "the norm is needed for optimizer.gradient_clipping and the guard; leave it out"),
        "contiguous_gradients": (True, _REDUCTION),
        "reduce_scatter": (True, _REDUCTION),
        "use_multi_rank_bucket_allreduce": (True, _REDUCTION),
        "allgather_bucket_size": (
            5 * 10**8,
            "has no effect: weights are gathered in the buckets of the reduction; set reduce_bucket_size",
        ),
        "offload_optimizer": (None, _OFFLOAD),
        "offload_param": (None, _OFFLOAD),
        "cpu_offload": (None, _OFFLOAD),
        "cpu_offload_param": (None, _OFFLOAD),
        "cpu_offload_use_pin_memory": (None, _OFFLOAD),
        "zenflow": (None, _OFFLOAD),
        "legacy_stage1": (False, _REMOVED),
        "load_from_fp32_weights": (True, _ITS_CHECKPOINTS),
        "elastic_checkpoint": (False, _ITS_CHECKPOINTS),
        "pipeline_loading_checkpoint": (False, _ITS_CHECKPOINTS),
        "overlap_comm": (False, "has no effect: the reduction always overlaps the backward pass; leave it out"),
        "allgather_partitions": (True, _LATER_STAGE),
        "ignore_unused_parameters": (True, _LATER_STAGE),
        "sub_group_size": (10**9, _LATER_STAGE),
        "stage3_prefetch_bucket_size": (5 * 10**7, _LATER_STAGE),
        "stage3_param_persistence_threshold": (10**5, _LATER_STAGE),
        "stage3_model_persistence_threshold": (sys.maxsize, _LATER_STAGE),
        "stage3_max_live_parameters": (10**9, _LATER_STAGE),
        "stage3_max_reuse_distance": (10**9, _LATER_STAGE),
        "stage3_gather_16bit_weights_on_model_save": (False, _LATER_STAGE),
        "stage3_gather_fp16_weights_on_model_save": (False, _LATER_STAGE),
        "stage3_module_granularity_threshold": (0, _LATER_STAGE),
        "stage3_use_all_reduce_for_fetch_params": (False, _LATER_STAGE),
        "stage3_allgather_sequential": (False, _LATER_STAGE),
        "zero_hpz_partition_size": (1, _LATER_STAGE),
        "zero_quantized_weights": (False, _LATER_STAGE),
        "zero_quantized_nontrainable_weights": (False, _LATER_STAGE),
        "zero_quantized_gradients": (False, _LATER_STAGE),
        "memory_efficient_linear": (True, _LATER_STAGE),
        "override_module_apply": (True, _LATER_STAGE),
        "log_trace_cache_warnings": (False, _LATER_STAGE),
        "enable_sanity_checks": (False, _LATER_STAGE),
        "save_muon_momentum_buffer_in_memory": (False, _LATER_STAGE),
        "leaf_module": (None, _LATER_STAGE),
    },
}


def deepspeed_config(config: TrainConfig, data_parallel: int) -> dict[str, Any]:
    """Makes the config of the engine: the checked "deepspeed" section and the keys derived from the other sections.

    `train_batch_size` counts every rank of DeepSpeed's data axis, in which our sequence ranks live: it is
    `data.global_batch_size` × `parallel.sequence`.

    Args:
        config: the run.
        data_parallel: number of ranks (or rank groups) that hold different samples.

    Raises:
        ConfigError: the section cannot be used, or the global batch does not split; the message names the key.
    """
    return engine_config(
        config.deepspeed,
        dtype=config.model.dtype,
        micro=config.data.micro_batch_size,
        accumulation=gradient_accumulation(config, data_parallel),
        replicas=data_parallel * config.parallel.sequence,
        clipping=config.optimizer.gradient_clipping,
    )


def engine_config(
    section: dict[str, Any], *, dtype: str, micro: int, accumulation: int, replicas: int, clipping: float
) -> dict[str, Any]:
    """Makes the config of an engine of the checked "deepspeed" section and the keys that we derive.

    Args:
        section: as the user gave it. dtype: "bf16" or "fp32", of weights and activations.
        micro, accumulation: samples of a micro-batch of a rank, and micro-batches of a step.
        replicas: ranks of DeepSpeed's data axis. clipping: largest global gradient norm; 0: none.

    Raises:
        ConfigError: the section cannot be used; the message names the key.
    """
    check_deepspeed_section(section)
    derived = copy.deepcopy(section)
    zero = derived.setdefault("zero_optimization", {})
    zero.setdefault("stage", 1)
    zero.setdefault("reduce_bucket_size", BUCKET_ELEMENTS)
    if dtype == "bf16":
        derived["bf16"] = {"enabled": True}
        derived.setdefault("data_types", {}).setdefault("grad_accum_dtype", "fp32")
    derived.update(
        train_micro_batch_size_per_gpu=micro,
        gradient_accumulation_steps=accumulation,
        train_batch_size=micro * accumulation * replicas,
        gradient_clipping=clipping,
        steps_per_print=None,  # the one value with which DeepSpeed never prints
        zero_allow_untested_optimizer=False,
    )
    return derived


def gradient_accumulation(config: TrainConfig, data_parallel: int) -> int:
    """Micro-batches that a data rank runs in one optimizer step.

    With a budget, preferences or rollouts every step has its own number, and this is a placeholder.

    Raises:
        ConfigError: `data.global_batch_size` is not a multiple of what all data ranks hold at once.
    """
    if any(section is not None for section in (config.data.budget, config.preference, config.reward)):
        return 1
    return micro_batches(config.data.global_batch_size, config.data.micro_batch_size, data_parallel)


def micro_batches(batch: int, micro: int, data_parallel: int) -> int:
    """Returns how many micro-batches of a rank make up a step of `batch` samples.

    Raises:
        ConfigError: the batch is not a multiple of what all data ranks hold at once.
    """
    at_once = micro * data_parallel
    if batch % at_once:
        below = batch // at_once * at_once
        values = f"{below} or {below + at_once}" if below else f"{at_once}"
        raise ConfigError(
            f"data.global_batch_size = {batch}: not a multiple of data.micro_batch_size × data ranks = "
            f"{micro} × {data_parallel} = {at_once}; use {values}"
        )
    return batch // at_once


def check_deepspeed_section(section: dict[str, Any]) -> None:
    """Checks the "deepspeed" section of a config key by key.

    Raises:
        ConfigError: a key is unknown, refused or of the wrong type; the message says what to do instead.
    """
    _refuse_auto(section, "deepspeed")
    _check_keys(section, "deepspeed", ALLOWED, REFUSED)
    stage = section.get("zero_optimization", {}).get("stage", 1)
    if stage != 1 or type(stage) is not int:
        raise ConfigError(
            f"deepspeed.zero_optimization.stage = {stage!r}: must be 1; the pipeline engine takes no more, and without "
            "ZeRO DeepSpeed would apply gradients that are not finite"
        )
    for name, allowed in ALLOWED_INSIDE.items():
        refused, inside = REFUSED_INSIDE[name], section.get(name, {})
        accepted = {key for key, (default, _) in refused.items() if key in inside and inside[key] == default}
        checked = {key: value for key, value in inside.items() if key not in accepted}
        _check_keys(checked, f"deepspeed.{name}", allowed, {key: reason for key, (_, reason) in refused.items()})


def _refuse_auto(value: Any, key: str) -> None:
    if value == "auto":
        raise ConfigError(
            f'{key} = "auto": only launchers of other projects fill this in; give a value or leave it out'
        )
    if isinstance(value, dict):
        for name, child in value.items():
            _refuse_auto(child, f"{key}.{name}")


def _check_keys(section: dict[str, Any], prefix: str, allowed: dict[str, Kind], refused: dict[str, str]) -> None:
    for name, value in section.items():
        key = f"{prefix}.{name}"
        if name in refused:
            raise ConfigError(f"{key}: {refused[name]}")
        if name not in allowed:
            raise ConfigError(f"{key}: unknown key; {_suggest(name, prefix, [*allowed, *refused], allowed)}")
        if wanted := _wanted(value, allowed[name]):
            raise ConfigError(f"{key} = {value!r}: must be {wanted}")


def _wanted(value: Any, kind: Kind) -> str:
    """Returns in words what the value should be, and nothing where it is."""
    if isinstance(kind, Choice):
        return "" if value in kind.values else f"one of {', '.join(kind.values)}"
    if isinstance(kind, Range):
        wanted = f"{_TYPE_NAMES[kind.kind]} from {kind.lowest:g} to {kind.highest:g}"
        return "" if _is_a(value, kind.kind) and kind.lowest <= value <= kind.highest else wanted
    return "" if _is_a(value, kind) else _TYPE_NAMES[kind]


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _suggest(name: str, prefix: str, known: Iterable[str], allowed: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}.{near[0]}?" if near else f"known here: {', '.join(allowed)}"
