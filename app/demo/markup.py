"""Pieces of HTML: pictures, tables, heat maps of plans and plots. Everything that a visitor wrote is escaped here."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from hasten.app.demo.runs import News

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from PIL.Image import Image

    from hasten.accelerators.caching.plan import Plan

SMALL = 128
"""Pixels up to which a picture is enlarged pixel by pixel."""
INK = "#123457"
"""Stands in plots for the colour of the page's text."""


# ----------------------------------------------------------------------------------------------------------------- messages


def progress(news: News) -> str:
    """What a run is doing, and how far it is."""
    known = news.done is not None
    width = f"{100 * (news.done or 0.0):.0f}%"
    bar = f'<div class="hasten-bar"><i style="width:{width}"></i></div>' if known else '<div class="hasten-bar unknown"><i></i></div>'
    return f"<p>{escape(news.label)}{f' · {width}' if known else ''}</p>{bar}"


def said(text: str, kind: str = "done") -> str:
    """A line in the place of the progress: kind is "done", "stopped" or "failed"."""
    return f'<p class="{kind}" role="status">{escape(text)}</p>'


def hint(text: str) -> str:
    """In the place of results that are not there yet."""
    return f'<div class="hasten-hint">{escape(text)}</div>'


def note(text: str) -> str:
    """Small print."""
    return f'<p class="hasten-note">{escape(text)}</p>'


# ----------------------------------------------------------------------------------------------------------------- pictures


@dataclass(frozen=True)
class Shown:
    """A picture with what stands under it.

    Attributes:
        image: None where it is still to come.
        title: In one line.
        small: Below the title, fainter.
        right: The verifier's verdict, None where there is none.
    """

    image: Image | None
    title: str
    small: str = ""
    right: bool | None = None


def data_uri(image: Image) -> str:
    """The picture within the page: PNG where it is small, else WebP."""
    buffer = io.BytesIO()
    kind = "png" if max(image.size) <= 4 * SMALL else "webp"
    image.save(buffer, kind, **({} if kind == "png" else {"quality": 90}))
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def verdict(right: bool | None) -> str:
    """A sign and a word, so that it does not take colours to tell them apart."""
    return "" if right is None else '<span class="right">✓ correct</span>' if right else '<span class="wrong">✗ wrong</span>'


def pictures(shown: Sequence[Shown]) -> str:
    """Side by side, as many as fit."""
    return f'<div class="hasten-pictures{_small([each.image for each in shown])}">{"".join(map(_figure, shown))}</div>'


def _figure(shown: Shown) -> str:
    drawn = f'<img src="{data_uri(shown.image)}" alt="{escape(shown.title)}">' if shown.image is not None else hint("…")
    small = "".join(f"<small>{escape(line)}</small>" for line in shown.small.splitlines())
    return f"<figure>{drawn}<figcaption>{escape(shown.title)} {verdict(shown.right)}{small}</figcaption></figure>"


def _small(images: Sequence[Image | None]) -> str:
    return " hasten-small" if all(max(image.size) <= SMALL for image in images if image is not None) else ""


