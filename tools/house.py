"""Draws the house from the code's own imports: which room imports which, and what each file in it is for.

tools/house.py > docs/house.md
"""

import argparse
import ast
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mugv_ds"
KERNELS = ROOT / "kernels" / "mugv_kernels"


def imported_modules(file: Path) -> set[str]:
    """Returns the dotted names of everything that a file imports, anywhere in it.

    Raises:
        ValueError: it has a relative import, which this does not follow.
    """
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{file}: relative import")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def room_of(file: Path) -> str:
    """Returns the name of the room that a file of the package or of the kernels lies in."""
    return "kernels" if file.is_relative_to(KERNELS) else file.relative_to(PACKAGE).parts[0]


def imported_rooms(file: Path) -> set[str]:
    """Returns the rooms that a file imports from; its own may be among them."""
    rooms = set()
    for name in imported_modules(file):
        top, *inner = name.split(".")
        if top == "mugv_kernels":
            rooms.add("kernels")
        elif top == "mugv_ds" and inner:
            rooms.add(inner[0] if (PACKAGE / inner[0]).is_dir() else f"{inner[0]}.py")
    return rooms


def files() -> list[Path]:
    """Returns the package's and the kernels' files, in order."""
    return sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


def rooms() -> dict[str, set[str]]:
    """Returns the rooms and what each of them imports, those that import nothing first."""
    imports: dict[str, set[str]] = {}
    for file in files():
        if file.parent == PACKAGE and file.name == "__init__.py":
            continue
        room = room_of(file)
        imports[room] = imports.get(room, set()) | imported_rooms(file) - {room}
    ordered: dict[str, set[str]] = {}
    while imports:
        ready = sorted(room for room, needed in imports.items() if needed <= ordered.keys())
        if not ready:
            raise ValueError(f"rooms import one another in a circle: {', '.join(sorted(imports))}")
        ordered |= {room: imports.pop(room) for room in ready}
    return ordered


def direct(imports: dict[str, set[str]]) -> Iterator[tuple[str, str]]:
    """Yields the arrows (room, imported room) that do not follow from others, so that the drawing can be read."""

    def reached(room: str) -> set[str]:
        return imports[room].union(*(reached(other) for other in imports[room]))

    for room, needed in imports.items():
        for other in sorted(needed):
            if not any(other in reached(between) for between in needed - {other}):
                yield room, other


def page() -> str:
    """Returns the text of docs/house.md."""
    imports = rooms()
    names = {room: f"r{number}" for number, room in enumerate(imports)}
    lines = [
        "# The house",
        "",
        "Made by `make house` from the imports; a test holds that it is up to date. An arrow leads from a room to one",
        "that it imports from; arrows that follow from others are left out.",
        "",
        "```mermaid",
        "flowchart BT",
        *(f'  {names[room]}["{room}"]' for room in imports),
        *(f"  {names[room]} --> {names[other]}" for room, other in direct(imports)),
        "```",
    ]
    for room, needed in imports.items():
        lines += ["", f"## {room}", "", f"Imports {', '.join(sorted(needed)) or 'no other room'}.", ""]
        for file in files():
            if room_of(file) == room and (summary := _summary(file)):
                lines.append(f"- `{file.relative_to(ROOT)}`: {summary}")
    return "\n".join(lines) + "\n"


def _summary(file: Path) -> str:
    """The first sentence or line of a file's docstring; empty where it has none."""
    text = ast.get_docstring(ast.parse(file.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split())


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
