"""Config files: what a good one becomes, and the one line that every bad one gets."""

import copy
import json
import multiprocessing
import os
import re
from types import UnionType
from typing import Annotated, Union, get_args, get_origin

import pytest
from pydantic import BaseModel

from mugv_ds.config import ConfigError, TrainConfig, load_config

GOOD = {
    "model": {"preset": "mugdit_debug"},
    "data": {"manifest": "train.csv", "null_text_path": "null.pt", "global_batch_size": 12, "micro_batch_size": 2},
    "optimizer": {"lr": 1e-4, "betas": [0.9, 0.95]},
    "schedule": {"steps": 10},
    "checkpoint": {"dir": "runs/x"},
    "logging": {"dir": "runs/x/events"},
    "deepspeed": {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1000}},
}


def write(folder, name, values):
    path = folder / name
    path.write_text(values if isinstance(values, str) else json.dumps(values), encoding="utf-8")
    return path


def error_of(path, overrides=()):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_good_file(tmp_path):
    config = load_config(write(tmp_path, "run.json", GOOD))
    assert config.optimizer.betas == (0.9, 0.95)
    assert config.model.dit().hidden_size == 288
    assert config.deepspeed == GOOD["deepspeed"]
    assert config.parallel.sequence == 1


def test_extends_merges_objects_and_replaces_the_rest(tmp_path):
    (tmp_path / "shared").mkdir()
    write(tmp_path / "shared", "base.json", GOOD)
    write(tmp_path / "shared", "middle.json", {"extends": "base.json", "optimizer": {"lr": 3e-4, "eps": 1e-8}})
    top = {
        "extends": "shared/middle.json",
        "optimizer": {"lr": 5e-4, "betas": [0.8, 0.9]},
        "deepspeed": {"zero_optimization": {"reduce_bucket_size": 7}},
    }
    config = load_config(write(tmp_path, "run.json", top))
    assert (config.optimizer.lr, config.optimizer.eps, config.optimizer.betas) == (5e-4, 1e-8, (0.8, 0.9))
    assert config.deepspeed == {"zero_optimization": {"stage": 1, "reduce_bucket_size": 7}}
    assert config.data.manifest == "train.csv"


def test_overrides_come_last_and_are_json_or_strings(tmp_path):
    path = write(tmp_path, "run.json", GOOD)
    overrides = [
        "optimizer.lr=1",
        "optimizer.lr=2e-4",
        "optimizer.betas=[0.5, 0.6]",
        "data.manifest=other/a=b.csv",
        "logging.progress=false",
        "data.val_manifest=null",
        "deepspeed.zero_optimization.stage=1",
    ]
    config = load_config(path, overrides)
    assert (config.optimizer.lr, config.optimizer.betas) == (2e-4, (0.5, 0.6))
    assert (config.data.manifest, config.data.val_manifest) == ("other/a=b.csv", None)
    assert config.logging.progress is False
    assert config.deepspeed["zero_optimization"] == {"stage": 1, "reduce_bucket_size": 1000}


def text(**sections):
    return json.dumps({**GOOD, **sections})


