"""The command: from weights and the suite to the table, with a package that judges nothing in its environment."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from mugv_ds.cli import sample
from mugv_ds.evaluation.vbench import DIMENSIONS, PUBLISHED, read_suite
from mugv_ds.models import DiTConfig
from mugv_ds.models.codec import LinearCodec
from tests.helpers.published import toy_dit, write_dit
from tests.helpers.vbench import suite_info, write_crops, write_package
from tools.vbench import main

TOY = DiTConfig(144, 2, 2, caption_channels=16)
ROW = PUBLISHED["Wan2.1"]
ANSWERS = {dimension.name: value / 100 for dimension, value in zip(DIMENSIONS, ROW, strict=False)}
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A toy's weights, the suite's file and images, and the package."""
    folder = tmp_path_factory.mktemp("given")
    write_dit(folder, toy_dit(TOY).state_dict(), TOY)
    LinearCodec.fit(2 * torch.rand(20, 3, 16, 16, 24, generator=torch.Generator().manual_seed(0)) - 1).save(
        folder / "codec.safetensors"
    )
    (folder / "info.json").write_text(json.dumps(suite_info()))
    write_crops(read_suite(folder / "info.json").first(1), folder / "crop")
    write_package(folder / "environment", folder / "cache", ANSWERS)
    return folder


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """What the command starts finds our package, as where it is installed; the vbench package must not."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))


def vbench(given: Path, out: Path, *more: str) -> int:
    paths = {"info": "info.json", "images": "crop", "environment": "environment", "cache": "cache"}
    arguments = [word for name, path in paths.items() for word in (f"--{name}", str(given / path))]
    models = ["--weights", str(given), "--codec", str(given / "codec.safetensors"), "--text-encoder", "hash"]
    small = ["--frames", "16", "--steps", "1", "--fps", "8", "--output-fps", "8", "--batch", "15", "--repeat", "3"]
    arguments += ["--out", str(out), "--try-pairs", "1", "--height", "16", "--width", "32", *more, "--"]
    return main([*arguments, *models, *small, "--max-text-tokens", "40"])


@pytest.fixture
def sampled_here(monkeypatch):
    """tools/sample.py runs in the test's process, where all is imported; the package still does in its own."""
    start = subprocess.run

    def run(command, **options):
        if command[1].endswith("sample.py"):
            return subprocess.CompletedProcess(command, sample.main(command[2:]))
        return start(command, **options)

    monkeypatch.setattr(subprocess, "run", run)


@pytest.mark.long
def test_weights_are_sampled_judged_and_scored_once(given, tmp_path, capfd, request):
    """And a package that fails or lies is named, and asked again for that dimension alone."""
    (given / "cache/answers.json").write_text(json.dumps(ANSWERS | {"i2v_background": None}))
    assert vbench(given, tmp_path / "out") == 1
    printed, errors = capfd.readouterr()
    assert "suite: SHA-256 " in printed and "3 pairs, 15 videos of 32×16, images of the crop 16-9" in printed
    assert "failed on i2v_background with status 1: 'NotImplementedError: UnImplemented dimension i2v_ba" in errors
    names = {path.name for path in (tmp_path / "out/videos").iterdir()}
    assert "a place, number 0, camera pans left-4.mp4" in names and len(names) == 15
    assert len({path.read_bytes() for path in (tmp_path / "out/videos").iterdir()}) == 15
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out/samples").glob("*.mp4")}

    request.getfixturevalue("sampled_here")
    (given / "cache/answers.json").write_text(json.dumps(ANSWERS | {"i2v_background": 98.8}))
    assert vbench(given, tmp_path / "out") == 2
    assert "i2v_background is 98.8, and must be a number from 0 to 1" in capfd.readouterr().err

    (given / "cache/answers.json").write_text(json.dumps(ANSWERS))
    for _ in range(2):
        assert vbench(given, tmp_path / "out", "--name", "toy") == 0
        lines = capfd.readouterr().out.splitlines()
        (own,) = (line for line in lines if line.startswith("toy "))
        assert [float(value) for value in own.split()[1:]] == pytest.approx(ROW, abs=0.015)
        assert all(any(line.startswith(name) for line in lines) for name in PUBLISHED)
        made = json.loads((tmp_path / "out/vbench.json").read_text())
        assert made["results"] == ANSWERS and made["pairs"] == 3
        assert 100 * made["scores"]["total"] == pytest.approx(ROW[-1], abs=0.015)
    asked = [DIMENSIONS[0], DIMENSIONS[1], *[DIMENSIONS[2]] * 3, *DIMENSIONS[3:]]
    calls = (given / "cache/calls").read_text().splitlines()
    assert calls == [f"{dimension.name} True False" for dimension in asked], "nothing is judged twice"
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "out/samples").glob("*.mp4")}


@pytest.mark.parametrize(
    ("option", "path", "words"),
    [
        ("--environment", "none", "no environment of the vbench package; `make vbench-env` makes one"),
        ("--cache", "none", "weights of the vbench package are missing: torch/hub/facebookresearch_co-tracker_main"),
        ("--images", "none", "give the suite's folder of crops"),
        ("--info", "none", "give vbench2_beta_i2v/vbench2_i2v_full_info.json"),
        ("--info-sha256", "0" * 64, "its SHA-256 is"),
    ],
)
def test_what_is_missing_is_said_in_a_line_before_anything_is_sampled(option, path, words, given, tmp_path, capsys):
    assert vbench(given, tmp_path / "out", option, path) == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and words in errors
    assert not (tmp_path / "out").exists()


def test_what_the_sampler_refuses_ends_the_command_so(given, tmp_path, capfd, sampled_here):
    assert vbench(given, tmp_path / "out", "--seed", "-1") == 2
    assert "must be a whole number from 0" in capfd.readouterr().err
