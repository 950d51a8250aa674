"""The sweep over rates: what it trains, what it does not train again, and the table."""

import json

from mugv_ds.cli import sweep
from tests.helpers.dataset import write_config, write_dataset
from tests.helpers.launcher import ROOT


def test_the_table_names_the_best_rates_and_when_the_first_case_is_reached():
    cases = [sweep.Case.parse("adamw"), sweep.Case.parse("muon optimizer.kind=muon")]
    assert cases[1] == sweep.Case("muon", ("optimizer.kind=muon",))
    curves = {
        ("adamw", -9): {0: 2.0, 10: 1.5, 20: 1.0},
        ("adamw", -8): {0: 2.0, 10: 1.6, 20: 0.9},
        ("muon", -9): {0: 2.0, 10: 0.9, 20: 0.8},
        ("muon", -8): {0: 2.0, 10: 0.7, 20: 0.85},
    }
    assert sweep.report(cases, [-9, -8], curves).splitlines() == [
        "| rate | adamw | muon |",
        "|---|---|---|",
        "| 2^-9 | 1.0000 | **0.8000** |",
        "| 2^-8 | **0.9000** | 0.8500 |",
        "adamw: best at 2^-8; 0.9000 reached after 20 of 20 steps (100%)",
        "muon: best at 2^-9; 0.9000 reached after 10 of 20 steps (50%)",
    ]


def test_every_rate_is_trained_once(tmp_path, capfd):
    manifest, held_out = write_dataset(tmp_path, [(1, 4, 4)] * 4), write_dataset(tmp_path, [(1, 4, 4)] * 2, "val")
    config = write_config(tmp_path / "run", manifest, data={"val_manifest": str(held_out)}, logging={"eval_every": 2})
    command = ["--config", str(config), "--powers", "-9", "-6", "--case", "plain", "--out", str(tmp_path / "sweep")]
    assert sweep.main([*command, "--set", "schedule.steps=4"]) == 0
    table = capfd.readouterr().out
    curves = [sweep.held_out(tmp_path / "sweep/plain" / power) for power in ("-9", "-6")]
    assert [list(curve) for curve in curves] == [[0, 2, 4]] * 2
    assert curves[0][0] == curves[1][0] and curves[0][4] != curves[1][4], "the rates must differ"
    for curve in curves:
        assert f"{curve[4]:.4f}" in table
    events = {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("events.*")}
    assert sweep.main([*command, "--set", "schedule.steps=4"]) == 0
    assert capfd.readouterr().out == table
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "sweep").rglob("events.*")} == events


def test_a_config_that_holds_nothing_out_is_refused(tmp_path, capsys):
    config = tmp_path / "run.json"
    extended = {"extends": str(ROOT / "ds_configs/debug.json"), "data": {"val_manifest": None}}
    config.write_text(json.dumps(extended | {"logging": {"eval_every": 0}}))
    assert sweep.main(["--config", str(config), "--powers", "-9", "--case", "plain", "--out", str(tmp_path)]) == 2
    assert "data.val_manifest: required" in capsys.readouterr().err
