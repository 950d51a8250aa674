"""The site: what is generated is up to date, all links lead somewhere, and nothing is asked of a network."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mugv_ds.config.prepare_schema import PrepareConfig
from mugv_ds.config.schema import TrainConfig
from mugv_ds.config.vae_schema import VaeTrainConfig
from tests.helpers.browser import chromium
from tests.helpers.pages import PAGES, ROOT

CONFIGURATION = runpy.run_path(str(ROOT / "tools/configuration.py"))


def anchors(text: str) -> set[str]:
    """The ids of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_the_reference_of_the_configuration_is_up_to_date():
    assert (ROOT / "docs/configuration.md").read_text() == CONFIGURATION["page"](), "run `make configuration`"


def test_the_reference_has_every_key_of_every_schema():
    page = (ROOT / "docs/configuration.md").read_text()
    for title, schema in (("Training", TrainConfig), ("VideoVAE", VaeTrainConfig), ("Preparation", PrepareConfig)):
        for section in schema.model_fields:
            assert f"\n### {title}: {section}\n" in page
        for name, definition in schema.model_json_schema()["$defs"].items():
            for key in definition["properties"]:
                assert re.search(rf"^\| `[\w.*\[\]]+\.{key}` \|", page, re.MULTILINE), (name, key)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith(("http://", "https://")):
            name, _, anchor = link.partition("#")
            target = page.parent / name if name else page
            assert target.is_file(), link
            assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1]
    assert {*re.findall(r"([\w-]+\.md)$", navigation, re.MULTILINE)} == {page.name for page in PAGES[1:]}


def test_the_readme_is_two_screens_with_a_small_picture():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 110
    (picture,) = re.findall(r"!\[.+\]\((.+)\)", readme)
    assert 10_000 < (ROOT / picture).stat().st_size < 300_000


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The folder of the site, built as `make docs` builds it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    return folder


@pytest.mark.long
def test_the_site_is_built_without_a_warning_and_names_no_other_server(site):
    pages = [*site.rglob("*.html")]
    assert len(pages) > 40
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'src="(?:https?:)?//[^"]+', text), page
        assert not re.findall(r'<link[^>]+href="(?:https?:)?//[^"]+', text), page
    interface = (site / "api/objectives.html").read_text()
    assert "mugv_ds.objectives.flow.shift_time" in interface and "Esser et al. 2024" in interface


@pytest.mark.long
@pytest.mark.parametrize("width", [1400, 420])
def test_pages_fit_the_window_and_are_searched_without_a_server(site, width):
    asked = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: asked.append(request.url))
        for name in ("index", "configuration", "how-it-works", "api/objectives"):
            page.goto(f"file://{site}/{name}.html")
            assert page.evaluate("document.documentElement.scrollWidth") <= width, name
        if width > 1000:
            page.click("input.md-search__input")
            page.keyboard.type("offload")
            page.wait_for_selector(".md-search-result__item", timeout=30_000)
    assert asked and not [url for url in asked if url.startswith("http")]
