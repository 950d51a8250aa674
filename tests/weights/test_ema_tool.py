"""tools/ema.py from checkpoints to published weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mugv_ds.cli import ema
from mugv_ds.config import load_config
from mugv_ds.config.text_encoder import TextEncoderInfo, read_text_encoder
from mugv_ds.models.text import HashTextEncoder
from mugv_ds.weights.base import meta_state
from mugv_ds.weights.published import load_dit
from tests.helpers.dataset import write_config
from tests.helpers.saved import write_checkpoint


def write_run(
    run: Path,
    steps: tuple[int, ...],
    averages: dict[str, float] | None = None,
    began: dict[str, int] | None = None,
    text_encoder: TextEncoderInfo | None = None,
    **model: object,
) -> list[Path]:
    """Checkpoints of the tests' tiny model, all of whose weights are the step; returns their folders."""
    config = load_config(write_config(run / "config", Path("unused"), model=model)).model.dit()
    shapes = {name: value.shape for name, value in meta_state(config).items()}
    return [
        write_checkpoint(
            run,
            step,
            ((name, torch.full(shape, float(step))) for name, shape in shapes.items()),
            averages=averages,
            began=began,
            text_encoder=text_encoder,
            model=model,
        )
        for step in steps
    ]


def metadata(out: Path) -> dict[str, str]:
    with safe_open(out / "model.safetensors", "pt") as file:
        return file.metadata()


def test_ensemble_of_two_checkpoints(tmp_path, capsys):
    paths = write_run(tmp_path / "run", (20, 10))
    out = tmp_path / "out"
    assert ema.main(["ensemble", "--gamma", "0.5", "--out", str(out), *map(str, paths)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    for name, weight in load_dit(out).named_parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, 50 / 3), msg=name)
    facts = metadata(out)
    assert facts["gamma"] == "0.5"
    assert [(part["step"], part["coefficient"]) for part in json.loads(facts["average"])] == [(10, 1 / 3), (20, 2 / 3)]


def test_an_average_says_what_encoded_the_text_and_is_of_one_encoder(tmp_path, capsys):
    infos = [HashTextEncoder(16, tokens).info for tokens in (6, 6, 7)]
    paths = [write_run(tmp_path / str(i), (i,), text_encoder=info)[0] for i, info in enumerate(infos)]
    command = ["ensemble", "--gamma", "1", "--out"]
    assert ema.main([*command, str(tmp_path / "out"), *map(str, paths[:2])]) == 0
    assert read_text_encoder(tmp_path / "out") == infos[0]
    assert ema.main([*command, str(tmp_path / "other"), *map(str, paths)]) == 2
    assert "average checkpoints that were trained on the same features" in capsys.readouterr().err


def test_an_ensemble_is_in_the_precision_that_the_run_computed_with(tmp_path):
    paths = write_run(tmp_path / "run", (1, 2), precision="fp8")
    assert ema.main(["ensemble", "--gamma", "1", "--out", str(tmp_path / "out"), *map(str, paths)]) == 0
    assert {(p.dtype, p.flatten()[0].item()) for p in load_dit(tmp_path / "out").parameters()} == {
        (torch.bfloat16, 1.5)
    }


def test_reconstruction_at_the_last_checkpoint(tmp_path, capsys):
    write_run(tmp_path / "run", (10, 20), {"ema_0.050": 0.75, "ema_0.100": 0.5})
    command = ["reconstruct", "--checkpoints", str(tmp_path / "run"), "--sigma-rel"]
    assert ema.main([*command, "0.1", "--out", str(tmp_path / "out")]) == 0
    assert "warning" not in capsys.readouterr().err
    for name, weight in load_dit(tmp_path / "out").named_parameters():
        torch.testing.assert_close(weight, torch.full_like(weight, 10.0), msg=name)
    (term,) = json.loads(metadata(tmp_path / "out")["average"])
    assert (term["step"], term["kind"]) == (20, "ema_0.100")

    assert ema.main([*command, "0.25", "--out", str(tmp_path / "wide")]) == 0
    assert "warning: the averages" in capsys.readouterr().err
    assert float(metadata(tmp_path / "wide")["fit_error"]) > ema.TOLERANCE


def test_an_average_that_was_switched_on_later_is_called_so(tmp_path, capsys):
    write_run(tmp_path / "run", (10, 20), {"ema_0.100": 0.5}, began={"ema_0.100": 7})
    command = ["reconstruct", "--checkpoints", str(tmp_path / "run"), "--sigma-rel", "0.1"]
    assert ema.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "warning: ema_0.100 was switched on after step 7" in capsys.readouterr().err
    assert metadata(tmp_path / "out")["began"] == "ema_0.100 was switched on after step 7"


def test_only_what_is_read_is_verified(tmp_path, capsys):
    """A reconstruction reads no weights, an ensemble no averages: neither minds a file of the other that is broken."""
    folders = write_run(tmp_path / "run", (10, 20), {"ema_0.100": 0.5})
    commands = {
        "ema_0.100": ["reconstruct", "--checkpoints", str(tmp_path / "run"), "--sigma-rel", "0.1"],
        "weight": ["ensemble", "--gamma", "0.9", *map(str, folders)],
    }

    def flip(kind: str) -> None:
        for folder in folders:
            file = folder / f"rank-1.{kind}.safetensors"
            data = file.read_bytes()
            file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))

    for broken in commands:
        flip(broken)
        for kind, command in commands.items():
            status = ema.main([*command, "--out", str(tmp_path / f"{kind} with {broken} broken")])
            assert status == (2 if kind == broken else 0), (kind, broken)
        assert f"rank-1.{broken}.safetensors: its SHA-256 differs" in capsys.readouterr().err
        flip(broken)


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("reconstruct --sigma-rel 0.08 --checkpoints {run}", "step-00000020: holds no averages"),
        ("reconstruct --sigma-rel 0.08 --checkpoints {run}/nowhere", "holds no checkpoint"),
        ("ensemble --gamma 0.9 {run}/step-00000010 {other}/step-00000030", "average checkpoints of one model"),
        ("ensemble --gamma 0.9 {run}/step-00000010 {run}/config", "config: holds no checkpoint"),
        ("ensemble --gamma 0.9 {run}/step-00000010 {broken}/step-00000010", "SHA-256 differs"),
        ("ensemble --gamma 0 {run}/step-00000010", "γ = 0.0: must be above 0"),
    ],
)
def test_what_cannot_be_averaged_is_one_line(tmp_path, capsys, command, complaint):
    run, other, broken, out = (tmp_path / name for name in ("run", "other", "broken", "out"))
    write_run(run, (10, 20))
    write_run(other, (30,), depth=1)
    for damaged in write_run(broken, (10, 20))[0].glob("rank-1.*"):
        damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x01")
    assert ema.main([*command.format(run=run, other=other, broken=broken).split(), "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and complaint in error and len(error.splitlines()) == 1
    assert not out.exists()
