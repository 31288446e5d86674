"""CacheQuant on the shapes UNet: what each of its parts does to the error, and what is left of the accuracy.

    hasten bench caching-cachequant

The order is the paper's: the deep branch at an even interval with 8-bit layers and nothing else, then the dynamic schedule, then the two
corrections.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.cachequant import CacheQuant
from hasten.accelerators.caching.deepcache import DeepCache
from hasten.benchmarks.harness import (
    Bar,
    Note,
    Results,
    bars_last,
    command_line,
    conduct,
    paired_difference,
    results_page,
    run_from_command_line,
    steady_memory,
    table,
    wilson,
)
from hasten.pipelines.accelerated import accelerate
from hasten.pipelines.calibration import calibrate
from hasten.pipelines.zoo.loading import call_defaults, load, path_of
from hasten.pipelines.zoo.shapes import sample_scenes, verify

NAME = "caching-cachequant"
STEPS, INTERVAL = 50, 5
POINTS, BYTES = 2.0, 0.27
"""The bars: accuracy within two points of full compute, weights over those in fp32."""
CALIBRATION_SEED, HELD_OUT_SEED = 20_260_301, 20_260_302
FULL: dict[str, Any] = {"captions": 512, "batch": 64, "calibration": 32}
QUICK: dict[str, Any] = {"captions": 64, "batch": 32, "calibration": 16}


@dataclass(frozen=True)
class Variant:
    """A setting: `method` is None for plain. `ablation` numbers the bar's order."""

    name: str
    method: Any = None
    ablation: int | None = None


VARIANTS = (
    Variant("plain"),
    Variant(f"DeepCache, every {INTERVAL}", DeepCache(interval=INTERVAL)),
    Variant("schedule and cache correction, no quantisation", CacheQuant(INTERVAL, weights=None)),
    Variant("W8A8 alone", CacheQuant(1, cache_correction=False, output_correction=False)),
    Variant("W8A8 alone, without smoothing", CacheQuant(1, cache_correction=False, output_correction=False, smoothing=0)),
    Variant(
        "naive: even interval, W8A8", CacheQuant(INTERVAL, schedule="uniform", cache_correction=False, output_correction=False), ablation=0
    ),
    Variant("plus dynamic schedule", CacheQuant(INTERVAL, cache_correction=False, output_correction=False), ablation=1),
    Variant("plus corrections", CacheQuant(INTERVAL), ablation=2),
    Variant("even interval, W8A8, corrections", CacheQuant(INTERVAL, schedule="uniform")),
    Variant("planned schedule, W8A8", CacheQuant(INTERVAL, schedule="planned", cache_correction=False, output_correction=False)),
    Variant("planned schedule, W8A8, corrections", CacheQuant(INTERVAL, schedule="planned")),
    Variant("all parts with 8-bit state", CacheQuant(INTERVAL, state="int8")),
    Variant("W4A8, all parts", CacheQuant(INTERVAL, weights="int4")),
)


