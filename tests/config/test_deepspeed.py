"""The dict for DeepSpeed: what is refused, what is derived, and what DeepSpeed itself reads out of it."""

import copy

import pytest
import torch
from deepspeed.comm.config import CommsLoggerConfig
from deepspeed.runtime import config as deepspeed_runtime
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

from mugv_ds.config import PRESETS, ConfigError, TrainConfig
from mugv_ds.config import deepspeed as ours
from mugv_ds.models import DiT


def run(deepspeed=None, precision="bf16", batch=24, micro=2, parallel=None):
    return TrainConfig(
        model={"preset": "mugdit_debug", "precision": precision},
        data={"manifest": "m.csv", "null_text_path": "n.pt", "global_batch_size": batch, "micro_batch_size": micro},
        optimizer={"gradient_clipping": 0.7},
        schedule={"steps": 1},
        checkpoint={"dir": "c"},
        logging={"dir": "l"},
        parallel=parallel or {},
        deepspeed=deepspeed or {},
    )


class Grid:
    """The part of the pipeline grid that DeepSpeed's config asks: the size of its data axis."""

    def __init__(self, size):
        self.size = size

    def get_data_parallel_world_size(self):
        return self.size


@pytest.fixture
def as_read(monkeypatch):
    """Gives a dict to DeepSpeed's own reader, in a job whose data axis has so many ranks."""
    monkeypatch.setattr(deepspeed_runtime.dist, "get_rank", lambda: 0)
    return lambda values, data_axis: deepspeed_runtime.DeepSpeedConfig(values, mpu=Grid(data_axis))


@pytest.mark.parametrize(
    ("data_parallel", "sequence", "accumulation", "train_batch"), [(1, 1, 12, 24), (3, 1, 4, 24), (4, 2, 3, 48)]
)
def test_batch_as_deepspeed_reads_it(as_read, data_parallel, sequence, accumulation, train_batch):
    config = run(parallel={"sequence": sequence})
    read = as_read(ours.deepspeed_config(config, data_parallel), data_parallel * sequence)
    assert read.train_micro_batch_size_per_gpu == 2
    assert read.gradient_accumulation_steps == accumulation == ours.gradient_accumulation(config, data_parallel)
    assert read.train_batch_size == train_batch


def test_other_keys_as_deepspeed_reads_them(as_read):
    read = as_read(ours.deepspeed_config(run(), 1), 1)
    assert read.bfloat16_config.enabled
    assert not read.float16_config.enabled
    assert read.grad_accum_dtype == "fp32"
    assert read.zero_optimization_stage == 1
    assert read.gradient_clipping == 0.7
    assert read.steps_per_print is None
    assert read.zero_allow_untested_optimizer is False


def test_fp8_is_bf16_to_deepspeed(as_read):
    assert ours.deepspeed_config(run(precision="fp8"), 1) == ours.deepspeed_config(run(precision="bf16"), 1)


def test_fp32(as_read):
    read = as_read(ours.deepspeed_config(run(precision="fp32"), 1), 1)
    assert not read.bfloat16_config.enabled
    assert read.grad_accum_dtype is None  # DeepSpeed then takes the dtype of the weights


def test_user_values_pass_through_unchanged(as_read):
    section = {
        "zero_optimization": {"reduce_bucket_size": 1000},
        "data_types": {"grad_accum_dtype": "bf16"},
        "communication_data_type": "fp32",
        "comms_logger": {"enabled": False},
    }
    given = copy.deepcopy(section)
    read = as_read(ours.deepspeed_config(run(section), 1), 1)
    assert section == given
    assert (read.zero_optimization_stage, read.zero_config.reduce_bucket_size) == (1, 1000)
    assert read.grad_accum_dtype == "bf16"


@pytest.mark.parametrize(
    ("batch", "micro", "data_parallel", "values"),
    [(24, 2, 5, "use 20 or 30"), (4, 4, 2, "use 8"), (30, 1, 4, "28 or 32")],
)
def test_batch_that_does_not_split(batch, micro, data_parallel, values):
    with pytest.raises(ConfigError, match=rf"data\.global_batch_size = {batch}: .*{values}"):
        ours.gradient_accumulation(run(batch=batch, micro=micro), data_parallel)


