"""Pictures of the page for the docs: every tab, driven in a browser.

python -m hasten.app.demo.screenshots docs/pictures
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from hasten.app.demo.command import free_port
from hasten.app.demo.runs import Models
from hasten.pipelines.zoo.loading import MODELS

CHROMIUM = "/usr/bin/chromium"
WIDE, NARROW = 1440, 390
MOST_BYTES = 250_000
PATIENCE = 240_000
"""Milliseconds for a run."""
SHOTS = (
    ("compare", "light", WIDE), ("plan", "light", WIDE), ("steer", "dark", WIDE), ("text", "light", WIDE), ("steps", "light", WIDE),
    ("compare", "dark", NARROW), ("text", "light", NARROW),
)  # fmt: skip
"""Tab, theme and width of each."""


def file_name(tab: str, width: int) -> str:
    """Of a picture."""
    return f"demo-{tab}{'-narrow' if width == NARROW else ''}.png"


def shoot(browser: Any, address: str, tab: str, theme: str, width: int) -> bytes:
    """Opens a tab, runs it, does what else it offers, and takes its picture."""
    context = browser.new_context(viewport={"width": width, "height": 900})
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(f"{address}?__theme={theme}&tab={tab}")
    page.locator(f"#{tab}-run").click()
    page.locator(".hasten-status:visible p.done").first.wait_for()
    if tab == "compare":
        page.locator("#compare-fewer").click()
        page.locator("#compare-figures").get_by_text("fewer steps").wait_for()
    if tab == "plan":
        page.locator("[data-cell='3,2,0']").click()
        page.locator("#plan-changes pre").wait_for()
        page.locator("#plan-front").click()
        page.locator("#plan-pareto").get_by_text("your plan", exact=True).last.wait_for()
    page.locator(".hasten-status:visible p.done").first.wait_for()
    page.mouse.move(0, 0)
    page.wait_for_timeout(700)  # for the bars and buttons that fade
    taken = bytes(page.screenshot(full_page=True))
    context.close()
    return taken


def small(picture: bytes) -> bytes:
    """The PNG with as many colours as keep it below `MOST_BYTES`."""
    from PIL import Image

    image = Image.open(io.BytesIO(picture)).convert("RGB")
    for colours in (None, 256, 128, 64):
        buffer = io.BytesIO()
        (image if colours is None else image.quantize(colours)).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def main(folder: Path) -> None:
    """Serves the page and writes all pictures."""
    from playwright.sync_api import sync_playwright

    from hasten.app.demo.page import build, launch

    models = Models(MODELS)
    page = build(models, 64)
    address = launch(page, "127.0.0.1", free_port("127.0.0.1"))
    models.warm_up()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        for tab, theme, width in SHOTS:
            target = folder / file_name(tab, width)
            target.write_bytes(small(shoot(browser, address, tab, theme, width)))
            print(target, flush=True)
        browser.close()
    page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures"))
