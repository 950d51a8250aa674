"""A hook of MkDocs: the API's pages, one for each room of the code, which mkdocstrings fills from the docstrings.

They are made when the site is built, as `mkdocs.yml` asks, and follow the reference of the configuration.
"""

import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
HOUSE = runpy.run_path(str(ROOT / "tools/house.py"))


def api_pages() -> dict[str, str]:
    """Returns the text of each room's page, by the name of its file."""
    modules: dict[str, list[str]] = {}
    for file in HOUSE["files"]():
        top = HOUSE["KERNELS"].parent if file.is_relative_to(HOUSE["KERNELS"]) else ROOT
        parts = file.relative_to(top).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) == 1:
            continue
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        modules.setdefault(HOUSE["room_of"](file).removesuffix(".py"), []).append(name)
    return {
        f"api/{room}.md": "\n\n".join([f"# {room}", *(f"::: {name}" for name in sorted(names))]) + "\n"
        for room, names in sorted(modules.items())
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the pages to the navigation's last part."""
    config.nav[-1]["Reference"].append({"API": list(api_pages())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages to those that are built."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    return files
