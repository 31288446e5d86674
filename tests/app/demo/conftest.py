"""The page, served in this process so that tests can look behind it, and a real browser in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from hasten.app.demo.command import free_port
from hasten.app.demo.runs import Models
from hasten.pipelines.zoo.loading import MODELS

CHROMIUM = Path("/usr/bin/chromium")


@dataclass(frozen=True)
class Served:
    """A page that is up."""

    address: str
    models: Models
    page: Any


@pytest.fixture(scope="session")
def models() -> Models:
    """The zoo; what a test has loaded, the next one finds loaded."""
    return Models(MODELS)


@pytest.fixture(scope="session")
def served(models: Models) -> Iterator[Served]:
    from hasten.app.demo.page import build, launch

    page = build(models, 64)
    address = launch(page, "127.0.0.1", free_port("127.0.0.1"))
    yield Served(address, models, page)
    page.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium. It is not skipped where there is none: a page that nobody has looked at is not tested."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM.is_file(), f"the demo is tested in a real browser, and {CHROMIUM} is missing: apt-get install chromium"
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        )
        yield started
        started.close()
