"""RAFT is an option that says what it lacks, and gives pixels."""

import importlib
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from mugv_ds.config.errors import InputError
from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.prepare.raft import raft_flow


class Steady(torch.nn.Module):
    """Stands for torchvision's model: everything moves by (6, 8) pixels of the frames that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, before, after):
        assert before.shape == after.shape and before.abs().max() <= 1
        self.sides = before.shape[-2:]
        moved = torch.tensor([6.0, 8.0])[None, :, None, None].expand(1, 2, *before.shape[-2:])
        return [moved * 0, moved]


@pytest.fixture
def torchvision(monkeypatch):
    for name in ("torchvision", "torchvision.models", "torchvision.models.optical_flow"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["torchvision.models.optical_flow"].raft_large = lambda weights, progress: Steady()


def test_flow_is_in_pixels_of_the_frames_given(torchvision, tmp_path):
    torch.save(Steady().state_dict(), tmp_path / "raft.pth")
    flow = raft_flow(str(tmp_path / "raft.pth"))
    assert flow(*np.zeros((2, 360, 640, 3), np.uint8)) == pytest.approx(10)
    # 64 × 64 is shown to it twice as large.
    assert flow(*np.zeros((2, 64, 64, 3), np.uint8)) == pytest.approx(5)


def test_weights_that_cannot_be_used(torchvision, tmp_path):
    torch.save({"other": torch.zeros(1)}, tmp_path / "raft.pth")
    with pytest.raises(InputError, match=r"raft.pth: no weights of torchvision's raft_large"):
        raft_flow(str(tmp_path / "raft.pth"))
    with pytest.raises(ValidationError, match="motion_weights"):
        PrepareConfig.model_validate({"probe": {"motion_method": "raft"}})


def test_without_torchvision(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    importlib.invalidate_caches()
    with pytest.raises(InputError, match="needs torchvision"):
        raft_flow(str(tmp_path / "raft.pth"))
