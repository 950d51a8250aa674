"""Reads a training config: JSON files that extend one another, then overrides, then the schema."""

import difflib
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from mugv_ds.config.deepspeed import check_deepspeed_section
from mugv_ds.config.errors import ConfigError
from mugv_ds.config.regular_file import read_text_file
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.section import Section
from mugv_ds.config.url import hidden

Json = dict[str, Any]
Schema = TypeVar("Schema", bound=Section)
_MAX_FILES = 100  # that make up a config
_MAX_FILE_BYTES = 1 << 20
_NAME = re.compile(r"\w+(/\w+)*")  # of a shipped config
_MOST_OF_A_NAME = 100  # characters
_PACKAGE = Path(__file__).parents[1]
_SHIPPED = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")  # where installed, and in the repository
_SHOWN = 60  # characters of a wrong value that an error message repeats


@dataclass(frozen=True)
class _Layer:
    """Values of one file or one override; `origin` is what an error message calls it."""

    origin: str
    values: Json


def load_config(path: str | Path, overrides: Sequence[str] = (), schema: type[Schema] = TrainConfig) -> Schema:
    """Reads the config at `path`, puts `overrides` on top and checks the result.

    A file may name another one, relative to itself, as `"extends"`, or a list of them; their values come first, in that
    order. Objects merge key by key, everything else is replaced. At most 100 files of 1 MiB make up a config.

    Args:
        path: JSON file, or the name of a shipped config, see `find_config`.
        overrides: `section.key=value`, the value as JSON, or else taken as a string. Later ones win.
        schema: what the config must be.

    Raises:
        ConfigError: anything is wrong with a file, a key or a value; one line that names file (or override) and key.
    """
    path = find_config(path)
    layers = [*_read_chain(path), *(_read_override(text) for text in overrides)]
    merged: Json = {}
    for layer in layers:
        _refuse_non_finite(layer)
        merged = _merge(merged, layer.values)
    try:
        # As JSON text, not as Python objects, so that strict mode takes a list for a tuple.
        config = schema.model_validate_json(json.dumps(merged))
        check_deepspeed_section(getattr(config, "deepspeed", {}))  # preparing data has none
    except ValidationError as error:
        raise ConfigError(_explain(error, layers, path, schema)) from None
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def find_config(name: str | Path) -> Path:
    """Returns the path of a config: of the file `name` if there is one, else of the shipped config of that name.

    Args:
        name: a path, or a name such as "stage1" or "debug/dpo". What is neither is returned as it is.
    """
    path = Path(name)
    if len(str(name)) > _MOST_OF_A_NAME or not _NAME.fullmatch(str(name)) or path.is_file():
        return path
    shipped = (folder / f"{name}.json" for folder in _SHIPPED)
    return next(filter(Path.is_file, shipped), path)


def _read_chain(path: Path) -> list[_Layer]:
    """The file at `path` and those that it extends, what comes first first; each is read once.

    A file that comes several times counts where it comes last: there its values replace what they did before.
    """
    layers: list[_Layer] = []  # what comes last first
    read: set[Path] = set()

    def visit(path: Path, origin: str, above: tuple[Path, ...]) -> None:
        """Adds the file and what it extends; `origin` asked for it, `above` extend it."""
        _refuse_irregular(path, origin)
        real = path.resolve()
        if real in above:
            raise ConfigError(f"{origin}: {path} is extended in a circle; remove one of the links")
        if real in read:
            return
        if len(read) == _MAX_FILES:
            raise ConfigError(f"{origin}: {path} would be file {_MAX_FILES + 1} of this config; merge some of them")
        read.add(real)
        values = _read_file(path)
        bases = values.pop("extends", [])
        bases = [bases] if isinstance(bases, str) else bases
        if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
            raise ConfigError(f"{path}: extends = {_show(bases)}: must be the path of a JSON file, or a list of such")
        layers.append(_Layer(str(path), values))
        for base in reversed(bases):
            visit(path.parent / base, f"{path}: extends", (*above, real))

    visit(path, str(path), ())
    return layers[::-1]


def _refuse_irregular(path: Path, origin: str) -> None:
    try:
        is_file = path.is_file()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    if not is_file:
        raise ConfigError(f"{origin}: there is no regular file {path}")


