"""Compiled blocks and cached blocks, each alone and both together.

    hasten bench caching-compiled

Blocks are compiled one by one with `fullgraph=True`, so a graph break would be an error; plans are static.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.forecast import Forecast
from hasten.benchmarks.harness import (
    Bar,
    Note,
    Ratios,
    Results,
    Timing,
    bars_last,
    conduct,
    median_interval,
    paired_ratios,
    results_page,
    spread,
    steady_memory,
    table,
)
from hasten.benchmarks.rivals import NOISE_SEED, Drawer, captions
from hasten.pipelines.accelerated import accelerate

NAME = "caching-compiled"
CASE, STEPS = "shapes, DPM++ 2M", 50
METHODS: dict[str, Any] = {"Delta-DiT": DeltaDiT(interval=2, cached=1.0), "forecast": Forecast(interval=3)}
FULL: dict[str, Any] = {"batch": 8, "rounds": 9}
QUICK: dict[str, Any] = {"batch": 4, "rounds": 3}


@dataclass(frozen=True)
class Made:
    """What one way of running made, and what was compiled after its first run."""

    latents: Tensor
    recompiled: int


def compile_blocks(denoiser: nn.Module, sites: tuple[str, ...]) -> None:
    """Compiles every block by itself, in place: they are alike, so one graph serves them all."""
    for site in sites:
        denoiser.get_submodule(site).compile(fullgraph=True)


@torch.no_grad()
def execute(batch: int, rounds: int, note: Note) -> Results:
    """Times all ways in turns and compares what they make."""
    steady_memory()
    results = Results(NAME, False, settings={"batch": batch, "rounds": rounds, "case": CASE})
    words = captions(batch, NOISE_SEED)
    drawers = {"": Drawer(CASE, words, NOISE_SEED), "compiled": Drawer(CASE, words, NOISE_SEED)}
    compile_blocks(drawers["compiled"].pipe.transformer, drawers["compiled"].trace.sites)
    targets: dict[str, tuple[Drawer, Any]] = {"plain": (drawers[""], drawers[""].pipe)}
    targets["compiled"] = drawers["compiled"], drawers["compiled"].pipe
    for name, method in METHODS.items():
        for kind, drawer in drawers.items():
            fast = accelerate(drawer.pipe, method)
            fast.traces["transformer"] = drawer.trace
            targets[f"{name}, compiled" if kind else name] = drawer, fast
    made: dict[str, Made] = {}

    def timed(name: str) -> Callable[[], Timing]:
        drawer, target = targets[name]

        def run() -> Timing:
            before = counters["stats"]["unique_graphs"]
            seconds, latents = drawer.draw(target, STEPS)
            recompiled = counters["stats"]["unique_graphs"] - before if name in made else 0
            made[name] = Made(latents, made[name].recompiled + recompiled if name in made else 0)
            return Timing(seconds, seconds)

        return run

    others = {name: timed(name) for name in targets if name != "plain"}
    ratios = paired_ratios(timed("plain"), others, rounds=rounds, least=rounds, done=note("rounds", rounds))
    ratios["plain"] = Ratios([1.0], [])
    for name in targets:
        alone = made[name.removesuffix(", compiled")].latents if "," in name else made["plain"].latents
        error = (made[name].latents - alone).flatten(1).norm(dim=1) / alone.flatten(1).norm(dim=1)
        speedups = [1 / ratio for ratio in ratios[name].clock]
        results.rows.append({
            "variant": name,
            "speedup": spread(speedups)[0],
            "speedup_interval": median_interval(speedups),
            "difference": float(error.median()),
            "recompiled": made[name].recompiled,
        })  # fmt: skip
    results.bars = bars_of(results.rows)
    return results


def bars_of(rows: list[dict[str, Any]]) -> list[Bar]:
    """The bars, from the rows."""
    of = {row["variant"]: row for row in rows}
    bars = []
    for name in METHODS:
        both, alone = of[f"{name}, compiled"], max((of["compiled"], of[name]), key=lambda row: row["speedup"])
        note = f"{both['speedup']:.2f}x against {alone['speedup']:.2f}x, {alone['variant']} alone"
        bars.append(
            Bar.at_least(f"{name}: compiled and cached over the faster of either alone", both["speedup"] / alone["speedup"], 1.0, note)
        )
    again = sum(row["recompiled"] for row in rows)
    bars.append(Bar.at_most("graphs compiled after the first run", again, 0, "over all variants and rounds"))
    return bars


def page(results: Results) -> str:
    """The results as a Markdown page."""
    lines = [
        [
            row["variant"],
            f"{row['speedup']:.2f}x",
            f"{row['speedup_interval'][0]:.2f} to {row['speedup_interval'][1]:.2f}",
            f"{row['difference']:.1e}",
            str(row["recompiled"]),
        ]
        for row in results.rows
    ]
    return bars_last(
        results,
        "Compiled and cached blocks, measured",
        f"`{CASE}`, {STEPS} steps, calls of {results.settings['batch']} captions, {results.settings['rounds']} rounds. Difference: "
        "median over captions of |latents - those of the same method without compilation| / their norm; of methods alone, against plain.",
        table(["variant", "speed-up", "95% interval", "difference", "recompiled"], lines),
    )


def run(quick: bool = False, json_path: Path | None = None, docs: Path | None = None, **settings: Any) -> int:
    """Runs the benchmark and writes its page.

    Args:
        quick: Small settings; writes a page only where it is told to.
        json_path: Where the JSON goes, or None.
        docs: Where the page goes; in a source checkout docs/results/caching-compiled.md, after a full run.
        settings: Of `execute`, in place of the quick or full ones.

    Returns:
        Exit code: 0 where every bar holds, 1 where one does not, 2 where it could not be run as asked (one line on stderr).
    """
    chosen = {**(QUICK if quick else FULL), **settings}
    return conduct(NAME, execute, page, chosen, json_path=json_path, docs=docs if docs is not None or quick else results_page(NAME))
