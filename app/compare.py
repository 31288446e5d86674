"""One picture that shows what acceleration does: the pictures side by side, their difference, the plan and the figures."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hasten.app.measure import Comparison, Variant, decibels, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.patches import Patch

INK, FAINT, GOOD, BAD = "#1c2733", "#66727f", "#1b7f4b", "#b3372f"
CELL, LABEL, HEAD, FOOT = 1.75, 1.9, 0.62, 2.9
"""Inches: a picture, the captions' column, the headings, the plan and figures underneath."""


MOST_ROWS = 24
"""Captions that one picture can show."""


def amplification(comparison: Comparison) -> int:
    """The power of two that brings the differences just up to full scale, at most 32."""
    pairs = zip(comparison.accelerated.images, comparison.plain.images, strict=True)
    largest = max(float(np.quantile(np.abs(values(a) - values(b)).max(-1), 0.995)) for a, b in pairs)
    return int(2 ** np.clip(np.floor(np.log2(1 / max(largest, 1 / 64))), 0, 5))


def draw_comparison(comparison: Comparison, model: str, settings: Mapping[str, Any]) -> bytes:
    """The comparison as a PNG.

    Args:
        comparison: From `measure`.
        model: For the title.
        settings: Kept as JSON in the PNG's text under `hasten`.
    """
    from matplotlib.figure import Figure

    count = len(comparison.job)
    width, height = LABEL + 4 * CELL + 0.35, 0.55 + HEAD + count * (CELL + 0.28) + FOOT
    figure = Figure(figsize=(width, height), facecolor="white")
    figure.text(
        0.15 / width,
        1 - 0.3 / height,
        f"{model}: {comparison.method}",
        fontsize=13,
        weight="bold",
        color=INK,
        va="center",
        parse_math=False,
    )

    def box(left: float, top: float, wide: float, high: float) -> Axes:
        """Axes by inches from the top left."""
        return figure.add_axes((left / width, 1 - (top + high) / height, wide / width, high / height))

    scale = amplification(comparison)
    accelerated = comparison.accelerated
    headings = [
        ("plain", f"{comparison.plain.steps} steps, {comparison.plain.seconds:.2f} s"),
        ("accelerated", f"{accelerated.steps} steps, {accelerated.seconds:.2f} s, {comparison.speedup(accelerated):.2f}×"),
        (f"difference, {scale}× amplified", "accelerated − plain"),
        ("fewer steps", f"{comparison.fewer.steps} steps, {comparison.fewer.seconds:.2f} s, {comparison.speedup(comparison.fewer):.2f}×"),
    ]
    for column, (first, second) in enumerate(headings):
        x = (LABEL + (column + 0.5) * CELL) / width
        figure.text(x, 1 - (0.55 + 0.16) / height, first, ha="center", va="center", fontsize=9.5, weight="bold", color=INK)
        figure.text(x, 1 - (0.55 + 0.38) / height, second, ha="center", va="center", fontsize=8, color=FAINT)
    for row, caption in enumerate(comparison.job.captions):
        top = 0.55 + HEAD + row * (CELL + 0.28)
        label = "\n".join(textwrap.wrap(caption, 24)[:7])
        figure.text(
            0.15 / width, 1 - (top + CELL / 2) / height, label, va="center", fontsize=9, color=INK, linespacing=1.4, parse_math=False
        )
        difference = np.abs(values(comparison.accelerated.images[row]) - values(comparison.plain.images[row]))
        shown = [*(values(variant.images[row]) for variant in comparison.variants[:2]), np.clip(scale * difference, 0, 1)]
        shown.append(values(comparison.fewer.images[row]))
        for column, picture in enumerate(shown):
            axes = box(LABEL + column * CELL + 0.05, top, CELL - 0.1, CELL - 0.1)
            # Small pictures as they are, pixel by pixel; large ones are reduced, which needs a filter.
            axes.imshow(picture, interpolation="nearest" if max(picture.shape) <= 128 else "antialiased")
            _bare(axes)
        for column, variant in ((0, comparison.plain), (1, comparison.accelerated), (3, comparison.fewer)):
            _note(box(LABEL + column * CELL + 0.05, top + CELL - 0.1, CELL - 0.1, 0.2), comparison, variant, row)
    under = height - FOOT + 0.1
    _plan(box(0.75, under + 0.3, width - 0.9, FOOT - 1.8), comparison)
    _figures(box(0.15, height - 1.02, width - 0.3, 0.95), comparison)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=140, metadata={"hasten": json.dumps(settings), "Title": f"hasten: {comparison.method}"})
    return buffer.getvalue()


