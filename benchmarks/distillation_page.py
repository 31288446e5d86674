"""The page and the pictures of `hasten bench distillation`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hasten.benchmarks.harness import Results, bars_last, table

GRID, SOLVERS = "distillation-grid.png", "distillation-solvers.png"
SHOWN = (
    "a large green triangle right of a large purple triangle",
    "a small red circle left of a blue square",
    "a large cyan square below a small yellow cross and right of a small purple circle",
    "a blue cross above a large red circle",
    "a small green square below a small red cross",
    "a large yellow circle left of a small blue triangle and above a green square",
)
"""Captions of the picture."""


def _correct(row: Mapping[str, Any]) -> str:
    return f"{100 * row['accuracy']:.1f}% ({100 * row['low']:.1f} to {100 * row['high']:.1f})"


def _change(row: Mapping[str, Any]) -> str:
    return f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})" if "change" in row else ""


def steps_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """By steps and method."""
    return table(
        ["variant", "steps", "correct (95%)", "points against the teacher (95%)"],
        [[row["variant"], str(row["steps"]), _correct(row), _change(row)] for row in rows],
    )


def trained_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Segmented against plain."""
    return table(
        ["training", "steps", "correct (95%)", "share of what is right"],
        [[row["variant"], str(row["steps"]), _correct(row), f"{row['share']:.4f}"] for row in rows],
    )


def preference_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Before and after."""
    return table(
        ["student of four steps", "correct (95%)", "change in points (95%)", "share of the picture that is painted"],
        [[row["variant"], _correct(row), _change(row), f"{100 * row['painted']:.2f}%"] for row in rows],
    )


def solver_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Error and accuracy by solver and steps."""
    names, counts = list(dict.fromkeys(row["variant"] for row in rows)), sorted({row["steps"] for row in rows})
    by = {(row["variant"], row["steps"]): row for row in rows}
    cells = [
        [name, *(f"{by[name, n]['error']:.3f}, {100 * by[name, n]['accuracy']:.1f}%" for n in counts)] for name in names
    ]  # fmt: skip
    return table(["solver", *(f"{n} steps" for n in counts)], cells)


def recommendation(rows: Sequence[Mapping[str, Any]]) -> str:
    """What follows from the table."""

    def said(key: str, sign: float) -> str:
        where: dict[str, list[int]] = {}
        for steps in sorted({row["steps"] for row in rows}):
            best = max((row for row in rows if row["steps"] == steps), key=lambda row: sign * row[key])
            where.setdefault(best["variant"], []).append(steps)
        return "; ".join(f"{name} at {', '.join(map(str, counts))} steps" for name, counts in where.items())

    return (
        f"Least error: {said('error', -1.0)}. Most often correct: {said('accuracy', 1.0)}. Take for your number of steps what is "
        "most often correct; where two are, what has less error."
    )


def combined_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """With time."""
    first = rows[0]["seconds"]
    return table(
        ["variant", "correct (95%)", "points against the teacher (95%)", "s per picture", "of the teacher's time"],
        [[row["variant"], _correct(row), _change(row), f"{row['seconds']:.3f}", f"{row['seconds'] / first:.3f}"] for row in rows],
    )


def cached_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Delta-DiT on four steps."""
    return table(
        ["four steps with Delta-DiT", "blocks computed", "correct (95%)", "change in points (95%)", "speed-up (least to most)"],
        [
            [
                row["variant"],
                f"{100 * row['computed']:.0f}%" if "computed" in row else "100%",
                _correct(row),
                _change(row),
                f"{row['speedup']:.2f} ({row['speedup_low']:.2f} to {row['speedup_high']:.2f})" if "computed" in row else "",
            ]
            for row in rows
        ],
    )


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s, lora = results.settings, results.settings["lora"]
    return bars_last(
        results,
        "Few steps, measured",
        f"`shapes` in bfloat16 with the LoRA that ships (`shapes-steps`, {lora['hash']}: {lora['method']}; rank {lora['rank']}), judged by "
        f"the exact verifier on {s['captions']} captions that no training saw. The teacher takes 50 DDIM steps with guidance, two denoiser "
        "rows a step; the student one row a step, its guidance folded in. Each picture has a noise of its own, the same for all variants.",
        steps_table(results.rows),
        f"![Captions in columns; the teacher, the student in 8, 4, 2 and 1 steps, and the undistilled model](../pictures/{GRID})",
        "## With caching and steering",
        f"{s['triples']} captions of three things, variants in turns, eight captions a call. The student's pictures are the best of four "
        "particles, resampled on the way.",
        combined_table(s["combined"]),
        f"Delta-DiT alone, four steps: {s['cached'][0]['captions']} captions of the whole world; times are medians of {s['rounds']} rounds "
        "in turns.",
        cached_table(s["cached"]),
        "## Segmented and plain consistency training",
        f"{s['trained']} optimiser steps each of the same adapters on the same pictures, from the base; {s['judged']} captions. "
        "Segmented: stages of 4 and 2 segments, an eighth of the steps each, then 1. Short trainings: what ships was trained longer.",
        trained_table(s["trained_rows"]),
        "## A preference",
        f"{s['tuned']} optimiser steps of online PSO: of two samples the one with more that is right is preferred, and of equally right "
        "ones the one with larger things.",
        preference_table(s["preference"]),
        "## Solvers without distillation",
        f"In float32: relative L2 error of the latents against DDIM in 1,000 steps from the same noise ({s['reference']} captions), and "
        f"fully correct pictures ({s['solved']} captions).",
        solver_table(s["solvers"]),
        recommendation(s["solvers"]),
        f"![Error by steps](../pictures/{SOLVERS})",
    )


def pictures(results: Results, folder: Path) -> None:
    """The grid by steps and method, and the solvers' errors."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    grid(folder / GRID)
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    rows = results.settings["solvers"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        axes.plot([row["steps"] for row in mine], [row["error"] for row in mine], marker="o", markersize=4, label=name)
    axes.set_yscale("log")
    axes.set_xlabel("steps")
    axes.set_ylabel("relative L2 error")
    axes.legend(frameon=False)
    figure.savefig(folder / SOLVERS, dpi=130)


def grid(path: Path) -> None:
    """Pictures of the same captions from the same noise: a row for each variant."""
    from matplotlib.figure import Figure

    from hasten.benchmarks.distillation import Bench, right
    from hasten.pipelines.zoo.shapes import parse

    bench, captions = Bench(), [parse(text) for text in SHOWN]
    drawn: list[tuple[str, torch.Tensor]] = [("teacher\n50 steps", bench.solved(captions, "DDIM", 50))]
    drawn += [(f"step LoRA\n{n} step{'s' if n > 1 else ''}", bench.few(captions, n)) for n in (8, 4, 2, 1)]
    drawn += [(f"DPM++ 2M\n{n} steps", bench.solved(captions, "DPM++ 2M", n)) for n in (4, 2)]
    figure = Figure(figsize=(1.25 * len(captions) + 1, 1.25 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), len(captions))
    for y, (name, images) in enumerate(drawn):
        found = right(images, captions)
        for x, image in enumerate(images):
            place = axes[y][x]
            place.imshow(np.clip(image.permute(1, 2, 0).numpy(), 0, 1), interpolation="nearest")
            place.set_xticks([])
            place.set_yticks([])
            for spine in place.spines.values():
                spine.set_color("#2e8540" if found[x] else "#c0392b")
                spine.set_linewidth(2)
        axes[y][0].set_ylabel(name, fontsize=8)
    figure.savefig(path, dpi=110)
