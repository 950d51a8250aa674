"""Headless Chromium for tests; skips where Playwright or a Chromium of the system is absent."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mugv_ds.evaluation.compare.draw import read_comparison
from mugv_ds.evaluation.compare.serve import start_server
from mugv_ds.evaluation.compare.votes import Box


@contextmanager
def chromium() -> Iterator:
    """A browser of `playwright.sync_api`."""
    playwright = pytest.importorskip("playwright.sync_api")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


@contextmanager
def served(folder: Path, port: int = 0) -> Iterator[str]:
    """The address of a comparison's page while a thread serves it."""
    comparison = read_comparison(folder)
    server, address = start_server(folder / "page", comparison, Box(folder / "votes", comparison), port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
