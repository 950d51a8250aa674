"""What is installed: every folder with code, every data file, one command with the shipped configs by name."""

import configparser
import fnmatch
import importlib.util
import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import mugv_ds
from mugv_ds.cli.main import COMMANDS, main
from mugv_ds.config.load import find_config, load_config
from tests.helpers.distributed import free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def setup() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def folder_of(package: str, setup: configparser.ConfigParser) -> Path:
    """Where setuptools looks for a package."""
    places = dict(line.split(" = ") for line in setup["options"]["package_dir"].split("\n") if line)
    parent = max((name for name in places if f"{package}.".startswith(f"{name}.")), key=len)
    return ROOT / places[parent] / package.removeprefix(parent).removeprefix(".").replace(".", "/")


def test_every_folder_with_code_or_configs_is_listed(setup):
    listed = {folder_of(package, setup) for package in setup["options"]["packages"].split()}
    there = {file.parent for top in ("mugv_ds", "kernels/mugv_kernels") for file in (ROOT / top).rglob("*.py")}
    there |= {file.parent for file in (ROOT / "ds_configs").rglob("*.json")} | {ROOT / "hostfiles"}
    assert listed == there


def test_every_data_file_is_listed(setup):
    """Whatever lies in a package beside its code is installed."""
    patterns = {
        folder_of(package, setup): [pattern.strip() for pattern in given.replace("\n", ",").split(",")]
        for package, given in setup["options.package_data"].items()
    }
    installed = {
        file
        for folder, given in patterns.items()
        for pattern in given
        for file in folder.glob(pattern)
        if file.is_file()
    }
    tracked = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    tops = ("mugv_ds/*", "kernels/mugv_kernels/*", "ds_configs/*", "hostfiles/*")
    data = {
        ROOT / name
        for name in tracked.stdout.splitlines()
        if any(fnmatch.fnmatch(name, top) for top in tops) and not name.endswith(".py") and (ROOT / name).exists()
    }
    assert len(data) > 50 and data <= installed


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_a_main(command):
    spec = importlib.util.find_spec(COMMANDS[command].module)
    assert spec is not None and "\ndef main(argv" in Path(spec.origin).read_text()


def test_scripts_of_tools_call_the_package():
    """A command's code is in the package alone."""
    for file in (ROOT / "mugv_ds/cli").glob("*.py"):
        if file.stem not in ("__init__", "deepspeed_launch", "main"):
            assert f"mugv_ds.cli.{file.stem}" in (ROOT / "tools" / file.name).read_text()


def test_help_names_every_command_and_imports_nothing_heavy():
    """Within half a second, of which starting Python is most."""
    code = "import sys; from mugv_ds.cli.main import main; main(['--help']); print(sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    *lines, modules = done.stdout.splitlines()
    assert all(any(line.startswith(f"  {name} ") for line in lines) for name in COMMANDS)
    assert not any(f"'{name}'" in modules for name in ("torch", "pydantic", "numpy", "psutil", "mugv_ds.config"))


def test_the_version_is_the_packages(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"mugv-ds {mugv_ds.__version__}\n"


def test_unknown_commands_are_refused(capsys):
    assert main(["trian"]) == 2
    assert capsys.readouterr().err == "error: trian: no such command; see mugv-ds --help\n"


def test_configs_are_found_by_name(tmp_path, monkeypatch):
    """Also those in folders, and what they extend; a file of the working folder comes first."""
    monkeypatch.chdir(tmp_path)
    assert find_config("stage1") == ROOT / "ds_configs/stage1.json"
    assert load_config("debug/dpo") == load_config(ROOT / "ds_configs/debug/dpo.json")
    Path("stage1").write_text("{}")
    assert find_config("stage1") == Path("stage1")
    for other in ("stage9", "../ds_configs/stage1", "/stage1", "stage1.json", "x" * 10_000):
        assert find_config(other) == Path(other)


def test_too_many_processes_are_refused(capsys):
    assert main(["train", "--nproc", "1000", "--config", "debug"]) == 2
    assert "--nproc 1000: must be 1 to 64" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["wandb", "trackio", "mlflow"])
def test_no_ancient_tracker_is_taken(setup, extra):
    """Where versions conflict, as trackio's Pillow with the pinned one, pip goes back to the first release."""
    requirement = Requirement(setup["options.extras_require"][extra].strip())
    assert not requirement.specifier.contains("0.0.6")


@pytest.mark.long
def test_the_wheel_in_an_empty_environment(tmp_path):
    """Demo data, 20 steps on two processes, weights and a sampled video, by the command alone, outside the repository.

    What it depends on is that of the tests' environment: the new one has nothing else.
    """
    pytest.importorskip("build")
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    site = next((tmp_path / "venv/lib").glob("python*/site-packages"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str | Path, cwd: Path = tmp_path) -> str:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-4000:])
        return done.stdout

    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "dist", ".", cwd=ROOT)
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    run(python, "-m", "pip", "install", "--no-deps", wheel)
    packages = [path for path in sys.path if path.endswith("site-packages")]
    (site / "dependencies.pth").write_text("\n".join(packages) + "\n")
    command = tmp_path / "venv/bin/mugv-ds"
    where = run(python, "-c", "import mugv_ds, mugv_kernels; print(mugv_ds.__file__, mugv_kernels.__file__)")
    assert where.count(str(site)) == 2

    run(command, "demo-data", "--out", "data/demo")
    assert "2 processes = data 2" in run(command, "dry-run", "--config", "debug")
    steps = ["--set", "schedule.steps=20", "--set", "schedule.warmup_steps=5"]
    run(command, "train", "--nproc", "2", "--master_port", str(free_port()), "--config", "debug", *steps)
    run(command, "convert", "--ckpt", "runs/debug/checkpoints", "--out", "exports/debug")
    video = [
        "--frames",
        "16",
        "--height",
        "48",
        "--width",
        "48",
        "--steps",
        "2",
        "--prompt",
        "a red circle moving left",
    ]
    models = ["--weights", "exports/debug", "--codec", "data/demo/codec.safetensors", "--text-encoder", "hash"]
    run(command, "sample", *models, *video, "--out", "samples")
    assert list((tmp_path / "samples").glob("*.mp4"))
