"""Pieces of HTML: nothing that a visitor wrote is markup, and a heat map shows the plan's cells."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from hasten.accelerators.caching.plan import Action, Plan
from hasten.app.demo import markup
from hasten.app.demo.markup import Shown
from hasten.app.demo.runs import News


class Tags(HTMLParser):
    """All tags and all words."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.words += data


PLAIN = Image.new("RGB", (2, 2))
written = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=40)


@given(written)
def test_what_was_written_is_words_and_never_markup(text: str) -> None:
    for drawn in (
        markup.said(text), markup.hint(text), markup.note(text), markup.progress(News(text, 0.5)),
        markup.pictures([Shown(PLAIN, text, text)]), markup.table([("head",), (text,)]),
    ):  # fmt: skip
        plain = Tags(re.sub(r'src="data:[^"]*"', "", drawn))
        known = {"p", "div", "i", "figure", "img", "figcaption", "small", "table", "tr", "th", "td"}
        assert {tag for tag, _ in plain.tags} <= known
        assert text.strip() in plain.words
        assert not any(name.startswith("on") for _, attributes in plain.tags for name in attributes)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, sites, branches = draw(st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(1, 2)))
    cells = draw(st.lists(st.integers(0, 2), min_size=steps * sites * branches, max_size=steps * sites * branches))
    names = ("*",) if branches == 1 else ("cond", "uncond")
    return Plan(np.array(cells).reshape(steps, sites, branches), tuple(f"block <{i}>" for i in range(sites)), names)


@given(plans())
def test_a_heat_map_covers_every_cell_once_in_its_colour(plan: Plan) -> None:
    rows = len(plan.sites) * len(plan.branches)
    wanted = [[Action(int(a)).name.lower() for a in plan.actions[:, r % len(plan.sites), r // len(plan.sites)]] for r in range(rows)]
    found: list[list[str | None]] = [[None] * plan.steps for _ in range(rows)]
    for tag, given_ in Tags(markup.heat_map(plan, "plan")).tags:
        if tag == "rect":
            begin, row, width = (int(given_[name] or 0) for name in ("x", "y", "width"))
            for step in range(begin, begin + width):
                assert found[row][step] is None
                found[row][step] = given_["class"]
    assert found == wanted
    buttons = [attributes for tag, attributes in Tags(markup.heat_map(plan, "plan", cells=True)).tags if tag == "button"]
    assert len(buttons) == plan.actions.size
    for at, button in enumerate(buttons):
        step, site, branch = map(int, (button["data-cell"] or "").split(","))
        assert (branch * len(plan.sites) + site, step) == divmod(at, plan.steps)  # they are laid out row by row
        assert button["class"] == Action(int(plan.actions[step, site, branch])).name.lower()
        assert f"step {step}, block <{site}>" in (button["aria-label"] or "")


def test_a_small_picture_is_enlarged_pixel_by_pixel_and_a_large_one_stays() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    large = np.asarray(markup.enlarged(Image.fromarray(pixels)))
    assert large.shape == (512, 512, 3)
    assert np.array_equal(large[::8, ::8], pixels) and np.array_equal(large[7::8, 7::8], pixels)
    assert markup.enlarged(Image.new("RGB", (1024, 512))).size == (1024, 512)


def test_a_plot_has_the_colour_of_the_page_and_no_width_of_its_own() -> None:
    drawn = markup.plot(lambda axes: (axes.plot([0, 1], [0, 1], label="line"), axes.set_title("title"), axes.legend()))
    svg = next(attributes for tag, attributes in Tags(drawn).tags if tag == "svg")
    assert "width" not in svg and "height" not in svg and "viewbox" in svg
    assert markup.INK not in drawn and "currentColor" in drawn and "matplotlib.org" not in drawn


def test_a_verdict_is_a_word_and_not_a_colour_alone() -> None:
    assert "correct" in markup.verdict(True) and "wrong" in markup.verdict(False) and markup.verdict(None) == ""
