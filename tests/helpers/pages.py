"""What the pages tell people to type: fences with their marks, taken apart into commands, which are parsed, not run."""

import argparse
import ast
import contextlib
import importlib.util
import io
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

from mugv_ds.cli.main import COMMANDS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = {
    "data",
    "docker",
    "gpu",
    "gpus",
    "hosts",
    "kubernetes",
    "network",
    "people",
    "slurm",
    "time",
    "videos",
    "weights",
}
# Programs that are no part of the repository: of these only that they are named is checked.
ELSEWHERE = {"docker", "kubectl", "pip", "printf", "sky", "source"}
SCHEMAS = {
    "mugv_ds/train.py": ("mugv_ds.config.schema", "TrainConfig"),
    "mugv_ds/train_vae.py": ("mugv_ds.config.vae_schema", "VaeTrainConfig"),
    "tools/balance.py": ("mugv_ds.config.schema", "TrainConfig"),
    "tools/plan.py": ("mugv_ds.config.schema", "TrainConfig"),
    "tools/preflight.py": ("mugv_ds.config.schema", "TrainConfig"),
    "tools/reference.py": ("mugv_ds.config.schema", "TrainConfig"),
}


class Fence(NamedTuple):
    """A fence of a page. line: of its first line of text. mark: the comment above it, without its signs."""

    page: Path
    line: int
    language: str
    text: str
    mark: str

    @property
    def where(self) -> str:
        """Returns the place of it, as editors take it."""
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class _Parsed(BaseException):
    """A command line was parsed; no `except Exception` of a command stops it."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments


def fences(page: Path) -> Iterator[Fence]:
    """Yields the fences of a page."""
    lines = page.read_text().splitlines()
    start = None
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start = number
        elif line.startswith("```"):
            above = re.fullmatch(r"<!-- (.*) -->", lines[start - 1]) if start else None
            text = "\n".join(lines[start + 1 : number])
            yield Fence(page, start + 2, lines[start][3:].strip(), text, above[1] if above else "")
            start = None


def commands(text: str) -> Iterator[list[str]]:
    """Yields the words of each command of a shell script as simple as the pages' are: variables, && and comments."""
    variables: dict[str, str] = {}
    for line in text.replace("\\\n", " ").splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word in ("&&", ">"):
                yield from [words] if words else []
                if word == ">":
                    break
                words = []
            elif not words and (found := re.fullmatch(r"(\w+)=(.*)", word)):
                variables[found[1]] = found[2]
            elif word.startswith("$") and word[1:] in variables:
                words += shlex.split(variables[word[1:]])
            else:
                words.append(word.removeprefix(".venv/bin/"))


def check(words: list[str]) -> None:
    """Checks that a command can be typed: its program exists and takes these options. Nothing is run but `make -n`.

    Raises:
        AssertionError: it cannot.
    """
    program, *rest = words
    if program == "make":
        for inner in commands(dry_make(tuple(rest))):
            if inner[0] in ("python", "torchrun", "deepspeed"):
                check(inner)
    elif program in ("python", "torchrun", "deepspeed", "sbatch"):
        check_script(program, rest)
    elif program == "mugv-ds":
        check_entry_point(rest)
    elif words[:2] == ["docker", "run"]:
        check(words[words.index("mugv_ds") + 1 :])
    else:
        assert program in ELSEWHERE, f"{program}: no program that the pages may name"
        assert all((ROOT / word).is_file() for word in words if word.endswith(".yaml")), words


@cache
def dry_make(arguments: tuple[str, ...]) -> str:
    """Returns the commands of Python that `make` would run for these arguments, one a line."""
    done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, (arguments, done.stderr)
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return "\n".join(line for line in lines if line.startswith(".venv/bin/"))


def check_entry_point(words: list[str]) -> None:
    """Checks a sub-command of `mugv-ds` by the tool that calls the same `main`."""
    name, *options = words
    command = COMMANDS[name]
    script = f"{command.module.replace('.', '/')}.py"
    if command.module.startswith("mugv_ds.cli."):
        script = f"tools/{command.module.rpartition('.')[2]}.py"
    if command.launched and options[:1] in (["--nproc"], ["--hostfile"]):
        options = options[2:]
    parse(script, [*command.given, *options])


def check_script(program: str, words: list[str]) -> None:
    """Checks the script of a launcher, or of Python itself, and its options."""
    if words[:1] == ["-c"]:
        check_python(words[1])
        return
    if words[:2] == ["-m", "pip"]:
        return
    if words[:1] == ["-m"]:
        assert importlib.util.find_spec(words[1]) is not None, words
        return
    place = next((n for n, word in enumerate(words) if word.endswith((".py", ".slurm"))), None)
    assert place is not None, (program, words)
    script, options = words[place], words[place + 1 :]
    assert (ROOT / script).is_file(), script
    parse("mugv_ds/train.py" if script.endswith(".slurm") else script, options)
    if script == "tools/launch.py":
        check_script("python", options[next(n for n, word in enumerate(options) if word.endswith(".py")) :])


def parse(script: str, options: list[str]) -> None:
    """Has a script parse its options, and loads the config that they name, if it is in the repository."""
    depth = 0
    parse_known = argparse.ArgumentParser.parse_known_args

    def outermost(parser: argparse.ArgumentParser, args=None, namespace=None, **more):
        nonlocal depth
        depth += 1
        try:
            found, left = parse_known(parser, args, namespace, **more)
        finally:
            depth -= 1
        if depth:
            return found, left
        raise _Parsed(found)

    def all_known(parser: argparse.ArgumentParser, args=None, namespace=None):
        nonlocal depth
        depth += 1
        found, left = outermost(parser, args, namespace)
        depth -= 1
        if left:
            parser.error(f"unrecognized arguments: {' '.join(left)}")
        raise _Parsed(found)

    said, argv, path = io.StringIO(), sys.argv, [*sys.path]
    argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args, kept = (
        outermost,
        all_known,
        argparse.ArgumentParser.parse_args,
    )
    sys.argv = [script, *options]
    sys.path.insert(0, str((ROOT / script).parent))
    try:
        with contextlib.redirect_stderr(said):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    except _Parsed as parsed:
        arguments = parsed.arguments
    except SystemExit as error:
        raise AssertionError(f"{script} {shlex.join(options)}: {said.getvalue()}") from error
    else:
        raise AssertionError(f"{script}: parses no command line")
    finally:
        argparse.ArgumentParser.parse_known_args, argparse.ArgumentParser.parse_args = parse_known, kept
        sys.argv, sys.path[:] = argv, path
    if script in SCHEMAS and arguments.config and (ROOT / arguments.config).is_file():
        from mugv_ds.config.load import load_config

        module, name = SCHEMAS[script]
        load_config(ROOT / arguments.config, arguments.set, getattr(importlib.import_module(module), name))


def check_python(text: str) -> None:
    """Checks that a piece of Python can be compiled, and that the package has what it imports from it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("mugv_ds"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
