"""Pictures for the documentation: what each method's plan looks like, and what it draws at about twice the speed.

    python -m hasten.benchmarks.gallery

All methods start from the same noise; their settings are those nearest to twice the speed, and the times over the pictures were measured
in the same run, each beside a plain one.
"""

from __future__ import annotations

import argparse
import statistics
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import hasten
from hasten.accelerators.caching.plan import Plan
from hasten.benchmarks.harness import check_target, results_page, steady_memory
from hasten.benchmarks.rivals import captions
from hasten.pipelines.zoo.loading import call_defaults, load, path_of

CAPTIONS = (
    "a large red circle left of a small blue square",
    "a small green cross above a large yellow circle",
    "a large blue triangle, a small red square and a small green circle",
)
KNOWN = 12
"""Captions that calibrated methods see, other ones."""
STEPS, SEED, ROUNDS = 50, 20_260_401, 3
PICTURES = results_page("x")


def methods(pipe: Any, call: dict[str, Any]) -> dict[str, Any]:
    """By name, at about twice the speed."""
    known = captions(KNOWN, SEED)
    planned = hasten.plan(pipe, known, speedup=2.0, held_out=2, batch=5, progress=False, **call)
    return {
        "planner": planned,
        "Forecast, every 2nd": hasten.Forecast(interval=2, start=2),
        "Delta-DiT, all blocks, every 2nd": hasten.DeltaDiT(interval=2, cached=1.0),
        "FORA, every 2nd": hasten.FORA(interval=2),
        "first block, 0.12": hasten.FirstBlock(threshold=0.12, warmup=4),
        "TeaCache, 0.13": hasten.calibrate(pipe, known, hasten.TeaCache(threshold=0.13), progress=False, **call),
        "MagCache, 0.03": hasten.calibrate(pipe, known[:1], hasten.MagCache(threshold=0.03, max_skip=2), progress=False, **call),
        "Forecast and skipped guidance": [hasten.Forecast(interval=2, start=20), hasten.SkipGuidance(interval=4, start=20)],
    }


def draw(target: Any, call: dict[str, Any]) -> tuple[float, Tensor]:
    """Seconds of a call, and its latents."""
    generators = [torch.Generator().manual_seed(SEED + i) for i in range(len(CAPTIONS))]
    began = time.perf_counter()
    latents = target(list(CAPTIONS), generator=generators, output_type="latent", return_dict=False, **call)[0]
    return time.perf_counter() - began, latents.float()


def pictures(pipe: Any, latents: Tensor) -> np.ndarray:
    """[N, height, width, 3] in [0, 1]."""
    with torch.no_grad():
        images = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
    return np.asarray((images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))


def gallery(path: Path, model: str = "shapes-flow") -> dict[str, Plan]:
    """Draws with every method, writes the gallery, and returns what was executed."""
    from matplotlib.figure import Figure

    steady_memory()
    pipe: Any = load(model)
    pipe.set_progress_bar_config(disable=True)
    call = {**call_defaults(path_of(model)), "num_inference_steps": STEPS}
    fewer = {**call, "num_inference_steps": STEPS // 2}
    targets = {name: hasten.accelerate(pipe, method) for name, method in methods(pipe, call).items()}
    draw(pipe, call)
    rows: list[tuple[str, np.ndarray]] = []
    reference = draw(pipe, call)[1]
    rows.append((f"plain, {STEPS} steps", pictures(pipe, reference)))
    for name, target, arguments in [("fewer steps", pipe, fewer), *((n, t, call) for n, t in targets.items())]:
        ratios = []
        for r in range(ROUNDS + 1):
            plain, _ = draw(pipe, call)
            spent, latents = draw(target, arguments)
            if r:  # the first traces
                ratios.append(plain / spent)
        errors = (latents - reference).flatten(1).norm(dim=1) / reference.flatten(1).norm(dim=1)
        rows.append((f"{name}\n{statistics.median(ratios):.2f}x, error {float(errors.mean()):.3f}", pictures(pipe, latents)))
    figure = Figure(figsize=(1.45 * len(rows), 1.5 * len(CAPTIONS) + 0.6), layout="constrained")
    axes = figure.subplots(len(CAPTIONS), len(rows), squeeze=False)
    for column, (title, images) in enumerate(rows):
        for row, image in enumerate(images):
            axes[row, column].imshow(image, interpolation="nearest")
            axes[row, column].set_axis_off()
        axes[0, column].set_title("\n".join(textwrap.fill(line, 18) for line in title.split("\n")), fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return {name: target.report.plan for name, target in targets.items() if target.report.plan is not None}


def plans(path: Path, executed: dict[str, Plan]) -> None:
    """Every plan as a heat map, with those of a UNet beside."""
    from matplotlib.figure import Figure

    unet: Any = load("shapes-unet")
    unet.set_progress_bar_config(disable=True)
    call = {**call_defaults(path_of("shapes-unet")), "num_inference_steps": STEPS}
    with torch.no_grad():
        deep = hasten.accelerate(unet, hasten.DeepCache(interval=3))
        draw(deep, call)
        quant = hasten.accelerate(
            unet, hasten.calibrate(unet, captions(KNOWN, SEED), hasten.CacheQuant(interval=5, weights=None), progress=False, **call)
        )
        draw(quant, call)
    assert deep.report.plan is not None and quant.report.plan is not None
    shown = {**executed, "DeepCache on a UNet, every 3rd": deep.report.plan, "CacheQuant's schedule, 5 steps a refresh": quant.report.plan}
    across = 2
    figure = Figure(figsize=(13, 1.9 * -(-len(shown) // across)), layout="constrained")
    axes = figure.subplots(-(-len(shown) // across), across, squeeze=False).ravel()
    for axis, (name, plan) in zip(axes, shown.items(), strict=False):
        plan.plot(axis, f"{name}: {100 * plan.computed_fraction:.0f}% computed")
    for axis in axes[len(shown) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of `python -m hasten.benchmarks.gallery`."""
    parser = argparse.ArgumentParser(prog="python -m hasten.benchmarks.gallery", description=(__doc__ or "").partition("\n")[0])
    where = PICTURES.parent.parent / "pictures" if PICTURES is not None else Path()
    parser.add_argument("--out", type=Path, default=where, metavar="DIR", help="where the pictures go (default: docs/pictures)")
    options = parser.parse_args(arguments)
    check_target(options.out / "caching-gallery.png", "--out")
    with torch.no_grad():
        executed = gallery(options.out / "caching-gallery.png")
    plans(options.out / "caching-plans.png", executed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
