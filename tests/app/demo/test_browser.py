"""The page in a real browser: every tab is driven, what comes is checked, and a stopped run stops."""

from __future__ import annotations

import gc
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import pytest

from tests.app.demo.conftest import Served

PATIENCE = 60_000
CAPTION = "a small red circle left of a large blue square"


class Visitor:
    """A browser window on the page."""

    def __init__(self, browser: Any, address: str, query: str = "", width: int = 1280, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True)
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []
        self.outside: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda request: self._requested(request.url))
        self.page.goto(f"{address}?{query}")
        self.page.locator("#compare-run, #text-run, #steer-run, #plan-run, #steps-run").locator("visible=true").first.wait_for()

    def _requested(self, url: str) -> None:
        if urlparse(url).hostname not in ("127.0.0.1", None):
            self.outside.append(url)

    def open(self, tab: str) -> None:
        """Switches to a tab."""
        self.page.get_by_role("tab", name=tab.capitalize()).click()

    def slide(self, label: str, value: float) -> None:
        """Types a slider's number."""
        field = self.page.get_by_label(f"number input for {label}", exact=True).locator("visible=true").first
        field.fill(str(value))
        field.blur()

    @property
    def status(self) -> str:
        """What the open tab's run says."""
        return str(self.page.locator(".hasten-status").locator("visible=true").first.inner_text())

    def run(self, tab: str) -> str:
        """Starts the tab's run, and waits for its end."""
        self.page.locator(f"#{tab}-run").click()
        return self.ended()

    def ended(self) -> str:
        """Waits for the end of the open tab's run."""
        self.page.locator(".hasten-status p.done, .hasten-status p.failed").locator("visible=true").first.wait_for()
        return self.status

    def text(self, name: str) -> str:
        """Of an element."""
        return str(self.page.locator(f"#{name}").inner_text())


@pytest.fixture
def visit(browser: Any, served: Served) -> Iterator[Callable[..., Visitor]]:
    windows: list[Visitor] = []

    def make(query: str = "", **size: int) -> Visitor:
        windows.append(Visitor(browser, served.address, query, **size))
        return windows[-1]

    yield make
    for window in windows:
        window.context.close()
        assert not window.errors and not window.outside