class Bench:
    """The UNet's pipeline, drawing fixed captions on fixed noise."""

    def __init__(self, captions: int, batch: int) -> None:
        self.pipe: Any = load("shapes-unet")
        self.pipe.set_progress_bar_config(disable=True)
        self.batch = batch
        self.call = {**call_defaults(path_of("shapes-unet")), "num_inference_steps": STEPS}
        self.captions = self.words(captions, HELD_OUT_SEED)
        self.noise = torch.randn(captions, 4, 8, 8, generator=torch.Generator().manual_seed(HELD_OUT_SEED))

    @staticmethod
    def words(count: int, seed: int) -> list[str]:
        """Captions never seen in training."""
        scenes = sample_scenes(count, torch.Generator().manual_seed(seed), held_out=False, placed=False)
        return [str(caption) for caption in scenes.captions()]

    def draw(self, target: Any) -> Tensor:
        """Final latents of all captions."""
        made = []
        for at in range(0, len(self.captions), self.batch):
            part = slice(at, at + self.batch)
            made.append(
                target(self.captions[part], latents=self.noise[part], output_type="latent", return_dict=False, **self.call)[0].float()
            )
        return torch.cat(made)

    def pictures(self, latents: Tensor) -> Tensor:
        """uint8 [N, 3, 64, 64]."""
        with torch.no_grad():
            images = self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor, return_dict=False)[0]
        return ((images / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def execute(captions: int, batch: int, calibration: int, note: Note) -> Results:
    """Calibrates every variant on captions of its own and draws the held-out ones."""
    steady_memory()
    results = Results(NAME, False, settings={"captions": captions, "batch": batch, "calibration": calibration})
    bench = Bench(captions, batch)
    known = bench.words(calibration, CALIBRATION_SEED)
    tick = note("variants", len(VARIANTS))
    base: tuple[Tensor, list[bool]] | None = None
    for variant in VARIANTS:
        plan = None
        target: Any = bench.pipe
        if variant.method is not None:
            plan = variant.method
            if isinstance(plan, CacheQuant):
                plan = calibrate(bench.pipe, known, plan, batch=min(batch, calibration), progress=False, **bench.call)
            target = accelerate(bench.pipe, plan)
            target(bench.captions[:2], latents=bench.noise[:2], output_type="latent", **bench.call)  # traces and quantises
        latents = bench.draw(target)
        right = verify(bench.pictures(latents), bench.captions).correct.tolist()
        base = base or (latents, right)
        errors = np.asarray((latents - base[0]).flatten(1).norm(dim=1) / base[0].flatten(1).norm(dim=1))
        change = paired_difference(base[1], right)
        low, high = wilson(sum(right), len(right))
        quantised = plan.facts.get("quantised") if plan is not None and hasattr(plan, "facts") else None
        results.rows.append({
            "variant": variant.name,
            "ablation": variant.ablation,
            "computed_fraction": target.report.computed_fraction if plan is not None else 1.0,
            "error": float(errors.mean()),
            "error_median": float(statistics.median(errors.tolist())),
            "accuracy": sum(right) / len(right),
            "accuracy_low": low,
            "accuracy_high": high,
            "change": 100 * change.value,
            "change_low": 100 * change.low,
            "change_high": 100 * change.high,
            "bytes_of_fp32": quantised["bytes_of_fp32"] if quantised else None,
        })  # fmt: skip
        tick()
    results.bars = bars_of(results.rows)
    return results


def bars_of(rows: Sequence[dict[str, Any]]) -> list[Bar]:
    """The bars, from the rows."""
    steps = sorted((row for row in rows if row["ablation"] is not None), key=lambda row: row["ablation"])
    bars = []
    for before, after in pairwise(steps):
        note = f"{before['error']:.4f} to {after['error']:.4f}"
        bars.append(Bar.at_most(f"error of '{after['variant']}' over the step before", after["error"] / before["error"], 1.0, note))
    last = steps[-1]
    quantised = [row for row in rows if row["bytes_of_fp32"] == last["bytes_of_fp32"] and row["computed_fraction"] < 1]
    best = max(quantised, key=lambda row: row["change"])
    note = (
        f"{best['variant']}; 95% interval {best['change_low']:+.1f} to {best['change_high']:+.1f}; with the dynamic schedule "
        f"{last['change']:+.1f}"
    )
    bars.append(Bar.at_least(f"W8A8 at interval {INTERVAL}, best schedule: change of accuracy in points", best["change"], -POINTS, note))
    bars.append(Bar.at_most("8-bit weights over fp32, scales included", last["bytes_of_fp32"], BYTES, "first and last layer included"))
    return bars


def page(results: Results) -> str:
    """The results as a Markdown page."""
    s = results.settings
    head = [
        "variant",
        "computed",
        "error",
        "median error",
        "correct (95%)",
        "change in points (95%)",
        "weights / fp32",
    ]
    lines = [
        [
            row["variant"],
            f"{100 * row['computed_fraction']:.0f}%",
            f"{row['error']:.4f}",
            f"{row['error_median']:.4f}",
            f"{100 * row['accuracy']:.1f}% ({100 * row['accuracy_low']:.1f} to {100 * row['accuracy_high']:.1f})",
            f"{row['change']:+.1f} ({row['change_low']:+.1f} to {row['change_high']:+.1f})",
            f"{row['bytes_of_fp32']:.3f}" if row["bytes_of_fp32"] else "",
        ]
        for row in results.rows
    ]
    about = (
        f"`shapes-unet`, {STEPS} DDIM steps, {s['captions']} held-out captions in batches of {s['batch']}, the same noise for all; "
        f"calibrated on {s['calibration']} others. Error: mean over captions of |latents - plain| / |plain|. Times are not compared here."
    )
    return bars_last(results, "CacheQuant, measured", about, table(head, lines))


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, **settings: Any) -> int:
    """Runs the benchmark and writes its page.

    Args:
        quick: Small settings, within ten minutes on two cores; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/caching-cachequant.md, after a full run.
        settings: Of `execute`, in place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    chosen = {**(QUICK if quick else FULL), **settings}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs if docs is not None or quick else results_page(NAME))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.cachequant`."""
    meanings = {"captions": "held-out captions", "batch": "captions in a call", "calibration": "captions to calibrate on"}
    settings = {name: (FULL[name], meaning) for name, meaning in meanings.items()}
    return run_from_command_line(run, command_line("cachequant", __doc__), settings, arguments)


if __name__ == "__main__":
    raise SystemExit(main())
