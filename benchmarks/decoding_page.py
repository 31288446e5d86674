"""The page, the tables and the pictures of `hasten bench decoding`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hasten.benchmarks.harness import Results, bars_table, surroundings, table

PLOT = "decoding-tokens-per-forward.png"


def _percent(figures: Mapping[str, Any]) -> str:
    return f"{100 * figures['accuracy']:.1f}%"


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every setting, all tasks together and each by itself."""
    names = list(rows[0]["tasks"])
    head = ["schedule", "tokens per forward", "over static", "solved (95%)", "change in points (95%)", *names]
    lines = [
        [
            row["variant"],
            f"{row['tokens_per_forward']:.2f}",
            f"{row['speedup']:.2f}x",
            f"{_percent(row)} ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
            f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})" if row is not rows[0] else "",
            *(f"{_percent(row['tasks'][name])} at {row['tasks'][name]['tokens_per_forward']:.2f}" for name in names),
        ]
        for row in rows
    ]
    return table(head, lines)


def verdict(comparison: Mapping[str, float]) -> str:
    """What an interval says."""
    if comparison["low"] > 0:
        return "better"
    return "worse" if comparison["high"] < 0 else "no difference shown"


def comparison_table(comparisons: Sequence[Mapping[str, Any]]) -> str:
    """Each schedule against threshold decoding at the same number of tokens per forward."""
    lines = []
    for found in comparisons:
        each = "; ".join(f"{s['setting']}: {s['points']:+.1f} ({s['low']:+.1f} to {s['high']:+.1f})" for s in found["settings"])
        lines.append((found["family"], f"{found['points']:+.1f} ({found['low']:+.1f} to {found['high']:+.1f})", verdict(found), each))
    return table(("schedule", "points over threshold (95%)", "so it is", "by setting"), lines, left=("so it is", "by setting"))


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    command = "hasten bench decoding --quick" if results.quick else "hasten bench decoding"
    tasks = len(results.rows[0]["tasks"])
    exact = [(row["name"], f"{row['differ']} of {row['prompts']}") for row in s["equivalences"]]
    drafts = [
        (str(row["batch"]), str(row["drafts"]), f"{row['prompts']:,}", str(row["differ"]), f"{row['fewer_forwards']:.2f}x")
        for row in s["freedave"]
    ]
    few = " (a full run uses 1,000)" if s["prompts"] < 1_000 else ""
    engine = [(row["schedule"], f"{row['differ']} of {row['prompts']}", f"{row['forwards']:.2f}") for row in s["engine"]]
    speed = [
        (row["variant"], f"{1e3 * row['seconds_per_token']:.1f} ms", str(row["calls"]), str(row["tokens_unlike"])) for row in s["speed"]
    ]
    timed = s["speed"][0]
    arithmetic = "under bf16 autocast" if s["bf16"] else "in fp32"
    return "\n\n".join([
        "# Decoding, measured",
        f"Written by `{command}`, never by hand. What was measured is the small `puzzles` model, whose answers can be checked exactly; no "
        "public checkpoint was.",
        surroundings(results),
        "## Bars",
        bars_table(results.bars),
        "## Accuracy and tokens per forward",
        f"{s['prompts']:,} prompts of each of {tasks} tasks that training never saw{few}, greedy, {arithmetic}, "
        f"blocks of {s['block_length']}, answers of at most {s['gen_length']} tokens. *Tokens* are those up to the end-of-text, that one "
        "included; what a block holds behind it is padding, which is decoded and not counted, so that static decoding has less than one "
        "token per forward. *Forwards* are a row's until it is done. *Change* is against static decoding, paired.",
        f"![Accuracy against tokens per forward](../pictures/{PLOT})",
        rows_table(results.rows),
        "## Against threshold decoding at the same number of tokens per forward",
        "Points of accuracy over threshold decoding, whose accuracy is read between its settings, with 95% intervals from "
        f"{s['draws']:,} draws of the prompts. A schedule's own figure is the mean over its settings. *Better* and *worse* are said where "
        "the interval does not hold 0; a schedule that was published as an improvement and is not called better here was not shown to be "
        "one, on this model.",
        comparison_table(s["comparisons"]),
        "## FreeDave against static decoding",
        "fp32. A batch is decoded by both in the same order; *unlike* counts answers of which any token differs.",
        table(("batch", "drafts", "prompts", "unlike", "fewer forwards"), drafts),
        "## Equivalences",
        "fp32, the same batches. *Unlike* counts answers whose tokens or number of forwards differ (under the entropy bound only tokens: "
        "positions without any entropy join the first one).",
        table(("limit", "unlike"), exact),
        "## The engine",
        "Its answers against those of the loop without a cache, fp32: *unlike* counts answers of which any token differs. *Forwards* are "
        "over the loop's; keeping a finished block may take one more.",
        table(("schedule", "unlike", "forwards"), engine),
        f"Time against diffusers' own pipeline with the same drop-in schedule and random weights: {timed['model']}, length "
        f"{timed['length']}, batch {timed['batch']}.",
        table(("variant", "time per token", "model calls", "tokens unlike"), speed),
    ]) + "\n"  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- pictures


