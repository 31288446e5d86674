"""Runs a pipeline on a few prompts and measures what the calibrated methods need: `hasten.calibrate`."""

from __future__ import annotations

import inspect
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from hasten.accelerators.caching.calibrate import SKETCH_BYTES, Sketches, Tables
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.runtime import compute_all
from hasten.accelerators.caching.trace import Trace
from hasten.pipelines.accelerated import AcceleratedPipeline, ComputeAll, denoisers_of, parse_bytes

PROBES = 12
"""Steps whose sensitivity is measured; those between are interpolated."""


class Calibrated(Protocol):
    """A method that makes its plan from what calibration measured."""

    def calibrated(self, trace: Trace, tables: Tables) -> Plan:
        """The plan for the steps of the tables."""


@dataclass(frozen=True)
class Runs:
    """The pipeline's call on fixed prompts and fixed noise, to the final latents."""

    pipe: Any
    denoiser: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch: int
    call: dict[str, Any]

    def run(self, method: Any, tick: Callable[[], None], **options: Any) -> tuple[Tensor, AcceleratedPipeline]:
        """Final latents [prompts, ...] under a method, and the wrapper that made them."""
        fast = AcceleratedPipeline(self.pipe, method, (self.denoiser,), **options)
        made = []
        for at in range(0, len(self.prompts), self.batch):
            part = slice(at, at + self.batch)
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[part]]
            out = fast(list(self.prompts[part]), generator=generators, output_type="latent", return_dict=False, **self.call)
            made.append(torch.as_tensor(out[0]).float().cpu())
            tick()
        return torch.cat(made), fast

    @property
    def calls(self) -> int:
        return math.ceil(len(self.prompts) / self.batch)

    def some(self, part: slice) -> Runs:
        return Runs(self.pipe, self.denoiser, self.prompts[part], self.seeds[part], self.batch, self.call)


def relative_errors(reference: Tensor, other: Tensor) -> np.ndarray:
    """[samples] |other - reference| / |reference|."""
    difference = (other - reference).flatten(1).norm(dim=1)
    return np.asarray(difference / reference.flatten(1).norm(dim=1).clamp_min(1e-12), dtype=np.float64)


def typical(errors: np.ndarray) -> float:
    """Geometric mean over the samples. Now and then a sample ends in another picture altogether; one of those must not decide."""
    return float(np.exp(np.log(np.maximum(errors, 1e-12)).mean()))


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step that computes everything, of one that reuses everything, and of what the sampler does beside a step."""

    full: float
    reused: float
    other: float

    def speedup(self, steps: int, computed: int) -> float:
        """Of the denoiser loop, with so many of the steps computed."""
        plain = steps * (self.full + self.other)
        return plain / (computed * self.full + (steps - computed) * self.reused + steps * self.other)


@dataclass(frozen=True)
class Measured:
    """What full-compute runs and single-step replays told; no costs where nothing was replayed."""

    trace: Trace
    tables: Tables
    latents: Tensor
    facts: dict[str, Any]
    costs: StepCosts | None = None


def measure(runs: Runs, steps: int, tick: Callable[[], None], probes: int = PROBES, budget: int = SKETCH_BYTES) -> Measured:
    """Runs everything once in full, then once for each probed step with that step's offsets reused.

    Args:
        probes: Steps whose sensitivity is measured; without any, all steps count alike.
        budget: Most bytes of sketches.
    """
    names = inspect.signature(runs.pipe.__call__).parameters
    scale = runs.call.get("guidance_scale", names["guidance_scale"].default if "guidance_scale" in names else None)
    grams, distances, latents, facts, trace = [], [], [], {}, None
    for at in range(0, len(runs.prompts), runs.batch):
        some = runs.some(slice(at, at + runs.batch))
        sketches = Sketches(steps, float(scale) if scale and scale > 1 else None, 4 * runs.batch, budget)
        made, fast = some.run(ComputeAll(), tick, force_store=True, observe=sketches)
        latents.append(made)
        grams.append(sketches.gram())
        distances.append(sketches.distances())
        trace, report = fast.trace, fast.report
        assert report.plan is not None
        facts = dict(report.plan.facts)
    assert trace is not None
    reference, gram = torch.cat(latents), np.concatenate(grams)
    everything = compute_all(trace, steps).actions
    probed = sorted({round(k) for k in np.linspace(1, steps - 1, max(1, min(probes, steps - 1)))})
    found, full, reused, other = [], [], [], []
    levels = facts.get("sigmas")
    known = Tables(gram, np.ones(steps), tuple(levels) if levels else None, np.concatenate(distances))
    if not probes:
        return Measured(trace, known, reference, facts)
    for k in probed:
        actions = everything.copy()
        actions[k] = Action.REUSE
        made, fast = runs.run(Plan(actions, trace.sites), tick)
        seconds = fast.report.step_seconds
        full.append(statistics.median(seconds[:k] + seconds[k + 1 :]))
        reused.append(seconds[k])
        other.append(max(0.0, fast.report.seconds - sum(seconds)) / steps)
        moved = np.sqrt(np.maximum(gram[:, k, k] + gram[:, k - 1, k - 1] - 2 * gram[:, k, k - 1], 1e-30))
        found.append(typical(relative_errors(reference, made) / moved))
    sensitivity = np.exp(np.interp(np.arange(steps), probed, np.log(np.maximum(found, 1e-12))))
    costs = StepCosts(*(statistics.median(seconds) for seconds in (full, reused, other)))
    return Measured(trace, replace(known, sensitivity=sensitivity), reference, facts, costs)


@contextmanager
def progress_bar(shown: bool) -> Iterator[Progress]:
    """A bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        yield bar