def enlarged(image: Image) -> Image:
    """A small picture several times as large, pixel by pixel, for components that show pictures in their own size."""
    from PIL.Image import Resampling

    factor = max(1, 512 // max(image.size)) if max(image.size) <= SMALL else 1
    return image.resize((image.width * factor, image.height * factor), Resampling.NEAREST)


# ------------------------------------------------------------------------------------------------------------------- tables


def table(rows: Sequence[Sequence[str]], verdicts: Sequence[bool | None] = ()) -> str:
    """Rows of words, a heading first; `verdicts` colour the last cell of the rows below it."""
    head, *body = rows
    lines = ["<tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>"]
    for number, row in enumerate(body):
        right = verdicts[number] if number < len(verdicts) else None
        kind = "" if right is None else ' class="right"' if right else ' class="wrong"'
        cells = [f"<td{kind if place == len(row) - 1 else ''}>{escape(cell)}</td>" for place, cell in enumerate(row)]
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return f'<div class="hasten-scroll"><table class="hasten-table">{"".join(lines)}</table></div>'


# ---------------------------------------------------------------------------------------------------------------- heat maps


def heat_map(plan: Plan, title: str, *, cells: bool = False) -> str:
    """A plan: a column for each step, a row for each block (and branch, where there are several).

    Args:
        plan: What is drawn.
        title: Above it.
        cells: Whether each cell is a button, with `data-cell="step,site,branch"`.
    """
    return (
        f'<div class="hasten-heat"><div class="title"><span>{escape(title)}: {len(plan.sites)} blocks × {plan.steps} steps, '
        f'{100 * plan.computed_fraction:.0f}% computed</span><span class="legend">{_legend(plan)}</span></div>'
        f"{_buttons(plan) if cells else _rectangles(plan)}"
        f'<div class="axis"><span>step 0, first block on top</span><span>step {plan.steps - 1}</span></div></div>'
    )


def _names() -> dict[int, str]:
    from hasten.accelerators.caching.plan import Action

    return {int(action): action.name.lower() for action in Action}


def _legend(plan: Plan) -> str:
    present = [(value, name) for value, name in _names().items() if (plan.actions == value).any()]
    return "".join(f'<span><i class="{name}"></i>{name.replace("_", " ")}</span>' for _, name in present)


def _rows(plan: Plan) -> list[tuple[int, int]]:
    """(site, branch) of every row."""
    return [(site, branch) for branch in range(len(plan.branches)) for site in range(len(plan.sites))]


def _buttons(plan: Plan) -> str:
    names, made = _names(), []
    for site, branch in _rows(plan):
        for step in range(plan.steps):
            name = names[int(plan.actions[step, site, branch])]
            where = f"step {step}, {plan.sites[site]}: {name.replace('_', ' ')}"
            made.append(
                f'<button type="button" class="{name}" data-cell="{step},{site},{branch}" aria-label="{escape(where)}" '
                f'title="{escape(where)}"></button>'
            )
    return f'<div class="hasten-cells" style="grid-template-columns:repeat({plan.steps},minmax(0,1fr))">{"".join(made)}</div>'


def _rectangles(plan: Plan) -> str:
    names, rows, made = _names(), _rows(plan), []
    for y, (site, branch) in enumerate(rows):
        column, begin = plan.actions[:, site, branch].tolist(), 0
        for step in range(1, plan.steps + 1):
            if step == plan.steps or column[step] != column[begin]:
                made.append(f'<rect class="{names[column[begin]]}" x="{begin}" y="{y}" width="{step - begin}" height="0.92"/>')
                begin = step
    high = max(70, min(260, 13 * len(rows)))
    return (
        f'<svg viewBox="0 0 {plan.steps} {max(1, len(rows))}" preserveAspectRatio="none" shape-rendering="crispEdges" '
        f'style="height:{high}px" role="img" aria-label="heat map of the plan">{"".join(made)}</svg>'
    )


# -------------------------------------------------------------------------------------------------------------------- plots


def plot(draw: Callable[[Axes], Any], size: tuple[float, float] = (4.6, 2.7)) -> str:
    """What `draw` draws, as SVG whose words and lines have the colour of the page's text.

    Args:
        draw: Is given axes.
        size: Inches; small, so that words are large enough on a narrow page.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    draw(axes)
    for each in figure.axes:
        _recolour(each)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    head, rest = drawn.split(">", 1)
    head = re.sub(r' (width|height)="[^"]*"', "", head)  # the page says how wide it is
    return f'<div class="hasten-plot">{head}>{rest}</div>'


def _recolour(axes: Axes) -> None:
    """Everything that is not data gets the ink."""
    axes.patch.set_alpha(0)
    axes.tick_params(colors=INK, labelsize=8)
    for words in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts):
        words.set_color(INK)
        words.set_fontsize(9)
    for side, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_linewidth(0.5)
        spine.set_visible(side in ("left", "bottom"))
    legend = axes.get_legend()
    if legend is not None:
        for text in legend.get_texts():
            text.set_color(INK)


def plots(drawn: Sequence[str]) -> str:
    """Side by side, where there is room."""
    return f'<div class="hasten-plots">{"".join(drawn)}</div>'