def until(condition: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE / 1000
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def running() -> bool:
    """Whether a run has a thread."""
    return any(thread.name == "hasten-demo-run" for thread in threading.enumerate())


# ----------------------------------------------------------------------------------------------------------------- tabs


def test_compare(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=compare&steps=6&seed=3")
    assert window.run("compare").startswith("done in")
    figures = window.text("compare-figures")
    assert re.search(r"denoiser loop\s+[\d.]+ s\s+[\d.]+ s", figures) and re.search(r"speed-up\s+1\.00×\s+[\d.]+×", figures)
    assert re.search(r"at most\s+–\s+[\d.]+×", figures) and "verifier" in figures and "fewer" not in figures
    pictures = window.page.locator("#compare-pictures img")
    assert pictures.count() == 3
    assert window.page.locator("#compare-pictures img").first.evaluate("image => getComputedStyle(image).imageRendering") == "pixelated"
    assert [heat.split(":")[0] for heat in window.page.locator("#compare-plan .title > span:first-child").all_inner_texts()] == [
        "planned", "executed",
    ]  # fmt: skip
    assert parse_qs(urlparse(window.page.url).query) == {"tab": ["compare"], "steps": ["6"], "seed": ["3"]}
    window.page.locator("#compare-fewer").click()
    window.page.locator("#compare-figures").get_by_text("fewer steps").wait_for()
    assert pictures.count() == 4 and window.page.get_by_text("fewer steps | accelerated").count() == 1
    slider = window.page.locator(".hasten-slider img")
    assert slider.count() == 2 and slider.first.evaluate("image => image.naturalWidth") == 512


@pytest.mark.slow
def test_plan(visit: Callable[..., Visitor], tmp_path: Path) -> None:
    window = visit("tab=plan&steps=4&replays=1&prompts=a+small+red+circle%0Aa+large+blue+square")
    assert window.run("plan").startswith("done in")
    assert "certificate" not in window.text("plan-about") and "held-out" in window.text("plan-about")
    cells = window.page.locator("#plan-grid [data-cell]")
    assert cells.count() == 4 * 7
    cell = window.page.locator("#plan-grid [data-cell='2,3,0']")
    before = cell.get_attribute("class")
    window.page.locator("#plan-grid [data-cell='0,0,0']").click()
    window.page.get_by_text("the first step is computed").wait_for()
    cell.click()
    window.page.locator("#plan-changes pre").wait_for()
    window.page.get_by_text("the first step is computed").wait_for(state="detached")
    assert re.search(r"step 2, transformer_blocks\.3: \w+ -> \w+", window.text("plan-changes"))
    assert cell.get_attribute("class") != before
    with window.page.expect_download() as started:
        window.page.locator("#plan-save").click()
    file = tmp_path / started.value.suggested_filename
    started.value.save_as(file)
    from hasten.accelerators.caching.plan import Plan

    assert Plan.load(file).facts["method"].endswith(", edited")
    other = visit("tab=plan")  # a visitor who has only the file
    assert other.page.locator("#plan-grid [data-cell]").count() == 0
    other.page.locator("#plan-load input[type=file], input[type=file]").first.set_input_files(file)
    other.page.locator("#plan-grid [data-cell]").first.wait_for()
    assert other.page.locator("#plan-grid [data-cell='2,3,0']").get_attribute("class") == cell.get_attribute("class")


def test_steer(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=steer&steps=5&particles=2&versus=true")
    assert window.run("steer").startswith("done in")
    rows = window.page.locator("#steer-sides table tr")
    assert rows.count() == 4
    names = [row.split("\t")[0] for row in rows.all_inner_texts()]
    assert names[1] == "fk" and names[2].startswith("best of ") and names[3] == "zero-order"
    strip = window.page.locator("#steer-strip figure")
    assert strip.count() % 2 == 0 and strip.count() >= 4  # two particles at each step that was judged
    assert window.page.locator("#steer-strip .kept").count() >= 1
    assert window.page.locator("#steer-plots svg").count() == 2
    assert "versus" not in window.page.url and "particles=2" in window.page.url


def test_text(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=text&pace=0.3&schedule=static&beside=credit")
    window.page.locator("#text-run").click()
    tokens = window.page.locator("#text-answers .hasten-answer").first.locator(".token")
    tokens.first.wait_for()
    seen = []
    while "done" not in window.status:
        seen.append(tokens.count())
    assert len(set(seen)) > 2 and seen[0] < 6  # they came one by one
    rows = [row.split("\t") for row in window.page.locator("#text-answers table tr").all_inner_texts()]
    assert [row[0] for row in rows] == ["schedule", "static", "credit"]
    forwards = {row[0]: int(row[1]) for row in rows[1:]}
    assert forwards["credit"] < forwards["static"]
    colours = window.page.locator("#text-answers .hasten-answer").first.locator(".token")
    assert len({token.get_attribute("style") for token in colours.all()}) > 1


@pytest.mark.slow
def test_steps(visit: Callable[..., Visitor]) -> None:
    from hasten.app.demo.steps import missing

    window = visit("tab=steps&steps=8&pictures=2")
    if missing():
        assert "not here" in window.text("steps-rows") and "step LoRA" in window.run("steps")
        return
    assert window.run("steps").startswith("done in")
    names = [row.split("\t")[0] for row in window.page.locator("#steps-rows table tr").all_inner_texts()]
    assert names[1:] == ["teacher, 8 steps", "student, 8 steps", "student, 4 steps", "student, 2 steps", "student, 1 step"]
    assert window.page.locator("#steps-rows img").count() == 2 * 5


# ------------------------------------------------------------------------------------------------------------ behaviour


def test_stop_ends_the_run_and_leaves_nothing(visit: Callable[..., Visitor], served: Served) -> None:
    window = visit("tab=compare&steps=200")
    window.page.locator("#compare-run").click()
    window.page.locator(".hasten-status:visible").get_by_text(re.compile(r"round 1 · [1-9]")).wait_for()
    assert running()
    before = time.monotonic()
    window.page.locator("#compare-stop").click()
    until(lambda: not running())
    # 200 steps and more rounds are left; the page's own delay is what is waited for on a slow machine.
    assert time.monotonic() - before < 20
    window.page.locator(".hasten-status p.stopped:visible").wait_for()
    pipe = served.models._loaded["shapes"].pipe
    assert type(pipe.scheduler).__name__ == "DDIMScheduler" and not hasattr(type(pipe.scheduler), "_hasten_hook")
    gc.collect()
    from hasten.accelerators.caching.runtime import Session

    assert not [thing for thing in gc.get_objects() if type(thing) is Session]
    window.slide("Steps", 2)
    assert window.run("compare").startswith("done in")  # and the page goes on


def test_stop_takes_a_waiting_run_out_of_the_queue(visit: Callable[..., Visitor]) -> None:
    first, second = visit("tab=compare&steps=200"), visit("tab=compare&steps=2")
    first.page.locator("#compare-run").click()
    first.page.locator(".hasten-status:visible").get_by_text(re.compile(r"round 1 · [1-9]")).wait_for()
    second.page.locator("#compare-run").click()
    second.page.wait_for_timeout(500)
    second.page.locator("#compare-stop").click()
    second.page.locator(".hasten-status p.stopped:visible").wait_for()
    first.page.locator("#compare-stop").click()
    until(lambda: not running())
    second.page.wait_for_timeout(1000)
    assert not running() and second.status == "stopped" and second.page.locator("#compare-pictures img").count() == 0


def test_a_visitor_who_leaves_stops_the_run(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=compare&steps=200")
    window.page.locator("#compare-run").click()
    window.page.locator(".hasten-status:visible").get_by_text(re.compile(r"round 1 · [1-9]")).wait_for()
    window.page.close()
    until(lambda: not running())


@pytest.mark.slow
def test_two_visitors_do_not_see_each_other(visit: Callable[..., Visitor]) -> None:
    one, other = visit("tab=compare&steps=3&seed=1"), visit("tab=compare&steps=4&seed=2&caption=a+large+green+cross")
    one.page.locator("#compare-run").click()
    other.page.locator("#compare-run").click()
    assert one.ended().startswith("done in") and other.ended().startswith("done in")
    assert (
        "3 blocks" not in one.text("compare-plan") and "× 3 steps" in one.text("compare-plan") and "× 4 steps" in other.text("compare-plan")
    )
    pictures = [window.page.locator("#compare-pictures img").first.get_attribute("src") for window in (one, other)]
    assert pictures[0] != pictures[1]
    for window, steps in ((one, 3), (other, 4)):  # "fewer steps" goes on from the visitor's own result
        window.page.locator("#compare-fewer").click()
        window.page.locator("#compare-figures").get_by_text("fewer steps").wait_for()
        assert window.page.locator("#compare-figures tr").nth(1).inner_text().split()[1:3] == [str(steps)] * 2
        assert window.page.locator("#compare-pictures img").first.get_attribute("src") in pictures
    fresh = visit("tab=compare")
    fresh.page.locator("#compare-fewer").click()
    assert "compare a picture first" in fresh.ended()


def test_errors_are_messages_of_one_line(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=text&settings=nonsense%3D7")
    status = window.run("text")
    assert "nonsense" in status and "\n" not in status and "Traceback" not in status
    assert window.page.get_by_role("alert").count() >= 1 or window.page.locator(".toast-wrap").count() >= 1


def test_a_link_that_asks_for_too_much_is_said_and_the_rest_holds(visit: Callable[..., Visitor]) -> None:
    window = visit("tab=compare&steps=9999&seed=5&caption=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E")
    window.page.locator("#notice").get_by_text("the link's steps must be a number from 1 to 200, not '9999'").wait_for()
    assert window.page.get_by_label("Seed").locator("visible=true").first.input_value() == "5"
    assert window.page.locator("#compare-caption textarea").input_value() == "<img src=x onerror=alert(1)>"
    window.slide("Steps", 2)
    assert window.run("compare").startswith("done in")  # no alert was raised: `errors` stays empty, and no dialog blocks


@pytest.mark.parametrize("theme", [pytest.param("light", marks=pytest.mark.slow), "dark"])
def test_a_narrow_page_does_not_scroll_sideways(visit: Callable[..., Visitor], theme: str) -> None:
    window = visit(f"__theme={theme}&tab=text&pace=0", width=390, height=800)
    assert window.run("text").startswith("done in")
    assert window.page.evaluate("document.documentElement.scrollWidth") <= 390
    dark = window.page.evaluate("document.body.classList.contains('dark')")
    assert dark == (theme == "dark") and f"__theme={theme}" in window.page.url  # it stays in the link
