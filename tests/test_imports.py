"""Who may import whom. Function-local imports count too."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOUSE = runpy.run_path(str(ROOT / "tools/house.py"))
imported_modules, imported_rooms, room_of = (HOUSE[name] for name in ("imported_modules", "imported_rooms", "room_of"))

ALLOWED = {
    "kernels": set(),
    "config": set(),
    "files": {"config"},
    "objectives": {"config"},
    "data": {"config", "files", "objectives"},
    "models": {"config", "kernels"},
    "parallel": {"config", "models"},
    "checkpoint": {"config", "files", "models"},
    "weights": {"checkpoint", "config", "files", "models"},
    "engine": {"config", "data", "files", "models", "objectives", "parallel", "plan", "preflight"},
    "preflight": {"config", "kernels", "plan"},
    "plan": {"config", "data", "models", "objectives", "parallel"},
    "sampling": {"config", "data", "files", "models", "objectives", "parallel"},
    "prepare": {"config", "data", "files", "models", "objectives"},
    "evaluation": {"config", "data", "files", "models", "sampling"},
    "train.py": {
        *("checkpoint", "config", "data", "engine", "evaluation", "models", "objectives", "parallel", "plan"),
        *("prepare", "sampling", "weights"),
    },
    "sample.py": {"config", "engine", "files", "models", "parallel", "plan", "sampling", "weights"},
    "cli": {
        *("checkpoint", "config", "data", "engine", "evaluation", "files", "kernels", "models", "plan", "preflight"),
        *("prepare", "sampling", "sample.py", "train.py", "weights"),
    },
    "train_vae.py": {"checkpoint", "config", "data", "engine", "models", "weights"},
    "__init__.py": set(),
}
DEEPSPEED = {"parallel", "engine", "checkpoint"}


FILES = HOUSE["files"]()


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_follow_the_house(file):
    room = room_of(file)
    others = imported_rooms(file) - {room}
    assert others <= ALLOWED[room], f"{room} must not import {sorted(others - ALLOWED[room])}"
    uses_deepspeed = any(name.split(".")[0] == "deepspeed" for name in imported_modules(file))
    assert not uses_deepspeed or room in DEEPSPEED, f"{room} must not import deepspeed"


def test_planning_takes_of_the_parallel_room_the_layout_alone():
    for file in (ROOT / "mugv_ds/plan").glob("*.py"):
        parallel = {name for name in imported_modules(file) if name.startswith("mugv_ds.parallel.")}
        assert all(name.startswith("mugv_ds.parallel.layout.") for name in parallel), file


def test_the_drawing_is_up_to_date():
    assert (ROOT / "docs/house.md").read_text() == HOUSE["page"](), "run `make house`"
    assert (ROOT / "docs/house.svg").read_text() == HOUSE["drawing"](), "run `make house`"


def test_the_walk_sees_local_imports(tmp_path):
    file = tmp_path / "module.py"
    file.write_text("def f():\n    from mugv_ds.engine import loop\n    import deepspeed.comm\n")
    assert imported_modules(file) == {"mugv_ds.engine.loop", "deepspeed.comm"}


def test_the_model_knows_no_ranks():
    for file in (ROOT / "mugv_ds/models").rglob("*.py"):
        assert not any("distributed" in name for name in imported_modules(file)), file
        assert "rank" not in {node.id for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Name)}


def test_nothing_loads_code():
    """No `torch.load` without weights_only=True, no shell=True, pickle or eval anywhere in package and tools."""
    for file in [*FILES, *(ROOT / "tools").glob("*.py")]:
        tree = ast.parse(file.read_text())
        assert not any(name.split(".")[0] in {"pickle", "dill", "cloudpickle"} for name in imported_modules(file)), file
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert name not in {"eval", "exec"}, f"{file}:{call.lineno}"
            assert keywords.get("shell") != "True", f"{file}:{call.lineno}"
            assert not name.endswith("torch.load") or keywords.get("weights_only") == "True", f"{file}:{call.lineno}"
