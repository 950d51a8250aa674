"""tools/calibrate.py at toy size: what it writes is a calibration that steps can be predicted with."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mugv_ds.cli import calibrate
from mugv_ds.cli.calibrate import TOY, Clock, StandIn, main
from mugv_ds.plan.calibration import load_calibration
from mugv_ds.plan.timing import Piece, Timing
from tests.helpers.distributed import free_port

ROOT = Path(__file__).parents[2]
PARTS = ["copies", "optimizer", "ends", "attention", "rest", "products"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for one another take most of the time at these sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("calibration")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "1")
        options = ["--toy", "--out", str(folder), "--attention", "sdpa"]
        assert main([*options, "--only", *PARTS]) == 0
    return folder


def written(folder):
    (path,) = folder.iterdir()
    return load_calibration(path)


def test_one_device(folder):
    calibration = written(folder)
    assert {(p.batch, p.tokens, p.heads) for p in calibration.attention} == {*TOY.attention, *TOY.once}
    shapes = {(p.width, p.batch, p.tokens) for p in calibration.blocks}
    assert shapes == {(w, 1, n) for w in TOY.widths for n in TOY.lengths} | {(TOY.widths[0], 2, 32)}
    assert len(calibration.blocks) == 3 * len(shapes) and not any(p.attention for p in calibration.blocks)
    assert calibration.machine.attention == "sdpa"
    times = [p.forward_s for p in (*calibration.blocks, *calibration.attention, *calibration.products)]
    assert all(0 < seconds < 60 for seconds in times)
    timing = Timing(calibration)
    forward, backward = timing.block(Piece(144, 2, 1, 64, 1, 300), "selective")
    assert 0 < forward.total < backward.total


def test_what_is_measured_again_takes_the_place_of_what_was_there(folder, capsys, monkeypatch):
    before = written(folder)
    monkeypatch.setattr(calibrate, "TOY", replace(TOY, ends=((3, (1, 4, 8)),)))
    options = ["--toy", "--out", str(folder), "--attention", "sdpa"]
    assert main([*options, "--only", "optimizer", "ends", "--levels", "off"]) == 0
    after = written(folder)
    assert [p.elements for p in after.optimizer] == list(TOY.elements)
    assert after.optimizer != before.optimizer and after.blocks == before.blocks
    assert {p.batch for p in after.ends} == {1, 2, 3}
    assert "optimizer 1000: {" in capsys.readouterr().out


def test_when_time_is_up_nothing_more_is_begun(tmp_path, capsys):
    options = ["--toy", "--out", str(tmp_path), "--attention", "sdpa", "--seconds", "0"]
    assert main([*options, "--only", "attention"]) == 0
    assert "(1, 32, 2): left out, time is up" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_a_run_that_was_cut_short_left_is_taken_in(folder, tmp_path):
    whole = written(folder)
    half = whole.model_copy(update={"products": (), "launch_s": 1e-6})
    rest = whole.model_copy(update=dict.fromkeys(("blocks", "attention", "ends"), ()))
    for rank, part in enumerate((half, rest)):
        (tmp_path / f"{whole.name}.rank{rank}.json").write_text(part.to_json())
    assert main(["--toy", "--out", str(tmp_path), "--attention", "sdpa", "--only", "nothing"]) == 0
    put = written(tmp_path)
    assert put.launch_s == 1e-6
    for section in ("blocks", "products", "attention", "ends", "copies"):
        assert {*getattr(put, section)} == {*getattr(whole, section)}


def test_an_attention_that_cannot_run_is_refused(capsys):
    assert main(["--toy", "--attention", "flash4"]) == 2
    assert "--attention flash4: cannot run here; one of sdpa, or auto" in capsys.readouterr().err


def test_what_stands_in_for_attention_gives_v_and_the_gradient_of_o():
    qkv = torch.randn(2, 5, 3, 4, 72, requires_grad=True)
    o = StandIn().packed(qkv, 5)
    assert torch.equal(o, qkv[:, :, 2])
    do = torch.randn_like(o)
    (gradient,) = torch.autograd.grad(o, qkv, do)
    assert torch.equal(gradient, do.unsqueeze(2).expand_as(qkv))


def test_the_clock_makes_calls_in_turn_and_leaves_out_the_first_pass():
    calls = []
    clock = Clock(torch.device("cpu"), enough=0)
    seconds = clock(lambda: calls.append("a"), lambda: calls.append("b"))
    assert calls == ["a", "b"] * 2 and len(seconds) == 2
    calls.clear()
    clock(lambda: calls.append("a"), warm=False)
    assert calls == ["a"]


@pytest.mark.long
def test_two_devices_share_the_work_and_exchange(tmp_path):
    processes = []
    port = str(free_port())
    for rank in range(2):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_PORT": port}
        environment = {**os.environ, **ranks, "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "tools/calibrate.py", "--toy", "--out", str(tmp_path), "--attention", "sdpa"]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    calibration = written(tmp_path)
    assert {(p.kind, p.ranks, p.bytes) for p in calibration.collectives if p.kind != "send"} == {
        (kind, 2, count) for kind in ("all_to_all", "reduce_scatter", "all_gather", "all_reduce") for count in TOY.bytes
    }
    assert {p.bytes for p in calibration.collectives if p.kind == "send"} == set(TOY.bytes)
    assert calibration.overlap[0].ranks == 2 and calibration.launch_s > 0
    assert len(calibration.blocks) == 3 * 5 + 4 + 4, "without attention, with it, and once at every other level"
    assert {p.level for p in calibration.blocks if p.attention} == {"off", "light", "selective", "attention", "full"}
    assert "rank 1: attention" in outputs[1] and "rank 0: attention" in outputs[0]
