"""`hasten verify`: one page, with nothing outside it, that shows a pipeline plain, accelerated, and with fewer steps."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hasten._version import __version__
from hasten.app import files
from hasten.app.compare import draw_plan, footnote
from hasten.app.errors import BadInput
from hasten.app.measure import Comparison, decibels, measure
from hasten.app.output import Outcome, table
from hasten.app.setup import Options, check, prepare

if TYPE_CHECKING:
    from PIL.Image import Image

_STYLE = """
:root { color-scheme: light dark; --ink: light-dark(#1c2733, #e4e9ee); --faint: light-dark(#66727f, #98a4af) }
:root { --line: light-dark(#dde2e6, #36404a); --paper: light-dark(#fff, #14191e) }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 72rem; margin: 2rem auto }
body { padding: 0 1rem } h1 { font-size: 1.4rem; margin-bottom: .2rem } h2 { font-size: 1.05rem; margin-top: 2rem }
p, figcaption, th, dt { color: var(--faint) } p, figcaption { font-size: .88rem }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { padding: .35rem .6rem; text-align: right; border-bottom: 1px solid var(--line); font-weight: normal }
th:first-child, td:first-child { text-align: left } td:first-child { font-weight: 600 }
section { border-top: 1px solid var(--line); padding: 1rem 0 } .row { display: grid; grid-template-columns: repeat(3, 1fr); gap: 1rem }
figure { margin: 0 } figure img { width: 100%; border-radius: 3px } .small { image-rendering: pixelated }
.plan { width: 100%; background: #fff; border-radius: 3px } .correct { color: #1b9f5b } .wrong { color: #d9534f }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .88rem } dd { margin: 0; overflow-wrap: anywhere }
"""


def verify(options: Options, captions: Sequence[str], target: Path | None, rounds: int | None = None) -> Outcome:
    """Measures the user's own pipeline on the user's own captions, and writes the page if `target` is given.

    Raises:
        BadInput: Something that was asked for is not allowed; nothing was written.
        PlanError: The plan does not fit the run; nothing was written.
    """
    if options.method == "none":
        raise BadInput("--method must be delta-dit or auto, or a --plan given: verify holds it against none")
    if target is not None:
        files.check_target("--html", target)
    ready = prepare(check(options), captions)
    assert ready.fast is not None
    comparison = measure(ready.fast, ready.job, shapes=ready.model.choice.shipped, rounds=rounds)
    settings = {**ready.settings(), "captions": list(captions)}
    lines = [table(comparison.table()), footnote(comparison)]
    lines += [f"not reused: {reason}" for reason in comparison.report.reasons]
    lines += [f"warning: {warning}" for warning in comparison.report.warnings]
    if target is not None:
        files.write(target, page(comparison, ready.model.choice.title, settings).encode())
        lines.append(str(target))
    data = {**settings, "html": str(target) if target is not None else None, **comparison.to_json()}
    return Outcome(data, "\n".join(lines))


def page(comparison: Comparison, model: str, settings: Mapping[str, Any]) -> str:
    """The whole comparison as one HTML document with its pictures inside."""
    say = html.escape
    title = f"{model}: {comparison.method}"
    heading, *rows = comparison.table()
    table = "".join(f"<th>{say(cell)}</th>" for cell in heading)
    body = "".join("<tr>" + "".join(f"<td>{say(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    facts = "".join(
        f"<dt>{say(str(name))}</dt><dd>{say(str(value))}</dd>"
        for name, value in settings.items()
        if value is not None and name != "captions"
    )
    notes = [f"not reused: {reason} ({times}×)" for reason, times in comparison.report.reasons.items()]
    notes += [f"warning: {warning}" for warning in comparison.report.warnings]
    remarks = "".join(f"<p>{say(note)}</p>" for note in notes)
    sections = "".join(_section(comparison, i) for i in range(len(comparison.job)))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{say(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{say(title)}</h1><p>plain, accelerated, and plain with so few steps that the same fraction is computed; "
        f"hasten {__version__}</p>"
        f"<table><thead><tr>{table}</tr></thead><tbody>{body}</tbody></table><p>{say(footnote(comparison))}</p>{remarks}"
        f'<h2>Plan</h2><img class="plan" alt="which block is computed at which step" src="{_inline(draw_plan(comparison))}">'
        f"<h2>Pictures</h2>{sections}<h2>Settings</h2><dl>{facts}</dl></body></html>\n"
    )


def _section(comparison: Comparison, picture: int) -> str:
    figures = []
    for variant in comparison.variants:
        words = [f"<b>{html.escape(variant.name)}</b>, {variant.steps} steps"]
        if variant is not comparison.plain:
            words.append(f"{decibels(comparison.psnr(variant, picture))}, error {comparison.error(variant, picture):.3f}")
        right = variant.correct[picture]
        if right is not None:
            name = "correct" if right else "wrong"
            words.append(f'<span class="{name}">{name}</span>')
        image = variant.images[picture]
        small = ' class="small"' if max(image.size) <= 128 else ""
        source = _inline(_png(image))
        figures.append(f'<figure><img{small} alt="{variant.name}" src="{source}"><figcaption>{" · ".join(words)}</figcaption></figure>')
    caption, seed = html.escape(comparison.job.captions[picture]), comparison.job.seed + picture
    return f'<section>{caption} <span style="color: var(--faint)">(seed {seed})</span><div class="row">{"".join(figures)}</div></section>'


def _png(image: Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _inline(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()
