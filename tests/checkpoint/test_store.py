"""What DeepSpeed may load from a checkpoint."""

import os
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
from deepspeed.runtime.zero.config import ZeroStageEnum

from mugv_ds.checkpoint.store import _trusting_no_pickle


class Payload:
    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self):
        return os.system, (f"touch {self.sentinel}",)


def load(path: Path) -> dict:
    """As DeepSpeed does it, which asks torch.load for anything a pickle can hold."""
    with _trusting_no_pickle():
        return TorchCheckpointEngine().load(str(path), map_location="cpu")


def test_a_payload_in_a_shard_does_not_run(tmp_path):
    torch.save({"optimizer_state_dict": Payload(tmp_path / "sentinel")}, tmp_path / "shard.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        load(tmp_path / "shard.pt")
    assert not (tmp_path / "sentinel").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_what_shards_hold_is_loaded(tmp_path):
    torch.save({"zero_stage": ZeroStageEnum.optimizer_states, "weight": torch.ones(2)}, tmp_path / "shard.pt")
    shard = load(tmp_path / "shard.pt")
    assert shard["zero_stage"] == ZeroStageEnum.optimizer_states and shard["weight"].sum() == 2
