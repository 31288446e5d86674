"""The page and the pictures of `hasten bench steering`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hasten.accelerators.steering.fk import FKSteering
from hasten.benchmarks.harness import Results, bars_last, table
from hasten.pipelines.steering import steer
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes.reward import ShapesReward

PLOT, GALLERY, LINEAGE, REWARDS = "steering-time.png", "steering-gallery.png", "steering-lineage.png", "steering-rewards.png"


def _rate(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def rows_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every method: its accuracy, its cost, and best-of-N in the same time."""
    head = [
        "method", "correct (95%)", "change in points (95%)", "all particles", "apart", "reward", "denoiser calls", "s per caption",
        "samples of time", "best-of-N in that time",
    ]  # fmt: skip
    independent = next(row["apart"] for row in rows if row["apart"] is not None)  # best-of-N comes first
    lines = [
        [
            row["variant"],
            f"{_rate(row['accuracy'])} ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
            f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})" if row is not rows[0] else "",
            _rate(row["all_particles"]),
            "" if row["apart"] is None else f"{row['apart'] / independent:.2f}",
            f"{row['reward']:.3f}",
            f"{row['steps']:.0f}",
            f"{row['seconds']:.2f}",
            f"{row['samples_of_time']:.2f}",
            _rate(row.get("equal_time")),
        ]
        for row in rows
    ]
    return table(head, lines)


def mixture_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """How far each potential and each kernel is off."""
    lines = [
        [
            row["what"],
            f"{row['strength']:g}" if "strength" in row else "",
            f"{row['mean']:.4f} ({row['exact'][0]:.4f})" if "mean" in row else "",
            f"{row['variance']:.4f}" + (f" ({row['exact'][1]:.4f})" if "exact" in row else f" ({100 * row['variance_off']:.1f}% off)"),
        ]
        for row in rows
    ]
    return table(["what", "lambda", "mean (exact)", "variance (exact)"], lines)


def flow_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rollover against best-of-N."""
    lines = [
        [row["variant"], f"{_rate(row['accuracy'])} ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
         f"{row['reward']:.4f}", f"{row['steps']:.0f}", f"{row['seconds']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(["method", "correct (95%)", "reward", "forwards", "s per caption"], lines)


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    about = (
        f"`shapes` in bfloat16, 50 DDIM steps, {s['captions']} captions of three objects in calls of 8, all methods in turns (searches one "
        f"by one, the first {s['searched']} of them). Correct: by the exact verifier, of the sample with the greatest reward. All "
        "particles: the rate over everything that was returned. Best-of-N for every N is averaged over all choices from "
        f'{s["pool"]} independent samples, and N in "samples of time" is the method\'s whole time over that of one sample, decoding and '
        "verifying included. Apart: how far the particles of a caption are from each other, against independent ones; copies have only the "
        "noise of the steps that are left to part. FK scores and resamples at 86, 92 and 98% of the way unless the table says otherwise; "
        "its estimates are judged by a tolerance halfway between that of finished samples (exactly) and one that lets blur pass (loosely)."
    )
    return bars_last(
        results,
        "Steering, measured",
        about,
        rows_table(results.rows),
        f"![Correct against time](../pictures/{PLOT})",
        "## The same number of forwards on a flow",
        f"`shapes-flow`, {s['chains']} captions of three objects, 200 forwards for each.",
        flow_table(s["flow"]),
        "## A mixture whose answer is known",
        f"{s['particles']:,} particles, 100 steps (kernels: 50), a reward whose tilted moments are integrals.",
        mixture_table(s["mixture"]),
    )


def example(captions: Sequence[str], folder: Path) -> None:
    """One steered run, drawn: the first of the captions that steering gets right."""
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    method = FKSteering(start=0.1, every=0.15)
    target = steer(pipe, ShapesReward(), method, keep_pictures=True)
    call = {**call_defaults(path_of("shapes")), "num_inference_steps": 50, "use_resolution_binning": False}
    for seed, caption in enumerate(captions):
        image = target(caption, generator=torch.Generator().manual_seed(seed), output_type="pt", **call).images
        if bool(ShapesReward.verdict(image, [caption]).correct):
            break
    assert target.report is not None
    target.report.plot_gallery(folder / GALLERY, title=caption)
    target.report.plot_lineage(folder / LINEAGE)
    target.report.plot_rewards(folder / REWARDS)


def pictures(results: Results, folder: Path) -> None:
    """Accuracy against time (every method, and best-of-N as a line), and one run in detail."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    if results.settings["wrong"]:
        example(results.settings["wrong"][:8], folder)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.subplots()
    line = results.settings["best_of"]
    axes.plot([n for n, _ in line], [100 * rate for _, rate in line], color="#8a8a8a", marker="o", markersize=4, label="best of N")
    for row in results.rows:
        if row["variant"] in ("plain", "best of 4"):
            continue
        axes.scatter(row["samples_of_time"], 100 * row["accuracy"], s=34, zorder=3, label=row["variant"])
    axes.set_xlabel("time, in samples")
    axes.set_ylabel("fully correct (%)")
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(folder / PLOT, dpi=130)
