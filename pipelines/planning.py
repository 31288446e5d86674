"""`hasten.plan`: measures a pipeline on a few prompts and solves for the plan that fits a speed-up or an error."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.planner import Schedule
from hasten.accelerators.caching.repair import REPLAYS, Repair
from hasten.accelerators.caching.trace import weight_facts
from hasten.pipelines.accelerated import ComputeAll, denoisers_of
from hasten.pipelines.calibration import (
    PROBES,
    Estimate,
    Loop,
    Loops,
    Measured,
    Runs,
    StepCosts,
    estimate,
    measure,
    progress_bar,
    relative_errors,
    repairing,
    steps_of,
    typical,
)


def steps_for(costs: StepCosts, steps: int, speedup: float) -> int:
    """Most steps that may be computed in full for a speed-up of the denoiser loop.

    Raises:
        ValueError: Not even one computed step is fast enough; the message says what is possible.
    """
    able = [count for count in range(1, steps + 1) if costs.speedup(steps, count) >= speedup * (1 - 1e-9)]
    if not able:
        raise ValueError(
            f"speedup={speedup:g} is out of reach: with one computed step of {steps} it would be {costs.speedup(steps, 1):.2f}"
        )
    return able[-1]


def _runs(
    pipe: Any, prompts: Sequence[str] | Loop | Sequence[Loop], seed: int, batch: int, denoiser: str | None, call: dict[str, Any]
) -> Runs | Loops:
    """What is measured: a pipeline on prompts, or a network in loops.

    Raises:
        ValueError: A network is given without loops.
    """
    if isinstance(pipe, nn.Module):
        loops = (prompts,) if callable(prompts) else tuple(prompts)
        if not loops or not all(callable(loop) for loop in loops):
            raise ValueError("a network is planned for in sampling loops: prompts must be a function that runs one, or several of them")
        return Loops(pipe, loops, steps_of(call))  # type: ignore[arg-type]
    assert not callable(prompts)
    name = next(iter(denoisers_of(pipe, denoiser)))
    return Runs(pipe, name, tuple(prompts), tuple(seed + i for i in range(len(prompts))), batch, call)  # type: ignore[arg-type]


def plan(
    pipe: Any,
    prompts: Sequence[str] | Loop | Sequence[Loop],
    *,
    speedup: float | None = None,
    error: float | None = None,
    held_out: int | None = None,
    replays: int = REPLAYS,
    seed: int = 0,
    batch: int = 8,
    denoiser: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Plan:
    """Solves for the plan of least error at a speed-up, or of greatest speed-up within an error.

        plan = hasten.plan(pipe, prompts, speedup=2.0, num_inference_steps=50)
        fast = hasten.accelerate(pipe, plan)
        plan = hasten.plan(policy, [loop, other_loop], speedup=4.0, num_inference_steps=100)  # loops of your own

    Args:
        pipe: A diffusers pipeline that takes prompts and can return latents (`output_type="latent"`); or a network, with `prompts` one or
            several functions that each run your sampling loop on the session they are given and return its samples [rows, ...].
        prompts: At least two; those at the end are held out for the certificate. A single loop leaves nothing to hold out.
        speedup: Of the denoiser loop.
        error: Most relative L2 error of the final latents against the plain pipeline (geometric mean over prompts).
        held_out: How many prompts; a third unless told.
        replays: Most schedules that are tried on the prompts for one number of computed steps: more find better ones, each takes a run.
        seed: Of the noise: prompt i gets seed + i.
        batch: Prompts per call.
        denoiser: Which network, where there are several.
        checkpoint: A file in which what was measured is kept until all is: the same call goes on where an interrupted one was.
        progress: Whether to show a bar on stderr.
        call: Arguments of the pipeline's call; `num_inference_steps` is needed.

    Returns:
        The plan. `plan.facts["certificate"]` has the predicted error, the replayed one on held-out prompts with its 95% interval, and
        the predicted error of each step.

    Raises:
        ValueError: Neither or both of `speedup` and `error`, too few prompts, or a target that cannot be met (the best is named).
    """
    if (speedup is None) == (error is None):
        raise ValueError("give speedup or error, one of the two")
    if speedup is not None and not speedup >= 1:
        raise ValueError(f"speedup must be at least 1, not {speedup:g}")
    if error is not None and not error > 0:
        raise ValueError(f"error must be positive, not {error:g}")
    if replays < 1:
        raise ValueError(f"replays must be at least 1, not {replays}")
    steps = steps_of(call)
    runs = _runs(pipe, prompts, seed, batch, denoiser, call)
    alone = isinstance(runs, Loops) and runs.count == 1 and held_out is None
    kept = 0 if alone else held_out if held_out is not None else max(1, runs.count // 3)
    if not alone and not 1 <= kept < runs.count:
        raise ValueError(f"there must be at least one prompt to calibrate on and one to hold out, not {runs.count} and held_out={kept}")
    known, fresh = runs.some(slice(runs.count - kept)), runs.some(slice(runs.count - kept, None))
    with progress_bar(progress) as bar:
        probes = min(PROBES, steps - 1)
        task = bar.add_task("measuring", total=known.calls * (1 + probes))
        measured = measure(known, steps, lambda: bar.advance(task), probes, checkpoint=checkpoint)
        replaying = bar.add_task("replaying", total=None)

        def tick() -> None:
            bar.advance(replaying)

        assert measured.costs is not None
        repair = repairing(known, measured, tick, replays)
        if speedup is not None:
            chosen = _chosen(repair, measured, steps_for(measured.costs, steps, speedup))
        else:
            assert error is not None
            chosen = _within(repair, measured, error)
        certificate = {
            "predicted": chosen.predicted,
            "speedup": round(measured.costs.speedup(steps, len(chosen.schedule.computed)), 3),
            "held_out": kept,
            "calibrated_on": runs.count - kept,
            "step_errors": [round(float(e), 6) for e in chosen.schedule.errors],
        }
        if kept:
            certificate |= _replayed(fresh, chosen.plan, tick)
    target = f"speedup {speedup:g}" if speedup is not None else f"error {error:g}"
    facts = {**measured.facts, **weight_facts(runs.module), "method": f"planned for {target}", "certificate": certificate}
    return chosen.schedule.plan(measured.trace, **facts)


def _replayed(runs: Runs | Loops, made: Plan, tick: Callable[[], None]) -> dict[str, Any]:
    """What a certificate says of prompts that the plan was not solved on."""
    fast, _ = runs.run(made, tick)
    plain, _ = runs.run(ComputeAll(), tick)
    errors = relative_errors(plain, fast)
    found = Replayed.of(errors)
    interval = [found.low, found.high] if len(errors) > 1 else None
    return {"replayed": found.error, "replayed_interval": interval, "replayed_mean": found.mean}


FACTOR = 2.0
"""How far a replayed error may be above the predicted one."""


@dataclass(frozen=True)
class Replayed:
    """Relative L2 error of the final latents under a plan: geometric mean over the prompts with its 95% interval, and plain mean."""

    error: float
    low: float
    high: float
    mean: float

    @classmethod
    def of(cls, errors: np.ndarray) -> Replayed:
        """From one error for each prompt."""
        middle = typical(errors)
        spread = math.exp(1.96 * np.log(np.maximum(errors, 1e-12)).std(ddof=1) / math.sqrt(len(errors))) if len(errors) > 1 else 1.0
        return cls(middle, middle / spread, middle * spread, float(errors.mean()))


def replay(
    pipe: Any, plan: Plan, prompts: Sequence[str], *, seed: int = 0, batch: int = 8, denoiser: str | None = None, **call: Any
) -> Replayed:
    """Runs prompts plainly and under a plan, from the same noise, and measures what the plan changes.

    Args:
        pipe, seed, batch, denoiser, call: As for `plan`.
    """
    name = next(iter(denoisers_of(pipe, denoiser)))
    runs = Runs(pipe, name, tuple(prompts), tuple(seed + i for i in range(len(prompts))), batch, call)
    plain, _ = runs.run(ComputeAll(), _silent)
    made, _ = runs.run(plan, _silent)
    return Replayed.of(relative_errors(plain, made))


def expected(
    pipe: Any, prompts: Sequence[str], *, replays: int = REPLAYS, batch: int = 8, denoiser: str | None = None, **call: Any
) -> Estimate:
    """What `plan` will take: full runs, single-step replays, and the replays, as many as there may be for one number of computed steps."""
    passes = 1 + min(PROBES, steps_of(call) - 1) + replays
    return estimate(pipe, prompts, batch=batch, passes=passes, denoiser=denoiser, **call)


def front(
    pipe: Any,
    prompts: Sequence[str] | Loop | Sequence[Loop],
    counts: Sequence[int],
    *,
    seed: int = 0,
    batch: int = 8,
    denoiser: str | None = None,
    **call: Any,
) -> dict[int, tuple[Plan, float]]:
    """The planner's plan for several numbers of computed steps from one measurement: the front of time and error.

    Args:
        counts: Of steps computed in full.
        pipe, prompts, seed, batch, denoiser, call: As for `plan`; all prompts are calibrated on.

    Returns:
        For each count the plan and its predicted error.
    """
    steps = steps_of(call)
    runs = _runs(pipe, prompts, seed, batch, denoiser, call)
    measured = measure(runs, steps, _silent, min(PROBES, steps - 1))
    facts = {**measured.facts, **weight_facts(runs.module)}
    repair = repairing(runs, measured, _silent)
    found = {}
    for count in counts:
        chosen = _chosen(repair, measured, count)
        plan = chosen.schedule.plan(measured.trace, **{**facts, "method": f"planner, {count} of {steps} steps"})
        found[count] = plan, chosen.predicted
    return found


def _silent() -> None:
    """Shows no progress."""


@dataclass(frozen=True)
class _Chosen:
    """A schedule, its plan, and its error as predicted once the replay on known prompts has set the scale."""

    schedule: Schedule
    plan: Plan
    predicted: float


def _chosen(repair: Repair, measured: Measured, count: int) -> _Chosen:
    schedule, error = repair.search(count)
    return _Chosen(schedule, schedule.plan(measured.trace), error)


def _within(repair: Repair, measured: Measured, error: float) -> _Chosen:
    """The fewest computed steps whose replay stays within `error` (by bisection)."""
    low, high, best = 1, measured.tables.steps, None
    while low < high:
        count = (low + high) // 2
        found = _chosen(repair, measured, count)
        if found.predicted <= error:
            best, high = found, count
        else:
            low = count + 1
    if best is None or len(best.schedule.computed) != high:
        best = _chosen(repair, measured, high)
    return best