BAD_FILES = {
    "empty": ("", "run.json:1:1: not JSON"),
    "trailing comma": ('{"model": {},\n  "data": {},}', "run.json:2:14: not JSON"),
    "a list": ("[]", "run.json: must hold a JSON object"),
    "duplicate section": ('{"model": {}, "model": {}}', "run.json: model: appears twice"),
    "duplicate key": ('{"data": {"seed": 1, "seed": 2}}', "run.json: seed: appears twice"),
    "NaN": ('{"optimizer": {"lr": NaN}}', "run.json: optimizer.lr = NaN: must be a finite number"),
    "Infinity in a list": (
        '{"optimizer": {"betas": [0.9, Infinity]}}',
        "optimizer.betas.1 = Infinity: must be a finite",
    ),
    "overflow": ('{"deepspeed": {"a": {"b": -1e999}}}', "run.json: deepspeed.a.b = -Infinity: must be a finite"),
    "too many digits": ('{"schedule": {"steps": ' + "9" * 5000 + "}}", "run.json: Exceeds the limit"),
    "too many brackets": ("[" * 100_000, "run.json: maximum recursion depth"),
    "unknown section": (text(optimiser={}), "run.json: optimiser: unknown key; did you mean optimizer?"),
    "unknown key": (text(optimizer={"lrr": 1}), "run.json: optimizer.lrr: unknown key; did you mean optimizer.lr?"),
    "unlike any key": (text(schedule={"steps": 1, "zzz": 1}), "schedule.zzz: unknown key; known here: kind, warmup"),
    "missing section": (json.dumps({k: v for k, v in GOOD.items() if k != "data"}), "run.json: data: required"),
    "missing key": (text(schedule={}), "run.json: schedule.steps: required"),
    "string for a section": (text(model="mugdit_10b"), 'run.json: model = "mugdit_10b": must be an object'),
    "string for int": (text(schedule={"steps": "10"}), 'run.json: schedule.steps = "10": must be a valid integer'),
    "float for int": (text(schedule={"steps": 10.5}), "run.json: schedule.steps = 10.5: must be a valid integer"),
    "bool for int": (text(schedule={"steps": True}), "run.json: schedule.steps = true: must be a valid integer"),
    "negative rate": (text(optimizer={"lr": -1.0}), "run.json: optimizer.lr = -1.0: must be greater than 0"),
    "item of a pair": (text(optimizer={"betas": [0.9, 1.5]}), "run.json: optimizer.betas.1 = 1.5: must be less"),
    "unknown preset": (text(model={"preset": "10b"}), """run.json: model.preset = "10b": must be 'mugdit_debug'"""),
    "neither of a union": (
        text(flow={"shift": "auto"}),
        """flow.shift = "auto": must be 'resolution' or a valid number""",
    ),
    "two wrong keys": (
        text(schedule={"steps": 0, "warmup_steps": -1}),
        "must be greater than or equal to 0 (and 1 more)",
    ),
    "extends a number": ('{"extends": 3}', "run.json: extends = 3: must be the path"),
    "extends nothing": ('{"extends": "no.json"}', "run.json: extends: there is no regular file"),
    "extends itself": ('{"extends": "run.json"}', "run.json is extended in a circle"),
    "sizes that do not fit": (
        text(model={"preset": "mugdit_debug", "num_heads": 5}),
        "run.json: model.hidden_size = 288",
    ),
    "heads": (
        text(parallel={"sequence": 5}),
        "run.json: parallel.sequence = 5: does not divide the 4 attention heads of mugdit_debug; use 1, 2 or 4",
    ),
    "stages": (
        text(parallel={"pipeline": 3}),
        "run.json: parallel.pipeline = 3: more stages than the 2 blocks of mugdit_debug; use at most 2",
    ),
    "micro-batch": (
        text(data={**GOOD["data"], "micro_batch_size": 5}),
        "data.micro_batch_size = 5: does not divide data.global_batch_size = 12; use 1, 2, 3, 4, 6 or 12",
    ),
    "dropped captions": (
        text(data={"manifest": "m.csv", "global_batch_size": 1}),
        "run.json: data.null_text_path: required when flow.caption_drop > 0",
    ),
    "previews of nothing": (
        text(preview={"every": 10, "dir": "x"}),
        "run.json: preview.manifest: required when preview.every > 0; give it, or set preview.every to 0",
    ),
    "previews nowhere": (text(preview={"every": 10, "manifest": "m.csv"}), "run.json: preview.dir: required when"),
    "previews without negative prompt": (
        text(
            preview={"every": 10, "manifest": "m.csv", "dir": "x"},
            data={"manifest": "m.csv", "global_batch_size": 1},
            flow={"caption_drop": 0.0},
        ),
        "run.json: data.null_text_path: required when preview.every > 0",
    ),
    "an average's width": (text(ema={"sigma_rel": [0.05, 0.3]}), "run.json: ema.sigma_rel.1 = 0.3: must be less than"),
    "a width that names nothing": (text(ema={"sigma_rel": [0.0525]}), "run.json: ema.sigma_rel = [0.0525]: must be"),
    "a width twice": (text(ema={"sigma_rel": [0.1, 0.1]}), "run.json: ema.sigma_rel = [0.1, 0.1]: must be different"),
    "DeepSpeed's key": (text(deepspeed={"zero_optimisation": {}}), "did you mean deepspeed.zero_optimization?"),
}


