"""tools/ema.py from checkpoints to published weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mugv_ds.checkpoint.hf import load_dit
from mugv_ds.checkpoint.store import CONFIG_NAME
from mugv_ds.checkpoint.trained import Contents, TrainedCheckpoint
from mugv_ds.config import load_config
from mugv_ds.config.model import DiTConfig
from mugv_ds.models.dit import Embedders
from mugv_ds.models.layers import Block, FinalLayer
from tests.dataset import write_config
from tools import ema


def write_checkpoint(run: Path, step: int, value: float, **model: int) -> Path:
    """A checkpoint of the tests' tiny model, all of whose weights are `value`."""
    folder = run / f"global_step{step}"
    config = load_config(write_config(run / "config", Path("unused"), model=model))
    folder.mkdir(parents=True)
    (folder / CONFIG_NAME).write_text(config.model_dump_json())
    dit: DiTConfig = config.model.dit()
    for layer, part in enumerate([Embedders, *[Block] * dit.depth, FinalLayer]):
        state = {name: torch.full_like(tensor, value) for name, tensor in part(dit).state_dict().items()}
        torch.save(state, folder / f"layer_{layer:02d}-model_states.pt")
    return folder


class Averaged(TrainedCheckpoint):
    """A checkpoint that also holds averages, smaller than its weights by their widths."""

    def __init__(self, folder: Path, step: int) -> None:
        super().__init__(folder, step)
        self.manifest = Contents(step, ("weight", "ema_0.050", "ema_0.100"))

    def read(self, name: str, kind: str) -> torch.Tensor:
        return super().read(name, kind) - float(kind.removeprefix("ema_"))


def metadata(out: Path) -> dict[str, str]:
    with safe_open(out / "model.safetensors", "pt") as file:
        return file.metadata()


def test_ensemble_of_two_checkpoints(tmp_path, capsys):
    paths = [write_checkpoint(tmp_path / "run", step, float(step)) for step in (20, 10)]
    out = tmp_path / "out"
    assert ema.main(["ensemble", "--gamma", "0.5", "--out", str(out), *map(str, paths)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    for name, weight in load_dit(out).named_parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, 50 / 3), msg=name)
    facts = metadata(out)
    assert facts["gamma"] == "0.5"
    assert [(part["step"], part["coefficient"]) for part in json.loads(facts["average"])] == [(10, 1 / 3), (20, 2 / 3)]


def test_reconstruction_at_the_last_checkpoint(tmp_path, capsys, monkeypatch):
    for step in (10, 20):
        write_checkpoint(tmp_path / "run", step, float(step))
    monkeypatch.setattr("mugv_ds.checkpoint.trained.TrainedCheckpoint", Averaged)
    command = ["reconstruct", "--checkpoints", str(tmp_path / "run"), "--sigma-rel"]
    assert ema.main([*command, "0.1", "--out", str(tmp_path / "out")]) == 0
    assert "warning" not in capsys.readouterr().err
    for name, weight in load_dit(tmp_path / "out").named_parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, 19.9), msg=name)
    (term,) = json.loads(metadata(tmp_path / "out")["average"])
    assert (term["step"], term["kind"]) == (20, "ema_0.100")

    assert ema.main([*command, "0.25", "--out", str(tmp_path / "wide")]) == 0
    assert "warning: the averages" in capsys.readouterr().err
    assert float(metadata(tmp_path / "wide")["fit_error"]) > ema.TOLERANCE


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("reconstruct --sigma-rel 0.08 --checkpoints {run}", "global_step20: holds no averages"),
        ("reconstruct --sigma-rel 0.08 --checkpoints {run}/nowhere", "holds no checkpoint"),
        ("ensemble --gamma 0.9 {run}/global_step10 {other}/global_step30", "average checkpoints of one model"),
        ("ensemble --gamma 0.9 {run}/global_step10 {run}/config", "is no checkpoint"),
        ("ensemble --gamma 0 {run}/global_step10", "γ = 0.0: must be above 0"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(tmp_path, capsys, command, complaint):
    run, other = tmp_path / "run", tmp_path / "other"
    for step in (10, 20):
        write_checkpoint(run, step, 1.0)
    write_checkpoint(other, 30, 1.0, depth=1)
    out = tmp_path / "out"
    assert ema.main([*command.format(run=run, other=other).split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and len(error.splitlines()) == 1
    assert not out.exists()
