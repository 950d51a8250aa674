"""Every command of the pages exists, takes the options given, and is run by a test or says what it needs."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.pages import NEEDS, PAGES, ROOT, Fence, check, check_python, commands, fences

FENCES = [fence for page in PAGES for fence in fences(page)]
BASH = [fence for fence in FENCES if fence.language == "bash"]


def test_every_fence_says_its_language():
    assert [fence.where for fence in FENCES if fence.language not in {"bash", "csv", "json", "python", "text"}] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_can_be_typed(page):
    for fence in fences(page):
        if fence.language == "bash":
            for words in commands(fence.text):
                check(words)


@pytest.mark.parametrize(
    "line",
    [
        "make no-such-target",
        "make convert-hf",
        "make train CONFIG=ds_configs/debug.json SET=data.manifst=x",
        ".venv/bin/python tools/no_such_tool.py",
        ".venv/bin/python tools/widen.py --weights a --out b --wider",
        ".venv/bin/python tools/launch.py --hostfile h mugv_ds/train.py --config c --sett a=b",
        "python tools/compare.py vote runs/compare",
        "deepspeed --hostfile h mugv_ds/train.py --config ds_configs/debug.json --set model.depth=zero",
        "sbatch tools/train.slurm --konfig c",
        'python -c "from mugv_ds.models import Dit"',
        "python -m tests.no_such_module",
        "rm -rf runs",
        "docker run --gpus all mugv_ds python tools/lunch.py",
        "kubectl apply --filename examples/no_such.yaml",
    ],
)
def test_a_command_that_cannot_be_typed_is_found(line):
    (words,) = commands(line)
    with pytest.raises((AssertionError, ValueError)):
        check(words)


def test_every_command_is_run_or_says_what_it_needs():
    """A fence without a mark is run by the test below; `run by` names tests that there are."""
    for fence in BASH:
        kind, _, value = fence.mark.partition(": ")
        if kind == "needs":
            assert value and set(value.split(", ")) <= NEEDS, fence.where
        elif kind == "run by":
            for name in value.split(", "):
                path, _, test = name.partition("::")
                assert re.search(rf"^def {test}\(", (ROOT / path).read_text(), re.MULTILINE), (fence.where, name)
        else:
            assert not fence.mark, fence.where


def test_targets_and_files_named_in_the_text_exist():
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    recipe = re.search(r"^RECIPE := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    named = r"`((?:tools|ds_configs|hostfiles|kernels|mugv_ds|tests|examples)/[\w./-]+\.(?:py|json|md|slurm|txt|yaml))"
    for page in PAGES:
        text = page.read_text()
        for target in re.findall(r"`make ([a-z0-9-]+)", " ".join(text.split())):
            assert target in {*targets, *recipe.split()}, (page.name, target)
        missing = [name for name in re.findall(named, text) if not (ROOT / name).exists()]
        assert [name for name in missing if name != "ds_configs/votes.json"] == [], page.name  # which readers write


def test_json_and_python_are_what_they_claim():
    for fence in FENCES:
        if fence.language == "json":
            text = fence.text.strip()
            json.loads(text if text.startswith("{") else f"{{{text}}}")
        elif fence.language == "python":
            check_python(fence.text)


def unmarked() -> list[Fence]:
    """What the test below runs: quick start first, of whose results others make use."""
    return sorted((fence for fence in BASH if not fence.mark), key=lambda fence: fence.page.stem != "quickstart")


@pytest.mark.long
def test_commands_without_a_mark_run(tmp_path):
    """In a copy of the repository, in this Python's environment; the demo's data and weights are made there first."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in files.decode().split("\0"):
        if name and (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    (tmp_path / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        (tmp_path / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    (tmp_path / ".venv/installed").touch()
    seen = set()
    for fence in unmarked():
        if fence.text not in seen:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", fence.text],
                cwd=tmp_path,
                env={"PATH": f"{tmp_path}/.venv/bin:/usr/bin:/bin", "PYTHONPATH": f"{tmp_path}:{tmp_path}/kernels"},
                text=True,
                capture_output=True,
                check=False,
            )
            assert done.returncode == 0, (fence.where, done.stdout[-2000:], done.stderr[-2000:])
        seen.add(fence.text)
