"""Runs a pipeline on a few prompts and measures what the calibrated methods need: `hasten.calibrate`."""

from __future__ import annotations

import inspect
import json
import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from hasten.accelerators.caching.calibrate import SKETCH_BYTES, SiteSketches, SiteTable, Sketches, Tables
from hasten.accelerators.caching.deciders import Decider, Memory, relative_l1
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.planner import Schedule
from hasten.accelerators.caching.repair import REPLAYS, Repair
from hasten.accelerators.caching.runtime import Session, TraceKey, compute_all
from hasten.accelerators.caching.segments import Span
from hasten.accelerators.caching.trace import Trace, format_bytes, weight_facts
from hasten.pipelines.accelerated import AcceleratedPipeline, ComputeAll, denoisers_of, parse_bytes, trace
from hasten.pipelines.checkpoint import Checkpoint

PROBES = 12
"""Steps whose sensitivity is measured; those between are interpolated."""


@dataclass(frozen=True)
class Runs:
    """The pipeline's call on fixed prompts and fixed noise, to the final latents. What one run traces, no other traces again."""

    pipe: Any
    denoiser: str
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    batch: int
    call: dict[str, Any]
    traces: WeakKeyDictionary[nn.Module, dict[TraceKey, Trace]] = field(default_factory=WeakKeyDictionary)

    def run(self, method: Any, tick: Callable[[], None], **options: Any) -> tuple[Tensor, AcceleratedPipeline]:
        """Final latents [prompts, ...] under a method, and the wrapper that made them."""
        fast = AcceleratedPipeline(self.pipe, method, (self.denoiser,), traces={self.denoiser: self._known}, **options)
        made = []
        for at in range(0, len(self.prompts), self.batch):
            part = slice(at, at + self.batch)
            generators = [torch.Generator().manual_seed(seed) for seed in self.seeds[part]]
            out = fast(list(self.prompts[part]), generator=generators, output_type="latent", return_dict=False, **self.call)
            made.append(torch.as_tensor(out[0]).float().cpu())
            tick()
        return torch.cat(made), fast

    @property
    def module(self) -> nn.Module:
        """The network that is measured."""
        found = getattr(self.pipe, self.denoiser)
        assert isinstance(found, nn.Module)
        return found

    @property
    def guidance_scale(self) -> float | None:
        """Of the calls; None without guidance."""
        names = inspect.signature(self.pipe.__call__).parameters
        default = names["guidance_scale"].default if "guidance_scale" in names else None
        scale = self.call.get("guidance_scale", default)
        return float(scale) if scale and scale > 1 else None

    @property
    def count(self) -> int:
        return len(self.prompts)

    @property
    def rows(self) -> int:
        """Most rows of a denoiser call, all guidance branches together."""
        return 4 * self.batch

    @property
    def calls(self) -> int:
        return math.ceil(len(self.prompts) / self.batch)

    @property
    def identity(self) -> Any:
        """Plain data that tells these runs from others."""
        return [type(self.pipe).__name__, str(self.pipe.scheduler.config), self.denoiser, self.prompts, self.seeds, self.batch, self.call]

    def traced(self) -> Trace:
        """A trace, from one denoiser call."""
        call = {**self.call, "output_type": "latent"}
        found = trace(self.pipe, list(self.prompts[: self.batch]), denoiser=self.denoiser, **call)
        self._known[found.resolution, getattr(torch, found.dtype)] = found
        return found

    @property
    def _known(self) -> dict[TraceKey, Trace]:
        """Traces of the network that the pipeline has now."""
        return self.traces.setdefault(self.module, {})

    @property
    def parts(self) -> list[Runs]:
        """The same, a batch at a time."""
        return [self.some(slice(at, at + self.batch)) for at in range(0, len(self.prompts), self.batch)]

    def some(self, part: slice) -> Runs:
        return Runs(self.pipe, self.denoiser, self.prompts[part], self.seeds[part], self.batch, self.call, self.traces)