@pytest.mark.parametrize(("content", "expected"), BAD_FILES.values(), ids=BAD_FILES.keys())
def test_bad_file(tmp_path, content, expected):
    message = error_of(write(tmp_path, "run.json", content))
    assert message.startswith(str(tmp_path / "run.json"))
    assert expected in message


# Every section and list of the schema, so that each key has a place.
FULL = {
    **GOOD,
    "model": {**GOOD["model"], "fp8_blocks": [0, 0]},
    "data": {
        **GOOD["data"],
        "budget": {"shape": [2, 4, 4], "multiple": 2, "device_tokens": 64},
        "mixture": [{"name": "all", "frames": [1, 2], "share": [[0, 1.0]]}],
    },
    "flow": {"shift": 1.0},
    "ema": {"sigma_rel": [0.05]},
    "preview": {},
    "evaluation": {},
    "guard": {},
    "preflight": {},
    "monitor": {},
    "parallel": {},
    "preference": {"objective": "kto", "sources": [{"name": "a", "manifest": "a.csv"}]},
    "lora": {},
    "reward": {
        "manifest": "p.csv",
        "dir": "rounds",
        "codec": "vae.pt",
        "prompts": 4,
        "rollouts": 4,
        "functions": [{"name": "a", "weights": {"a": 1.0}, "command": ["judge"]}],
    },
}


def numeric_keys(annotation, key=()):
    """The keys below `annotation` whose values are numbers, as paths, with the type."""
    if annotation in (int, float):
        yield key, annotation
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        for name, field in annotation.model_fields.items():
            yield from numeric_keys(field.annotation, (*key, name))
    elif get_origin(annotation) is tuple:
        for place, item in enumerate(item for item in get_args(annotation) if item is not Ellipsis):
            yield from numeric_keys(item, (*key, place))
    elif get_origin(annotation) is Annotated:
        yield from numeric_keys(get_args(annotation)[0], key)
    elif get_origin(annotation) in (Union, UnionType):
        for item in get_args(annotation):
            yield from numeric_keys(item, key)


NUMERIC = {".".join(map(str, key)): (key, kind) for key, kind in numeric_keys(TrainConfig)}


def test_the_walk_finds_the_numbers():
    assert len(NUMERIC) > 60
    assert {"optimizer.betas.1", "data.budget.shape.2", "data.mixture.0.share.0.0", "flow.shift"} <= set(NUMERIC)


@pytest.mark.regression
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("name", NUMERIC)
def test_absurd_numbers_are_refused(tmp_path, name, sign):
    (*outer, last), kind = NUMERIC[name]
    values = copy.deepcopy(FULL)
    place = values
    for part in outer:
        place = place[part]
    place[last] = sign * (10**20 if kind is int else 1e300)
    message = error_of(write(tmp_path, "run.json", values))
    assert f"run.json: {name} = " in message and re.search(r"must be .*(less|greater) than", message), message


@pytest.mark.regression
@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optimizer.betas=[1.0, 0.9]", "optimizer.betas.0 = 1.0: must be less than 1"),
        ("optimizer.betas=[0.9, 1]", "optimizer.betas.1 = 1: must be less than 1"),
        ("optimizer.eps=0", "optimizer.eps = 0: must be greater than or equal to 0.000000000000001"),
        ("optimizer.lr=1.5", "optimizer.lr = 1.5: must be less than or equal to 1"),
        ("optimizer.width_reference=0", "optimizer.width_reference = 0: must be greater than or equal to 72"),
        ("optimizer.width_reference=100", "optimizer.width_reference = 100: must be a multiple of 72"),
        (
            "optimizer.width_reference=131112",
            "optimizer.width_reference = 131112: must be less than or equal to 131072",
        ),
        ("data.seed=9223372036854775808", "data.seed = 9223372036854775808: must be less than 9223372036854775808"),
        ("model.num_heads=1000000000000", "model.num_heads = 1000000000000: must be less than or equal to 1024"),
        ("guard.spike_factor=0.5", "guard.spike_factor = 0.5: must be greater than 1"),
        ("guard.spike_factor=1", "guard.spike_factor = 1: must be greater than 1"),
        ("guard.timeout_s=0.5", "guard.timeout_s = 0.5: must be greater than or equal to 1"),
        ('data.budget={"shape": [1, 4, 4], "multiple": 13, "device_tokens": 9}', "data.budget.multiple = 13: a step"),
    ],
)
def test_numbers_without_sense_are_refused(tmp_path, override, expected):
    assert expected in error_of(write(tmp_path, "run.json", GOOD), [override])


