"""Who may import whom. Function-local imports count too."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "mugv_ds"

ALLOWED = {
    "config": set(),
    "files": {"config"},
    "objectives": {"config"},
    "data": {"config", "files", "objectives", "models"},
    "models": {"config"},
    "parallel": {"models", "config"},
    "checkpoint": {"config", "files", "models"},
    "weights": {"config", "models", "checkpoint", "files"},
    "engine": {"config", "data", "files", "models", "parallel", "objectives"},
    "plan": {"config", "data", "models", "parallel"},
    "sampling": {"models", "data", "objectives", "config"},
    "prepare": {"models", "data", "objectives", "config"},
    "train.py": {
        "config",
        "data",
        "models",
        "parallel",
        "objectives",
        "engine",
        "plan",
        "checkpoint",
        "weights",
        "sampling",
    },
    "__init__.py": set(),
}
DEEPSPEED = {"parallel", "engine", "checkpoint"}


def imported_modules(file: Path) -> set[str]:
    """Dotted names of everything a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(ROOT.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_house(file):
    place = file.relative_to(ROOT).parts[0]
    modules = imported_modules(file)
    ours = {name.split(".")[1].removesuffix(".py") for name in modules if name.startswith("mugv_ds.")}
    allowed = ALLOWED[place] | {place}
    assert ours <= allowed, f"{place} must not import {sorted(ours - allowed)}"
    uses_deepspeed = any(name.split(".")[0] == "deepspeed" for name in modules)
    assert not uses_deepspeed or place in DEEPSPEED, f"{place} must not import deepspeed"


def test_the_walk_sees_local_imports(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from mugv_ds.engine import loop\n    import deepspeed.comm\n")
    assert imported_modules(file) == {"mugv_ds.engine.loop", "deepspeed.comm"}


def test_the_model_knows_no_ranks():
    for file in (ROOT / "models").glob("*.py"):
        assert not any("distributed" in name for name in imported_modules(file)), file
        assert "rank" not in {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}


def test_nothing_loads_code():
    """No `torch.load` without weights_only=True, no shell=True, pickle or eval anywhere in package and tools."""
    for file in [*FILES, *(ROOT.parent / "tools").glob("*.py")]:
        tree = ast.parse(file.read_text())
        assert not any(name.split(".")[0] in {"pickle", "dill", "cloudpickle"} for name in imported_modules(file)), file
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in {"eval", "exec"}, f"{file}:{call.lineno}"
            assert keywords.get("shell") != "True", f"{file}:{call.lineno}"
            assert not name.endswith("torch.load") or keywords.get("weights_only") == "True", f"{file}:{call.lineno}"