Loop = Callable[[Session], Any]
"""A sampling loop of your own: it enters `session.step(i)` around its denoiser calls, and returns its samples [rows, ...]."""


@dataclass(frozen=True)
class Loops:
    """Sampling loops on a network that is no pipeline; each draws the same at every call."""

    module: nn.Module
    loops: tuple[Loop, ...]
    steps: int
    traces: dict[TraceKey, Trace] = field(default_factory=dict)
    guidance_scale = None
    rows = 64

    def run(self, method: Any, tick: Callable[[], None], **options: Any) -> tuple[Tensor, Session]:
        """Samples under a method (none where a loop returns no tensor), and the last session."""
        made = []
        for loop in self.loops:
            with Session(self.module, method, self.steps, traces=self.traces, **options) as session:
                made.append(loop(session))
            tick()
        samples = [out.detach().float().cpu() for out in made if isinstance(out, Tensor)]
        return torch.cat(samples) if len(samples) == len(made) else torch.zeros(0), session

    @property
    def count(self) -> int:
        return len(self.loops)

    @property
    def calls(self) -> int:
        return len(self.loops)

    @property
    def identity(self) -> Any:
        """As far as functions can be told apart: how many there are. What they do must be the same when a calibration is resumed."""
        return [type(self.module).__name__, len(self.loops), self.steps]

    def traced(self) -> Trace:
        """A trace, from one run of the first loop."""
        _, session = self.some(slice(1)).run(ComputeAll(), lambda: None)
        assert session.trace is not None
        return session.trace

    @property
    def parts(self) -> list[Loops]:
        """One loop each."""
        return [self.some(slice(i, i + 1)) for i in range(len(self.loops))]

    def some(self, part: slice) -> Loops:
        return Loops(self.module, self.loops[part], self.steps, self.traces)


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


def whole(found: Trace) -> tuple[str, ...]:
    """The sites that together hold the most that can be cached.

    Raises:
        ValueError: There are none.
    """
    if not found.whole:
        raise ValueError(f"nothing of {found.model} can be cached: no block as a span, and it has no deep branch")
    return found.whole