def draw_plan(comparison: Comparison) -> bytes:
    """The plan that was executed, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.9), facecolor="white", layout="constrained")
    _plan(figure.subplots(), comparison)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _bare(axes: Axes) -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("#c9d0d6")
        spine.set_linewidth(0.6)


def _note(axes: Axes, comparison: Comparison, variant: Variant, row: int) -> None:
    """Under a picture: how far from plain, and whether the verifier finds what the caption says."""
    axes.axis("off")
    right = variant.correct[row]
    verdict = "" if right is None else "correct" if right else "wrong"
    distance = "" if variant is comparison.plain else decibels(comparison.psnr(variant, row))
    if distance and verdict:
        axes.text(0.0, 0.5, distance, fontsize=7.5, color=FAINT, va="center")
        axes.text(1.0, 0.5, verdict, fontsize=7.5, color=GOOD if right else BAD, va="center", ha="right")
    else:
        axes.text(
            0.5, 0.5, distance or verdict, fontsize=7.5, color=FAINT if distance else GOOD if right else BAD, va="center", ha="center"
        )


def _plan(axes: Axes, comparison: Comparison) -> None:
    plan = comparison.plan
    plan.plot(axes)
    axes.set_title("")
    axes.legend(handles=_patches(axes), loc="lower right", bbox_to_anchor=(1.01, 0.98), ncols=2, frameon=False, fontsize=8, labelcolor=INK)
    computed = f"the plan: {len(plan.sites)} blocks × {plan.steps} steps, {100 * plan.computed_fraction:.0f}% computed"
    axes.text(0.0, 1.05, computed, transform=axes.transAxes, fontsize=8.5, color=INK, ha="left", va="bottom", weight="bold")
    axes.set_xlabel("step", fontsize=8, color=FAINT, labelpad=1)
    axes.set_ylabel("block", fontsize=8, color=FAINT)
    axes.tick_params(labelsize=7, colors=FAINT, length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _patches(axes: Axes) -> list[Patch]:
    """The handles of the legend that is there, to be laid out anew."""
    from matplotlib.patches import Patch

    legend = axes.get_legend()
    return [patch for patch in legend.get_patches() if isinstance(patch, Patch)] if legend is not None else []


def _figures(axes: Axes, comparison: Comparison) -> None:
    axes.axis("off")
    heading, *rows = comparison.table()
    columns = len(heading)
    for r, row in enumerate((heading, *rows)):
        for c, cell in enumerate(row):
            x = 0.0 if c == 0 else 0.13 + 0.87 * c / (columns - 1)
            head = r == 0
            weight = "bold" if c == 0 and not head else "normal"
            style: dict[str, Any] = {"fontsize": 7.5 if head else 8.5, "color": FAINT if head else INK, "weight": weight}
            axes.text(x, 1 - (r + 0.5) / 5, cell, ha="left" if c == 0 else "right", va="center", **style)
    axes.text(0.0, 0.1, footnote(comparison), fontsize=7, color=FAINT, va="center")


def footnote(comparison: Comparison) -> str:
    """What the figures are, in one line."""
    rounds = len(comparison.plain.rounds)
    times = f"times of all {len(comparison.job)} pictures" if len(comparison.job) > 1 else "times of one picture"
    turns = f"median of {rounds} interleaved rounds" if rounds > 1 else "one round"
    return (
        f"{times}, {turns}; speed-up of the denoiser loop; “at most”: if reuse were free; PSNR and error against plain with the same noise"
    )