def pictures(
    rows: Sequence[Mapping[str, Any]], orders: Mapping[str, tuple[Sequence[str], np.ndarray]], prompt: str, folder: Path
) -> list[Path]:
    """Writes the plot of all settings, and the order of decoding under each schedule.

    Args:
        rows: As in the results.
        orders: By the schedule's name, the characters of the answer and [steps, positions] who committed what, as `Subject.order` has it.
        prompt: What was asked.
        folder: Where they go.

    Returns:
        The files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plot(rows, folder / PLOT)
    written = [folder / PLOT]
    for name, (characters, grid) in orders.items():
        written.append(folder / f"decoding-{name}.png")
        order(name, characters, grid, prompt, written[-1])
    return written


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against tokens per forward: a panel for all tasks and one for each."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    panels = ["all tasks", *rows[0]["tasks"]]
    figure = Figure(figsize=(15, 9), layout="constrained")
    axes = figure.subplots(2, 3).ravel()
    families = list(dict.fromkeys(row["family"] for row in rows))
    marks = "osD^v<>PX*hdp8"
    for axis, panel in zip(axes, panels, strict=False):
        for i, family in enumerate(families):
            mine = [row if panel == "all tasks" else row["tasks"][panel] for row in rows if row["family"] == family]
            points = sorted((figures["tokens_per_forward"], 100 * figures["accuracy"]) for figures in mine)
            strong = family in ("static", "threshold")
            colour = {"static": "black", "threshold": "red"}.get(family, colormaps["tab20"](i % 20))
            x, y = zip(*points, strict=True)
            line = "-" if strong else ":"
            axis.plot(x, y, line, marker=marks[i % len(marks)], color=colour, linewidth=2 if strong else 1, markersize=5, label=family)
        axis.set(title=panel, xlabel="tokens per forward", ylabel="solved, %")
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    axes[len(panels)].legend(*axes[0].get_legend_handles_labels(), loc="center", ncols=2, frameon=False)
    figure.savefig(path, dpi=90)


def order(name: str, characters: Sequence[str], grid: np.ndarray, prompt: str, path: Path) -> None:
    """Positions by steps, coloured by the step that committed what stands there; white is masked, a cross was masked again."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    steps, positions = grid.shape
    colours = colormaps["viridis"](np.linspace(0.0, 0.95, max(steps, 2)))
    picture = np.where(grid[..., None] > 0, colours[np.maximum(grid, 1) - 1], 1.0)
    figure = Figure(figsize=(0.34 * positions + 1.1, 0.26 * steps + 1.1), layout="constrained")
    axis = figure.subplots()
    axis.imshow(picture, aspect="auto", interpolation="nearest")
    for step in range(steps):
        for place in range(positions):
            if grid[step, place] == step + 1:  # committed in this very step
                dark = grid[step, place] < 0.6 * steps
                stands = (grid[step:, place] == step + 1).all()
                text = (characters[place] or "·") if stands else "?"
                axis.text(place, step, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
            elif step and grid[step - 1, place] > 0 and grid[step, place] == 0:
                axis.text(place, step, "×", ha="center", va="center", fontsize=9, color="red")
    axis.set_xticks(range(positions), [character or "·" for character in characters])
    axis.set_yticks(range(steps), [str(step + 1) for step in range(steps)], fontsize=7)
    axis.set(ylabel="step", title=f"{name}: {prompt}")
    axis.title.set_fontsize(9)
    axis.set_xticks(np.arange(-0.5, positions), minor=True)
    axis.set_yticks(np.arange(-0.5, steps), minor=True)
    axis.grid(which="minor", color="0.85", linewidth=0.5)
    axis.tick_params(which="both", length=0)
    figure.savefig(path, dpi=100)