def measure(
    runs: Runs | Loops,
    steps: int,
    tick: Callable[[], None],
    probes: int = PROBES,
    budget: int = SKETCH_BYTES,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Measured:
    """Runs everything once in full, then once for each probed step with that step's offsets reused.

    Args:
        probes: Steps whose sensitivity is measured; without any, all steps count alike.
        budget: Most bytes of sketches.
        checkpoint: File in which what was measured is kept until all is; None for none.

    Raises:
        ValueError: Nothing can be cached, a loop that is to be probed returns no samples, or the checkpoint is of another
            calibration.
    """
    kept = Checkpoint(checkpoint, [weight_facts(runs.module), runs.identity, steps, probes, budget])
    found_trace: list[Trace] = []

    def full_part(some: Runs | Loops) -> dict[str, np.ndarray]:
        sketches = Sketches(steps, runs.guidance_scale, runs.rows, budget)
        made, fast = some.run(ComputeAll(whole), tick, force_store=True, observe=sketches)
        assert fast.trace is not None and fast.report.plan is not None
        found_trace.append(fast.trace)
        facts = np.array(json.dumps(dict(fast.report.plan.facts)))
        return {"gram": sketches.gram(), "distances": sketches.distances(), "latents": made.numpy(), "facts": facts}

    parts = [kept.remember(f"full{i}", lambda some=some: full_part(some)) for i, some in enumerate(runs.parts)]  # type: ignore[misc]
    found = found_trace[-1] if found_trace else runs.traced()
    facts = json.loads(str(parts[-1]["facts"]))
    gram, distances = (np.concatenate([part[name] for part in parts]) for name in ("gram", "distances"))
    reference = torch.from_numpy(np.concatenate([part["latents"] for part in parts]))
    levels = facts.get("sigmas")
    known = Tables(gram, np.ones(steps), tuple(levels) if levels else None, distances)
    if not probes:
        kept.finish()
        return Measured(found, known, reference, facts)
    if not len(reference):
        raise ValueError("the sampling loop must return its samples, a tensor [rows, ...]: how much they suffer from an error is measured")
    everything = compute_all(found, steps, found.whole).actions

    def probe(k: int) -> dict[str, np.ndarray]:
        actions = everything.copy()
        actions[k] = Action.REUSE
        made, fast = runs.run(Plan(actions, found.whole), tick)
        seconds = fast.report.step_seconds
        moved = np.sqrt(np.maximum(gram[:, k, k] + gram[:, k - 1, k - 1] - 2 * gram[:, k, k - 1], 1e-30))
        full = statistics.median(seconds[:k] + seconds[k + 1 :])
        other = max(0.0, fast.report.seconds - sum(seconds)) / steps
        return {"numbers": np.array([typical(relative_errors(reference, made) / moved), full, seconds[k], other])}

    probed = sorted({round(k) for k in np.linspace(1, steps - 1, max(1, min(probes, steps - 1)))})
    numbers = np.stack([kept.remember(f"probe{k}", lambda k=k: probe(k))["numbers"] for k in probed])  # type: ignore[misc]
    sensitivity = np.exp(np.interp(np.arange(steps), probed, np.log(np.maximum(numbers[:, 0], 1e-12))))
    costs = StepCosts(*(float(np.median(column)) for column in numbers[:, 1:].T))
    kept.finish()
    return Measured(found, replace(known, sensitivity=sensitivity), reference, facts, costs)


def repairing(runs: Runs | Loops, measured: Measured, tick: Callable[[], None], replays: int = REPLAYS) -> Repair:
    """A search for schedules by replays on the prompts that were measured."""

    def replay(schedule: Schedule) -> float:
        made, _ = runs.run(schedule.plan(measured.trace), tick)
        return typical(relative_errors(measured.latents, made))

    return Repair(measured.tables, replay, replays)


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


class Pairs:
    """A decider that computes everything and notes, for every step and row, by how much its proxy and the blocks' offset have changed."""

    ahead = False

    def __init__(self, like: Decider) -> None:
        self.front, self.back, self.proxy = like.front, like.back, like.proxy
        self.pairs: list[tuple[float, float]] = []
        self._like = like
        self._change: Tensor | None = None
        self._before: dict[str, Tensor] = {}

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The sites of the decider it stands for."""
        return self._like.plan(trace, steps)

    def open(self, step: int, steps: int) -> bool:
        """Never."""
        return False

    def reuse(self, step: int, proxy: Tensor, memory: Memory) -> Tensor:
        """Nothing."""
        return torch.zeros(len(proxy), dtype=torch.bool)

    def learn(self, step: int, proxy: Tensor, computed: Tensor, memory: Memory) -> None:
        """Notes the change of the proxy."""
        self._change = relative_l1(proxy, memory["before"]) if "before" in memory and step else None
        memory["before"] = proxy.clone()

    def __call__(self, branch: str, step: int, values: dict[Span, dict[int, Tensor]]) -> None:
        """Notes the change of what the blocks add, the spans of the first stream taken together."""
        total = torch.cat([values[span][min(values[span])].flatten(1) for span in sorted(values)], 1)
        if self._change is not None and branch in self._before and self._before[branch].shape == total.shape:
            changes = relative_l1(total, self._before[branch])
            self.pairs += list(zip(self._change.tolist(), changes.tolist(), strict=True))
        self._before[branch] = total.clone()


@dataclass(frozen=True)
class Estimate:
    """What a calibration will take. `print` it."""

    seconds: float
    bytes: int
    calls: int

    def __str__(self) -> str:
        return f"about {self.seconds:.0f} s ({self.calls} denoiser calls), at most {format_bytes(self.bytes)} of sketches"


def estimate(
    pipe: Any, prompts: Sequence[str], *, batch: int = 8, passes: int = 1, budget: int | str = SKETCH_BYTES, denoiser: str | None = None,
    **call: Any,
) -> Estimate:  # fmt: skip
    """What a calibration will take, from one traced denoiser call; nothing is denoised.

    Args:
        passes: Runs over the prompts: 1 for `hasten.calibrate`, more for `hasten.plan`, whose replays count.
        call: Arguments of the pipeline's call, as for `calibrate`.
    """
    steps = steps_of(call)
    found = trace(pipe, list(prompts[:batch]), denoiser=denoiser, **call)
    calls = steps * math.ceil(len(prompts) / batch) * passes
    return Estimate(calls * found.seconds, parse_bytes(budget) or SKETCH_BYTES, calls)


class _AllRuns:
    """Runs over all prompts, for methods that need several passes."""

    def __init__(self, runs: Runs | Loops, steps: int, tick: Callable[[], None]) -> None:
        self.runs, self.steps, self.tick = runs, steps, tick
        self.denoiser = runs.module

    def full(self, method: Any, *, observe: Any = None, prepare: Callable[[int], None] | None = None) -> tuple[Trace, dict[str, Any]]:
        """One run under a method or plan."""
        return full_run(self.runs, method, self.tick, force_store=observe is not None, observe=observe, prepare=prepare)

    def planned(self, count: int) -> Plan:
        """The planner's plan that computes `count` steps."""
        measured = measure(self.runs, self.steps, self.tick, min(PROBES, self.steps - 1))
        schedule, _ = repairing(self.runs, measured, self.tick).search(count)
        return schedule.plan(measured.trace, **measured.facts)


def full_run(runs: Runs | Loops, method: Any, tick: Callable[[], None], **options: Any) -> tuple[Trace, dict[str, Any]]:
    """One run of everything; the trace and the run's facts."""
    _, fast = runs.run(method, tick, **options)
    found, plan = fast.trace, fast.report.plan
    assert found is not None and plan is not None
    return found, {name: value for name, value in plan.facts.items() if name != "method"}


def calibrate(
    pipe: Any,
    prompts: Sequence[str] | Loop,
    method: Any,
    *,
    samples: int | None = None,
    seed: int = 0,
    batch: int = 8,
    denoiser: str | None = None,
    table_budget: int | str = SKETCH_BYTES,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    **call: Any,
) -> Any:
    """Measures a pipeline on a few prompts, in full-compute runs, and lets a method make its plan from that.

        plan = hasten.calibrate(pipe, prompts[:1], hasten.MagCache(threshold=0.06), num_inference_steps=28)
        fast = hasten.accelerate(pipe, plan)
        plan = hasten.calibrate(policy, loop, hasten.BAC(updates=10), num_inference_steps=100)  # a loop of your own

    Args:
        pipe: A diffusers pipeline that takes prompts and can return latents (`output_type="latent"`); or a network, with `prompts` a
            function that runs your sampling loop once on the session it is given.
        prompts: What it is run on; one is enough for MagCache and BAC.
        method: A calibrated method.
        samples: How many of the prompts to use; all unless told.
        seed: Of the noise: prompt i gets seed + i.
        batch: Prompts per call.
        denoiser: Which network, where there are several.
        table_budget: Most bytes of what is kept of the offsets, whatever the model.
        checkpoint: A file in which what was measured is kept until the plan is made: the same call goes on where an interrupted one was.
            For methods that are calibrated on tables of whole steps (the planner, MagCache, weighed BAC).
        progress: Whether to say on stderr how long it will take, and to show a bar.
        call: Arguments of the pipeline's call; `num_inference_steps` is needed.

    Returns:
        A `Plan`; for TeaCache, whose decisions are made during the run, the method with its curve fitted.

    Raises:
        ValueError: No prompts or fewer than `samples`, no number of steps, or a method that needs no calibration.
    """
    if not any(hasattr(method, name) for name in ("calibrated", "fitted", "measured")):
        raise ValueError(f"{type(method).__name__} needs no calibration: give it to hasten.accelerate as it is")
    steps = steps_of(call)
    budget = parse_bytes(table_budget) or SKETCH_BYTES
    if isinstance(pipe, nn.Module):
        if not callable(prompts):
            raise ValueError("a network is calibrated on a function that runs your sampling loop: prompts must be that function")
        runs: Runs | Loops = Loops(pipe, (prompts,), steps)
    else:
        if callable(prompts) or not prompts:
            raise ValueError("prompts is empty: there is nothing to calibrate on")
        if samples is not None and not 1 <= samples <= len(prompts):
            raise ValueError(f"samples must be from 1 to the number of prompts, {len(prompts)}, not {samples}")
        kept = tuple(prompts[:samples])
        seeds = tuple(seed + i for i in range(len(kept)))
        runs = Runs(pipe, next(iter(denoisers_of(pipe, denoiser))), kept, seeds, batch, call)
        if progress:
            told = estimate(pipe, kept, batch=batch, budget=budget, denoiser=denoiser, **call)
            print(f"hasten: calibrating, {told}", file=sys.stderr)
    with progress_bar(progress) as bar:
        task = bar.add_task("measuring", total=None)

        def tick() -> None:
            bar.advance(task)

        if hasattr(method, "fitted"):
            pairs = Pairs(method)
            for part in runs.parts:
                part.run(pairs, tick, observe=pairs)
            return method.fitted(pairs.pairs)
        bound = weight_facts(runs.module)
        if hasattr(method, "measured"):
            return method.measured(_AllRuns(runs, steps, tick)).with_facts(**bound, calibrated_on=runs.count)
        of_blocks = getattr(method, "sites", "blocks") == "blocks"
        weighed = bool(getattr(method, "sensitivity", False))
        if of_blocks or weighed:
            measured = measure(runs, steps, tick, PROBES if weighed else 0, budget, checkpoint)
            found, tables, facts = measured.trace, measured.tables, measured.facts
        if not of_blocks:
            found, of_sites, facts = measure_sites(runs, method, steps, tick, budget)
            tables = replace(tables, sites=of_sites.sites) if weighed else of_sites
    return method.calibrated(found, tables).with_facts(**facts, **bound, calibrated_on=runs.count)


def sites_for(method: Any) -> Callable[[Trace], tuple[str, ...]]:
    """Which sites a method asks tables of: those of its `sites` kind."""

    def pick(trace: Trace) -> tuple[str, ...]:
        kind = getattr(method, "sites", "blocks")
        if kind == "parts":
            return tuple(part.path for part in trace.parts) or trace.sites
        if kind == "deep" and trace.deep is not None:
            return (trace.deep.sites[getattr(method, "branch", 0)],)
        return trace.sites

    return pick


def measure_sites(
    runs: Runs | Loops, method: Any, steps: int, tick: Callable[[], None], budget: int
) -> tuple[Trace, Tables, dict[str, Any]]:
    """Tables of single sites, from one full-compute run of each batch."""
    pick = sites_for(method)
    every: list[dict[str, SiteTable]] = []
    for some in runs.parts:
        sketches: list[SiteSketches] = []

        def observe(branch: str, step: int, values: dict[Span, dict[int, Tensor]], kept: list[SiteSketches] = sketches) -> None:
            if not kept:
                kept.append(SiteSketches(steps, tuple(map(str, range(1 + max(span.start for span in values)))), runs.rows, budget))
            kept[0](branch, step, values)

        found, facts = full_run(some, ComputeAll(pick), tick, force_store=True, observe=observe)
        names = pick(found)
        every.append({names[int(at)]: table for at, table in sketches[0].tables().items()} if sketches else {})
    mean = {
        site: SiteTable(np.mean([tables[site].cosine for tables in every], 0), np.mean([tables[site].distance for tables in every], 0))
        for site in every[0]
    }
    levels = facts.get("sigmas")
    empty = np.zeros((1, steps, steps))
    return found, Tables(empty, np.ones(steps), tuple(levels) if levels else None, None, mean if pick(found) != found.sites else {}), facts
