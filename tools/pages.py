"""Hooks of MkDocs, as `mkdocs.yml` names them: the API's pages, and a site that asks no other for anything.

There is a page of the API for each room of the code, made when the site is built: mkdocstrings fills it from the
docstrings.
"""

import runpy
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parents[1]
HOUSE = runpy.run_path(str(ROOT / "tools/house.py"))
# What Material's search needs where pages are opened as files: its template takes the script from there, we from here.
SHIM, OWN_SHIM = "https://unpkg.com/iframe-worker/shim", "assets/iframe-worker.js"


def api_pages() -> dict[str, str]:
    """Returns the text of each room's page, by the name of its file."""
    modules: dict[str, list[str]] = {}
    for file in HOUSE["files"]():
        room = HOUSE["room_of"](file).removesuffix(".py")
        if room != "__init__":
            top = HOUSE["KERNELS"].parent if room == "kernels" else ROOT
            name = ".".join(file.relative_to(top).with_suffix("").parts).removesuffix(".__init__")
            modules.setdefault(room, []).append(name)
    return {
        f"api/{room}.md": "\n\n".join([f"# {room}", *(f"::: {name}" for name in sorted(names))]) + "\n"
        for room, names in sorted(modules.items())
    }


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Adds the API's pages to the last part of the navigation."""
    config.nav[-1]["Reference"].append({"API": list(api_pages())})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the API's pages to those that are built."""
    for path, text in api_pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_post_page(output: str, page: Page, config: MkDocsConfig) -> str:
    """Puts our copy of the script in the place of the network's."""
    return output.replace(SHIM, get_relative_url(OWN_SHIM, page.url))


def on_post_template(output_content: str, template_name: str, config: MkDocsConfig) -> str:
    """Does the same for pages without a place of their own, such as that of addresses that lead nowhere."""
    return output_content.replace(SHIM, f"/{OWN_SHIM}")