def test_adapters_have_no_rule_for_the_width(tmp_path):
    path = write(tmp_path, "run.json", GOOD | {"lora": {"rank": 2}})
    assert "optimizer.width_reference: there is no rule for" in error_of(path, ["optimizer.width_reference=72"])


def test_the_proxy_and_the_10b_share_a_rate_in_the_stages_that_both_train():
    for stage in ("stage1", "stage2"):
        proxy, wide = load_config(f"2b/{stage}"), load_config(stage)
        assert (proxy.optimizer, proxy.widths, wide.widths) == (wide.optimizer, (1728, 1728), (3456, 1728))
        assert load_config(f"debug/{stage}").widths is None


SOURCES = '[{"name": "a", "manifest": "a.csv", "weight": 2.0}]'
IDLE = {
    "final rate": (["schedule.final_lr_ratio=0.1"], 'schedule.final_lr_ratio: has no effect with schedule.kind = "con'),
    "profile": (["logging.profile_step=11"], "logging.profile_step: has no effect after the last step, schedule.steps"),
    "validation": (["logging.eval_every=5"], "logging.eval_every: has no effect without data.val_manifest"),
    "changed data": (
        ["checkpoint.accept_changed_data=true", "checkpoint.resume=never"],
        'checkpoint.accept_changed_data: has no effect with checkpoint.resume = "never" and without checkpoint.init',
    ),
    "good": (["preference.good_weight=2.0"], 'preference.good_weight: has no effect with preference.objective = "dpo"'),
    "bad": (["preference.bad_weight=2.0"], 'preference.bad_weight: has no effect with preference.objective = "dpo"'),
    "one source": ([f"preference.sources={SOURCES}"], "preference.sources.0.weight: has no effect on a single source"),
    **{
        f"preview {name}": ([f"preview.{name}={value}"], f"preview.{name}: has no effect without preview.every")
        for name, value in {
            "manifest": "m.csv", "count": 5, "steps": 5, "guidance": 2.0, "first_frame": "true", "codec": "c",
            "dir": "d",
        }.items()
    },
}  # fmt: skip


@pytest.mark.regression
@pytest.mark.parametrize(("overrides", "expected"), IDLE.values(), ids=IDLE.keys())
def test_settings_that_do_nothing_are_refused(tmp_path, overrides, expected):
    values = copy.deepcopy(GOOD)
    if any(override.startswith("preference.") for override in overrides):
        values["preference"] = {"objective": "dpo", "sources": [{"name": "a", "manifest": "a.csv"}]}
    message = error_of(write(tmp_path, "run.json", values), overrides)
    assert expected in message and message.endswith("; leave it out")


def test_defaults_that_do_nothing_and_switches_set_to_0_are_accepted(tmp_path):
    """The merged config that a run prints, with all keys, is a config; so is one whose previews are switched off."""
    preference = {"objective": "dpo", "sources": [{"name": "a", "manifest": "a.csv"}]}
    path = write(tmp_path, "run.json", {**GOOD, "preference": preference})
    config = load_config(path)
    assert load_config(write(tmp_path, "whole.json", config.model_dump_json())) == config
    overrides = ["preview.every=0", "preview.manifest=m.csv", "logging.eval_every=5", "data.val_manifest=v.csv"]
    assert load_config(path, overrides).preview.manifest == "m.csv"


BAD_OVERRIDES = {
    "no value": ("optimizer.lr", "override 'optimizer.lr': must read section.key=value"),
    "no key": ("optimizer=1", "override 'optimizer=1': must read section.key=value"),
    "empty key": ("optimizer..lr=1", "must read section.key=value"),
    "unknown section": ("optim.lr=1", "override 'optim.lr=1': optim: unknown key; did you mean optimizer?"),
    "unknown key": ("optimizer.lrr=1", "override 'optimizer.lrr=1': optimizer.lrr: unknown key; did you mean"),
    "wrong type": (
        "schedule.steps=ten",
        """override 'schedule.steps=ten': schedule.steps = "ten": must be a valid int""",
    ),
    "NaN": ("optimizer.lr=NaN", "override 'optimizer.lr=NaN': optimizer.lr = NaN: must be a finite number"),
    "duplicate": ('deepspeed.checkpoint={"a": 1, "a": 2}', "a: appears twice"),
}


