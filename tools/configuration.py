"""Writes the reference of all configs' keys, as Markdown, from the schemas: type, default, meaning and source.

tools/configuration.py > docs/configuration.md
"""

import argparse
import json
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import BaseModel

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.vae_schema import VaeTrainConfig

# What the page calls a schema, the schema, and what takes its configs.
SCHEMAS = (
    ("Training", TrainConfig, "Configs of the DiT's training, `mugv_ds/train.py`, which `make train` starts."),
    (
        "VideoVAE",
        VaeTrainConfig,
        "Configs of the VideoVAE's training, `mugv_ds/train_vae.py`, which `make vae` starts.",
    ),
    ("Preparation", PrepareConfig, "Configs of `tools/prepare.py`, which `make prepare` starts."),
)
OPERATORS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
SOURCES = {"published": "published", "ours": "ours", "ancestor": "Open-Sora 1.2"}
# Works as descriptions name them: "Karras et al. 2024", "Seaweed-7B (2025)", "arXiv 2504.08685", "Open-Sora 2.0".
WORKS = (
    r"[A-Z][\w-]+(?: (?:&|and) [A-Z]\w+| et al\.)? \(?(?:19|20)\d\d|arXiv:? ?\d{4}\.\d{5}|Koala-36M"
    r"|Open-Sora \d\.\d"
)


def page() -> str:
    """Returns the text of docs/configuration.md."""
    lines = [
        "# Configuration reference",
        "",
        "Made by `make configuration` from the schemas in `mugv_ds/config`; a test holds that it is up to date.",
        "",
        "A config is a JSON file. `extends` names another one, relative to it, whose values come first; `--set",
        "section.key=value` on the command line comes last. Unknown keys, values of another type and values out of",
        "bounds are refused with a line that names them. A key without a default is required where its section is",
        "given.",
        "",
        "*Source* repeats what the meaning says of where a value comes from, or what stands above the table of all its",
        "values: *published* is MUG-V's paper or its trainer, *ours* was chosen by us; – says nothing, as of paths and",
        "switches.",
    ]
    shown: dict[str, str] = {}
    for name, schema, what in SCHEMAS:
        lines += ["", f"## {name}", "", what]
        for part in _sections(name, schema, shown):
            lines += ["", *part]
    return "\n".join(lines) + "\n"


def _sections(title: str, schema: type[BaseModel], shown: dict[str, str]) -> Iterator[list[str]]:
    """Yields the sections of a schema, each with the tables of those in it; adds to `shown` the headings by content."""
    document = schema.model_json_schema()
    sections = document["$defs"]
    for key, field in document["properties"].items():
        heading = f"{title}: {key}"
        if (name := _section(field)) is None:
            yield [f"### {heading}", "", f"{_type(field, sections)}. {field.get('description', '')}".strip()]
            continue
        content = json.dumps(_resolved(sections[name], sections), sort_keys=True)
        if content in shown:
            yield [f"### {heading}", "", f"As in [{shown[content]}](#{_anchor(shown[content])})."]
            continue
        shown[content] = heading
        lines = [f"### {heading}"]
        if "anyOf" in field:
            lines += ["", "Optional: without this section there is none of it."]
        yield [*lines, *_table(key, sections[name], sections)]


def _table(prefix: str, section: dict[str, Any], sections: dict[str, Any]) -> Iterator[str]:
    """Yields what a section is, the table of its keys, and then the tables of the sections in it."""
    about = " ".join(section.get("description", "").split())
    of_all = " ".join(re.findall(r"All values [^.]*\.", about))
    yield from ("", about, "", "| key | type | default | meaning | source |", "|---|---|---|---|---|")
    inner: dict[str, list[str]] = {}
    for key, field in section["properties"].items():
        path = f"{prefix}.{key}"
        if name := _section(field):
            inner.setdefault(name, []).append(path if field.get("type") != "array" else f"{path}[]")
        default = f"`{json.dumps(field['default'], ensure_ascii=False)}`" if "default" in field else "required"
        meaning = " ".join(field.get("description", "").split())
        cells = (f"`{path}`", _type(field, sections), default, meaning, _source(meaning) or _source(of_all) or "–")
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    for name, paths in inner.items():
        yield from ("", f"**{', '.join(f'`{path}`' for path in paths)}**")
        yield from _table(paths[0] if len(paths) == 1 else f"{prefix}.*", sections[name], sections)


def _section(field: dict[str, Any]) -> str | None:
    """The name of the section that a field is, may be, or is a list of."""
    options = [field, *field.get("anyOf", []), *field.get("allOf", []), field.get("items", {})]
    names = [option["$ref"].split("/")[-1] for option in options if isinstance(option, dict) and "$ref" in option]
    return names[0] if names else None


def _type(field: dict[str, Any], sections: dict[str, Any]) -> str:
    """The type of a field in words, with its bounds."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(option, sections) for option in field["anyOf"]))
    if "$ref" in field:
        return "section"
    if "const" in field or "enum" in field:
        return " or ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array" and "prefixItems" in field:
        return f"[{', '.join(_type(item, sections) for item in field['prefixItems'])}]"
    if kind == "array":
        return f"list of {_type(field['items'], sections)}"
    name = {"number": "float", "integer": "int", "boolean": "bool", "object": "object"}.get(kind, kind or "any value")
    bounds = [
        f"{sign} {field[key]:g}" if isinstance(field[key], float) else f"{sign} {field[key]:,}"
        for key, sign in OPERATORS.items()
        if key in field
    ]
    return f"{name} {', '.join(bounds)}".strip()


def _source(text: str) -> str:
    """Where a text says that a value comes from: published, ours, and the works that it names."""
    found = [source for word, source in SOURCES.items() if re.search(rf"\b{word}\b", text, re.IGNORECASE)]
    works = [work.replace("(", "") for work in re.findall(WORKS, text)]
    return ", ".join(dict.fromkeys([*found, *works]))


def _resolved(value: Any, sections: dict[str, Any]) -> Any:
    """The value with the sections that it refers to put in, by which equal ones are known."""
    if isinstance(value, dict) and "$ref" in value:
        return _resolved(sections[value["$ref"].split("/")[-1]], sections)
    if isinstance(value, dict):
        return {key: _resolved(inner, sections) for key, inner in value.items()}
    return [_resolved(inner, sections) for inner in value] if isinstance(value, list) else value


def _anchor(heading: str) -> str:
    """The id that Markdown gives a heading."""
    return re.sub(r"[^\w-]+", "-", heading.lower()).strip("-")


def main(argv: Sequence[str] | None = None) -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(argv)
    print(page(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