def steps_of(call: dict[str, Any]) -> int:
    """The number of steps that a pipeline's call asks for.

    Raises:
        ValueError: It names none, or fewer than three.
    """
    steps = call.get("num_inference_steps")
    if type(steps) is not int or steps < 3:
        raise ValueError(f"num_inference_steps must be a whole number of at least 3, not {steps!r}")
    return steps


def calibrate(
    pipe: Any,
    prompts: Sequence[str],
    method: Calibrated,
    *,
    seed: int = 0,
    batch: int = 8,
    denoiser: str | None = None,
    table_budget: int | str = SKETCH_BYTES,
    progress: bool = True,
    **call: Any,
) -> Plan:
    """Measures a pipeline on a few prompts, in full-compute runs, and lets a method make its plan from that.

        plan = hasten.calibrate(pipe, prompts[:1], hasten.MagCache(threshold=0.06), num_inference_steps=28)
        fast = hasten.accelerate(pipe, plan)

    Args:
        pipe: A diffusers pipeline that takes prompts and can return latents (`output_type="latent"`).
        prompts: What it is run on; one is enough for MagCache.
        method: A calibrated method.
        seed: Of the noise: prompt i gets seed + i.
        batch: Prompts per call.
        denoiser: Which network, where there are several.
        table_budget: Most bytes of what is kept of the offsets, whatever the model.
        progress: Whether to show a bar on stderr.
        call: Arguments of the pipeline's call; `num_inference_steps` is needed.

    Raises:
        ValueError: No prompts, no number of steps, or a method that needs no calibration.
    """
    if not prompts:
        raise ValueError("prompts is empty: there is nothing to calibrate on")
    if not hasattr(method, "calibrated"):
        raise ValueError(f"{type(method).__name__} needs no calibration: give it to hasten.accelerate as it is")
    steps = steps_of(call)
    runs = Runs(pipe, next(iter(denoisers_of(pipe, denoiser))), tuple(prompts), tuple(seed + i for i in range(len(prompts))), batch, call)
    with progress_bar(progress) as bar:
        task = bar.add_task("measuring", total=runs.calls)
        measured = measure(runs, steps, lambda: bar.advance(task), probes=0, budget=parse_bytes(table_budget) or SKETCH_BYTES)
    plan = method.calibrated(measured.trace, measured.tables)
    facts = {
        **measured.facts,
        "calibrated_on": len(prompts),
        **{k: v for k, v in plan.facts.items() if k not in measured.facts or k == "method"},
    }
    return Plan(plan.actions, plan.sites, plan.branches, facts, plan.weights)