BAD_SECTIONS = {
    "misspelt": (
        {"zero_optimisation": {}},
        "zero_optimisation: unknown key; did you mean deepspeed.zero_optimization?",
    ),
    "misspelt and ours": (
        {"gradient_cliping": 1},
        "gradient_cliping: unknown key; did you mean deepspeed.gradient_clip",
    ),
    "unlike any key": ({"zzz": 1}, "zzz: unknown key; known here: zero_optimization, "),
    "misspelt inside": (
        {"data_types": {"grad_acum_dtype": "fp32"}},
        "did you mean deepspeed.data_types.grad_accum_dtype?",
    ),
    "auto": ({"communication_data_type": "auto"}, 'communication_data_type = "auto": '),
    "auto inside": (
        {"zero_optimization": {"reduce_bucket_size": "auto"}},
        'zero_optimization.reduce_bucket_size = "auto"',
    ),
    "string for bool": ({"disable_python_gc": "yes"}, "disable_python_gc = 'yes': must be true or false"),
    "bool for number": (
        {"zero_optimization": {"reduce_bucket_size": True}},
        "reduce_bucket_size = True: must be a whole number",
    ),
    "bool for object": ({"zero_optimization": True}, "zero_optimization = True: must be an object"),
    "list for object": ({"data_types": []}, "data_types = []: must be an object"),
    "batch": ({"train_batch_size": 8}, "train_batch_size: derived; set data.global_batch_size"),
    "micro-batch": ({"train_micro_batch_size_per_gpu": 1}, "set data.micro_batch_size"),
    "accumulation": ({"gradient_accumulation_steps": 1}, "set data.global_batch_size and data.micro_batch_size"),
    "clipping": ({"gradient_clipping": 1.0}, "set optimizer.gradient_clipping"),
    "optimizer": ({"optimizer": {"type": "Adam"}}, "use our optimizer section"),
    "scheduler": ({"scheduler": {}}, "use our schedule section"),
    "bf16": ({"bf16": {"enabled": True}}, "model.precision"),
    "fp16": ({"fp16": {"enabled": True}}, "model.precision"),
    "amp": ({"amp": {"enabled": True}}, "model.precision"),
    "mesh": ({"mesh_param": [1, 2]}, "skip gradient averaging over the sequence"),
    "sequence": ({"sequence_parallel_size": 2}, "skip gradient averaging over the sequence"),
    "re-entrant": ({"pipeline": {"use_reentrant": False}}, "keep everything that it recomputes"),
    "interval": ({"pipeline": {"activation_checkpoint_interval": 1}}, "parallel.activation_checkpointing"),
    "checkpointing": ({"activation_checkpointing": {}}, "parallel.activation_checkpointing"),
    "timers": ({"wall_clock_breakdown": True}, "crashes with pipeline stages"),
    "profiler": ({"flops_profiler": {"enabled": True}}, "crashes with pipeline stages"),
    "elasticity": ({"elasticity": {}}, "DeepSpeed has removed it"),
    "curriculum": ({"curriculum_learning": {}}, "DeepSpeed has removed it"),
    "sums": ({"gradient_allreduce_op": "sum"}, "have to be averaged"),
    "checkpoint": ({"checkpoint": {"load_universal": True}}, "see our checkpoint section"),
    "round robin": ({"zero_optimization": {"round_robin_gradients": True}}, "has no effect: our optimizer"),
    "parameter dtype": (
        {"data_types": {"param_dtype": "fp32"}},
        "deepspeed.data_types.param_dtype: the precision comes",
    ),
    "misspelt bucket": (
        {"zero_optimization": {"reduce_bucket_sise": 5}},
        "reduce_bucket_sise: unknown key; did you mean deepspeed.zero_optimization.reduce_bucket_size?",
    ),
    "misspelt in the log of communication": (
        {"comms_logger": {"enable": True}},
        "did you mean deepspeed.comms_logger.enabled?",
    ),
    "type inside": (
        {"zero_optimization": {"reduce_bucket_size": "5"}},
        "zero_optimization.reduce_bucket_size = '5': must be a whole number from 1 to 1.09951e+12",
    ),
    "negative inside": ({"zero_optimization": {"reduce_bucket_size": -1}}, "_size = -1: must be a whole number fr"),
    "bool inside": ({"comms_logger": {"verbose": 1}}, "verbose = 1: must be true or false"),
    "no dtype": ({"data_types": {"grad_accum_dtype": "fp61"}}, "grad_accum_dtype = 'fp61': must be one of fp32, bf16"),
    "no level": ({"log_level": "loud"}, "log_level = 'loud': must be one of debug, info"),
    "predivide": ({"gradient_predivide_factor": 2}, "gradient_predivide_factor: has no effect: our optimizer"),
    "gathering": ({"zero_optimization": {"allgather_bucket_size": 5}}, "set reduce_bucket_size"),
    "half precision on the way": ({"communication_data_type": "fp16"}, "must be one of fp32, bf16"),
    "offload": ({"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}, "engine cannot offload"),
    "old offload": ({"zero_optimization": {"cpu_offload": True}}, "engine cannot offload"),
    "no norm": ({"zero_optimization": {"compute_grad_norm": False}}, "the norm is needed"),
    "overlap": ({"zero_optimization": {"overlap_comm": True}}, "always overlaps"),
    "ZeRO-3's": ({"zero_optimization": {"stage3_max_live_parameters": 5}}, "has no effect with ZeRO-1"),
    "buffers": ({"data_types": {"buffer_dtype": "fp32"}}, "the model has no buffers"),
    **{
        monitor: ({monitor: {"enabled": True}}, "set our logging section (logging.dir)")
        for monitor in ("tensorboard", "wandb", "csv_monitor", "comet")
    },
    "ZeRO-2": ({"zero_optimization": {"stage": 2}}, "zero_optimization.stage = 2: must be 1"),
    "ZeRO as text": ({"zero_optimization": {"stage": "1"}}, "zero_optimization.stage = '1': must be 1"),
    "no ZeRO": ({"zero_optimization": {"stage": 0}}, "zero_optimization.stage = 0: must be 1"),
}


@pytest.mark.parametrize(("section", "expected"), BAD_SECTIONS.values(), ids=BAD_SECTIONS.keys())
def test_bad_section(section, expected):
    with pytest.raises(ConfigError) as caught:
        ours.deepspeed_config(run(section), 1)
    assert str(caught.value).startswith("deepspeed.")
    assert expected in str(caught.value)


class Recorder(dict):
    """A dict that remembers which keys it was asked for."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.asked = set()

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def keys(self):
        return self  # so that `key in values.keys()` counts

    def __copy__(self):
        return self


def test_tables_are_those_of_the_installed_deepspeed(as_read):
    inside = {"data_types": Recorder()}
    values = Recorder(train_micro_batch_size_per_gpu=1, **inside)
    as_read(values, 1)
    known = set(ours.ALLOWED) | set(ours.REFUSED)
    # These three are read by deepspeed.initialize before it makes its config, or are arguments of it.
    assert known - values.asked == {"mesh_param", "sequence_parallel_size", "data_parallel_size"}
    assert values.asked <= known
    for name, section in inside.items():
        assert section.asked == set(ours.ALLOWED_INSIDE[name]) | set(ours.REFUSED_INSIDE[name])


MODELS = {"zero_optimization": DeepSpeedZeroConfig, "comms_logger": CommsLoggerConfig}


@pytest.mark.regression
@pytest.mark.parametrize("name", MODELS)
def test_tables_of_the_objects_are_those_of_the_installed_deepspeed(name):
    """Names, types and, of what is refused, the values that are accepted because DeepSpeed takes them by default."""
    fields = {field.alias or key: field for key, field in MODELS[name].model_fields.items()}
    allowed, refused = ours.ALLOWED_INSIDE[name], ours.REFUSED_INSIDE[name]
    assert fields.keys() == allowed.keys() | refused.keys() and not allowed.keys() & refused.keys()
    for key, kind in allowed.items():
        kind = kind.kind if isinstance(kind, ours.Range) else kind
        assert fields[key].annotation is kind or key == "stage", key
    taken = MODELS[name](**{"stage": 1} if "stage" in fields else {})
    by_key = {field.alias or key: getattr(taken, key) for key, field in MODELS[name].model_fields.items()}
    by_key["leaf_module"] = None  # an object that is made afresh
    for key, (default, _) in refused.items():
        assert by_key[key] == default, key


def test_every_object_that_is_allowed_has_a_table():
    assert {key for key, kind in ours.ALLOWED.items() if kind is dict} == ours.ALLOWED_INSIDE.keys()
    assert ours.ALLOWED_INSIDE.keys() == ours.REFUSED_INSIDE.keys()


def test_deepspeed_s_defaults_are_accepted():
    inside = {
        name: {key: default for key, (default, _) in refused.items() if default != "auto"}
        for name, refused in ours.REFUSED_INSIDE.items()
    }
    ours.deepspeed_config(run(inside), 1)


def test_the_model_has_no_buffers():
    """What refuses data_types.buffer_dtype and keep_in_fp32_modules."""
    with torch.device("meta"):
        assert not list(DiT(PRESETS["mugdit_debug"]).buffers())
