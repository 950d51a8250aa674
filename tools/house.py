"""Draws the house from the code's own imports: which room imports which, and what each file in it is for.

tools/house.py > docs/house.md
tools/house.py --drawing > docs/house.svg
"""

import argparse
import ast
import itertools
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


def layers(imports: dict[str, set[str]]) -> tuple[list[list[str]], list[list[str]]]:
    """Returns the rows of a layered drawing, the foundation first, and the arrows as paths through them.

    A room lies one row above the highest of those that it imports (Sugiyama et al. 1981). An arrow that passes rows has
    a place in each of them, named "room>imported>row". Places are ordered by the mean position of their neighbours, to
    and fro.
    """
    height: dict[str, int] = {}
    for room, needed in imports.items():
        height[room] = max((height[other] + 1 for other in needed), default=0)
    rows: list[list[str]] = [
        [room for room in imports if height[room] == row] for row in range(max(height.values()) + 1)
    ]
    paths = []
    for room, other in direct(imports):
        passed = [f"{room}>{other}>{row}" for row in range(height[room] - 1, height[other], -1)]
        for place, row in zip(passed, range(height[room] - 1, height[other], -1), strict=True):
            rows[row].append(place)
        paths.append([room, *passed, other])
    beside: dict[str, set[str]] = {place: set() for row in rows for place in row}
    for path in paths:
        for upper, lower in itertools.pairwise(path):
            beside[upper].add(lower)
            beside[lower].add(upper)
    for _ in range(8):
        for row in [*rows[1:], *reversed(rows[:-1])]:
            at = {place: (n + 0.5) / len(other) for other in rows for n, place in enumerate(other)}
            row.sort(key=lambda place: sum(at[near] for near in beside[place]) / max(len(beside[place]), 1))
    return rows, paths


def drawing() -> str:
    """Returns docs/house.svg: the rooms, and arrows from each to those that it imports from."""
    width, step, box, tall = 1000, 104, 104, 38
    rows, paths = layers(rooms())
    height = step * len(rows)
    centre = {
        place: ((n + 0.5) * width / len(row), height - step * (level + 0.5))
        for level, row in enumerate(rows)
        for n, place in enumerate(row)
    }
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" font-family="sans-serif">',
        "<title>Which room of the code imports from which</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L8 4L0 8z" fill="#78909c"/></marker></defs>',
        f'<rect width="{width}" height="{height}" rx="8" fill="#fafafa"/>',
    ]
    for path in paths:
        (x, y), *others = (centre[place] for place in path)
        y += tall / 2
        line = f"M{x:.0f} {y:.0f}"
        for n, (to_x, to_y) in enumerate(others):
            to_y -= tall / 2 + 2 if n == len(others) - 1 else 0
            middle = (y + to_y) / 2
            line += f"C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
            x, y = to_x, to_y
        lines.append(f'<path d="{line}" fill="none" stroke="#78909c" stroke-width="1.5" marker-end="url(#tip)"/>')
    for room, (x, y) in centre.items():
        if ">" not in room:
            lines += [
                f'<rect x="{x - box / 2:.0f}" y="{y - tall / 2:.0f}" width="{box}" height="{tall}" rx="6" '
                'fill="#e8eaf6" stroke="#3f51b5"/>',
                f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" font-size="16" fill="#1a237e">{room}</text>',
            ]
    return "\n".join([*lines, "</svg>"]) + "\n"


def page() -> str:
    """Returns the text of docs/house.md."""
    lines = [
        "# The house",
        "",
        "Made by `make house` from the imports; a test holds that it is up to date. An arrow leads from a room to one",
        "that it imports from; arrows that follow from others are left out.",
        "",
        "![Which room of the code imports from which; the same is said below in words](house.svg)",
    ]
    for room, needed in rooms().items():
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drawing", action="store_true", help="print the drawing, SVG, in place of the page")
    print(drawing() if parser.parse_args(argv).drawing else page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