def _read_file(path: Path) -> Json:
    """The object in the file at `path`."""
    text = read_text_file(path, _MAX_FILE_BYTES, ConfigError)
    try:
        values = _parse(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}:{error.colno}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a duplicate key, thousands of digits or of brackets
        raise ConfigError(f"{path}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold a JSON object of sections")
    return values


def _read_override(text: str) -> _Layer:
    origin = f"override {hidden(text)!r}"
    key, equals, value_text = text.partition("=")
    parts = key.split(".")
    if not equals or len(parts) < 2 or not all(parts):
        raise ConfigError(f"{origin}: must read section.key=value")
    try:
        value = _parse(value_text)
    except json.JSONDecodeError:
        value = value_text
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin}: {error}") from None
    for part in reversed(parts):
        value = {part: value}
    return _Layer(origin, value)


def _parse(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_refuse_duplicates)


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> Json:
    values: Json = {}
    for key, value in pairs:
        if key in values:
            raise ConfigError(f"{key}: appears twice in one object; keep one")
        values[key] = value
    return values


def _refuse_non_finite(layer: _Layer) -> None:
    """Python's JSON reader takes NaN, Infinity and 1e999, which no setting can mean."""
    for key, value in leaves(layer.values):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{layer.origin}: {key} = {_show(value)}: must be a finite number")


def leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of everything in `value` that is neither an object nor a list."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield key, value
        return
    for name, child in items:
        yield from leaves(child, f"{key}.{name}" if key else str(name))


def _merge(base: Json, top: Json) -> Json:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = _merge(merged[key], value)
        merged[key] = value
    return merged


def _explain(error: ValidationError, layers: list[_Layer], path: Path, schema: type[Section]) -> str:
    """One line about the first wrong key, which may have broken several rules, and how many others there are."""
    by_key: dict[tuple, list[ErrorDetails]] = {}
    for details in error.errors(include_url=False):
        key, _ = _resolve(details["loc"], schema)
        by_key.setdefault(key, []).append(details)
    # A misspelt key first: it may be why another is missing.
    key = next((key for key, broken in by_key.items() if broken[0]["type"] == "extra_forbidden"), next(iter(by_key)))
    broken = by_key[key]
    more = f" (and {len(by_key) - 1} more)" if len(by_key) > 1 else ""
    origin = next((layer.origin for layer in reversed(layers) if _holds(layer.values, key)), str(path))
    return f"{origin}: {_describe(key, broken, schema)}{more}"


def _resolve(loc: tuple, schema: type[Section]) -> tuple[tuple, type[Section] | None]:
    """The key that pydantic's `loc` is about, and the section that its last name is looked up in.

    Below a key that is no section pydantic goes on with names of the types in a union, which are left out.
    """
    key, inside, section = [], None, schema
    for part in loc:
        if isinstance(part, int):
            key.append(part)
        elif section is not None:
            key.append(part)
            field, inside = section.model_fields.get(part), section
            section = _section_in(field.annotation) if field else None
    return tuple(key), inside


def _section_in(annotation: Any) -> type[Section] | None:
    """The section in a type such as `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _holds(values: Any, key: tuple) -> bool:
    """Whether section and name of `key` are in `values`; no for (), the key of rules that concern several keys."""
    for part in key[:2]:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return bool(key)


def _describe(key: tuple, broken: list[ErrorDetails], schema: type[Section]) -> str:
    name = ".".join(map(str, key))
    first = broken[0]
    if first["type"] == "value_error":  # raised by the schema's own checks, whose messages name the key
        return str(first["ctx"]["error"])
    if first["type"] == "missing":
        return f"{name}: required, and not given"
    if first["type"] == "extra_forbidden":
        return f"{name}: unknown key; {_suggest(key, schema)}"
    problems = " or ".join(details["msg"].removeprefix("Input should be ") for details in broken)
    return f"{name} = {_show(first['input'])}: must be {problems}"


def _suggest(key: tuple, schema: type[Section]) -> str:
    _, section = _resolve(key, schema)
    known = list(section.model_fields)
    prefix = "".join(f"{part}." for part in key[:-1])
    near = difflib.get_close_matches(key[-1], known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(known)}"


def _show(value: Any) -> str:
    text = hidden(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
