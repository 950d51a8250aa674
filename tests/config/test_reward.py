"""What a reward section asks of the rest of a config, and of its functions."""

import json

import pytest

from mugv_ds.config import ConfigError, load_config

FUNCTION = {"name": "judge", "weights": {"a": 1.0}, "command": ["python", "judge.py"]}
REWARD = {
    "manifest": "prompts.csv",
    "dir": "rounds",
    "codec": "vae.pt",
    "functions": [FUNCTION],
    "prompts": 4,
    "rollouts": 6,
    "passes": 2,
}
GOOD = {
    "model": {"preset": "mugdit_debug"},
    "data": {"manifest": "train.csv", "global_batch_size": 8},
    "flow": {"caption_drop": 0.0},
    "schedule": {"steps": 10},
    "checkpoint": {"dir": "checkpoints", "init_from": "sft"},
    "logging": {"dir": "tensorboard"},
    "reward": REWARD,
}


def load(tmp_path, **sections):
    config = GOOD | {name: GOOD.get(name, {}) | section for name, section in sections.items()}
    (tmp_path / "run.json").write_text(json.dumps(config))
    return load_config(tmp_path / "run.json")


def test_a_round_is_a_number_of_steps(tmp_path):
    config = load(tmp_path)
    assert config.steps_per_round == 6 and config.reward.weights == {"a": 1.0}


def with_function(**changes):
    function = {name: value for name, value in (FUNCTION | changes).items() if value is not None}
    return {"reward": {"functions": [function]}}


@pytest.mark.parametrize(
    ("sections", "named"),
    {
        "batch": (
            {"data": {"global_batch_size": 5}},
            r"data\.global_batch_size = 5: must divide .* = 48, .* use 1, 2, 3",
        ),
        "start": ({"checkpoint": {"init_from": None}}, r"checkpoint\.init_from: required with reward"),
        "null text": ({"reward": {"guidance": 4.0}}, r"data\.null_text_path: required when reward\.guidance is not 1"),
        "mixture": (
            {"data": {"mixture": [{"name": "a", "share": [[0, 1.0]]}]}},
            r"data\.mixture: the real data beside",
        ),
        "budget": (
            {"data": {"budget": {"shape": [1, 4, 4], "device_tokens": 64}}},
            r"data\.budget: does not go with reward",
        ),
        "preference": (
            {"preference": {"objective": "dpo", "sources": [{"name": "a", "manifest": "a.csv"}]}},
            r"preference: does not go with reward",
        ),
        "one rollout": ({"reward": {"rollouts": 1}}, r"reward\.rollouts"),
        "no judge": (with_function(command=None), r"judge: must have one of command, url and entry_point, none given"),
        "two judges": (with_function(url="http://a/"), r"must have one of .*, command and url given"),
        "a file": (with_function(command=None, url="file:///etc/passwd"), r"reward\.functions\.0\.url"),
        "no function": (with_function(command=None, entry_point="os.system"), r"functions\.0\.entry_point"),
        "in process": (with_function(in_process=True), r"in_process: has no effect without entry_point"),
        "no weight": (with_function(weights={"a": 0.0}), r"all weights are 0"),
        "two names": ({"reward": {"functions": [FUNCTION, FUNCTION]}}, r"names must differ, these are judge, judge"),
        "two numbers": (
            {"reward": {"functions": [FUNCTION, FUNCTION | {"name": "other"}]}},
            r"names of numbers must differ, these are a, a",
        ),
    }.values(),
)
def test_what_does_not_go_together_is_named(tmp_path, sections, named):
    with pytest.raises(ConfigError, match=named):
        load(tmp_path, **sections)