@pytest.mark.parametrize(("override", "expected"), BAD_OVERRIDES.values(), ids=BAD_OVERRIDES.keys())
def test_bad_override(tmp_path, override, expected):
    assert expected in error_of(write(tmp_path, "run.json", GOOD), [override])


def test_message_names_the_file_that_holds_the_key(tmp_path):
    base = copy.deepcopy(GOOD)
    base["optimizer"]["lr"] = "fast"
    write(tmp_path, "base.json", base)
    top = write(tmp_path, "run.json", {"extends": "base.json", "optimizer": {"eps": 1e-8}})
    assert error_of(top).startswith(f'{tmp_path / "base.json"}: optimizer.lr = "fast"')


def test_circle_of_two_files(tmp_path):
    write(tmp_path, "a.json", {"extends": "b.json"})
    write(tmp_path, "b.json", {"extends": "a.json"})
    assert "extended in a circle" in error_of(tmp_path / "a.json")


def test_not_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "fifo.json")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "fifo.json"):
        assert f"there is no regular file {path}" in error_of(path)


def test_not_utf8(tmp_path):
    (tmp_path / "run.json").write_bytes(b'{"model": "\xff"}')
    assert "run.json: not UTF-8 text: invalid start byte at byte 11" in error_of(tmp_path / "run.json")


def test_a_diamond_of_many_floors_is_read_once(tmp_path):
    write(tmp_path, "0a.json", GOOD)
    write(tmp_path, "0b.json", {"extends": "0a.json", "schedule": {"steps": 7}})
    for floor in range(1, 25):
        for side, lr in (("a", 2e-4), ("b", 3e-4)):
            below = [f"{floor - 1}a.json", f"{floor - 1}b.json"]
            write(tmp_path, f"{floor}{side}.json", {"extends": below, "optimizer": {"lr": lr}})
    reading = multiprocessing.get_context("fork").Process(target=lambda: load_config(tmp_path / "24a.json"))
    reading.start()
    reading.join(10)
    if reading.is_alive():
        reading.kill()
        raise AssertionError("not read after 10 s")
    found = load_config(tmp_path / "24a.json")
    assert (found.schedule.steps, found.optimizer.lr) == (7, 2e-4)


def test_a_file_that_comes_twice_counts_as_if_it_were_read_twice(tmp_path):
    """d, b, d, c, a is the order; d comes after b."""
    write(tmp_path, "d.json", {**GOOD, "optimizer": {"lr": 1e-4}})
    write(tmp_path, "b.json", {"extends": "d.json", "optimizer": {"lr": 2e-4, "eps": 1e-7}})
    write(tmp_path, "c.json", {"extends": "d.json"})
    found = load_config(write(tmp_path, "a.json", {"extends": ["b.json", "c.json"]}))
    assert (found.optimizer.lr, found.optimizer.eps) == (1e-4, 1e-7)


def test_files_are_few_and_small(tmp_path):
    write(tmp_path, "0.json", GOOD)
    for n in range(1, 101):
        write(tmp_path, f"{n}.json", {"extends": f"{n - 1}.json"})
    assert load_config(tmp_path / "99.json").optimizer.lr == 1e-4
    assert "0.json would be file 101 of this config" in error_of(tmp_path / "100.json")
    for n in range(101, 2000):
        write(tmp_path, f"{n}.json", {"extends": f"{n - 1}.json"})
    assert "would be file 101 of this config" in error_of(tmp_path / "1999.json")
    large = write(tmp_path, "large.json", json.dumps(GOOD) + " " * (1 << 20))
    assert error_of(large) == f"{large}: larger than 1,048,576 bytes; is this the right file?"


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["FIFO", "device"])
def test_what_is_no_file_is_not_extended(tmp_path, make):
    make(tmp_path / "base.json")
    assert "extends: there is no regular file" in error_of(write(tmp_path, "run.json", {"extends": "base.json"}))
