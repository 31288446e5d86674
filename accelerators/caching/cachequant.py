"""CacheQuant (arXiv 2503.01323): caching and 8- or 4-bit layers together, which each on its own is mild but not the two at once.

When the cached value is refreshed comes from the dynamic programming schedule: groups of steps whose first value stands for the others
with the least L1 distance. Two closed forms then take the error off: a scale and shift for each channel of what is reused (the cache's
error), and for each output channel of the quantised layers that read it (the quantisation's), for every step. Nothing is trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from torch import Tensor, nn

from hasten.accelerators.caching.calibrate import SiteSketches
from hasten.accelerators.caching.correction import AffineCorrection, AffineStatistics
from hasten.accelerators.caching.deep import deep_program, weighed
from hasten.accelerators.caching.plan import ALL_BRANCHES, Action, Plan
from hasten.accelerators.caching.quantised import quantised_tables
from hasten.accelerators.caching.runtime import compute_all
from hasten.accelerators.caching.segments import Span
from hasten.accelerators.caching.solver import segment_dp
from hasten.accelerators.caching.state import Packer, read
from hasten.accelerators.caching.trace import Trace
from hasten.accelerators.quantization.int8 import output_errors, quantised, weight_bytes
from hasten.accelerators.quantization.ranges import ActivationRanges, ChannelPeaks, layers

BITS = ("int8", "int4")


class Runs(Protocol):
    """Runs the sampler on the calibration's prompts."""

    denoiser: nn.Module
    steps: int

    def full(self, method: Any, *, observe: Any = None, prepare: Callable[[int], None] | None = None) -> tuple[Trace, dict[str, Any]]:
        """One run under a method or plan; the trace and the run's facts. With an observer, everything is stored at every step."""

    def planned(self, count: int) -> Plan:
        """The planner's plan that computes `count` steps in full."""


@dataclass(frozen=True)
class CacheQuant:
    """Calibrated: `hasten.calibrate(pipe, prompts, hasten.CacheQuant(interval=5), num_inference_steps=50)`.

    On a UNet the deep branch is cached, on other models all blocks.

    Attributes:
        interval: Steps per refresh on average (the paper's N: 5 on Stable Diffusion, 5 to 20 on LDM).
        branch: Of a UNet: skip connections beyond the input convolution that stay live (the paper's cut is 0).
        schedule: "dps"; "uniform" for every `interval`-th step; or "planned" (not in the paper) for the steps and the forecasts of the
            planner, which weighs every step by what the final latents suffer from its error. "planned" needs `branch=0`.
        cache_correction: Whether what is reused is corrected.
        output_correction: Whether the outputs of quantised layers are.
        weights: "int8", "int4" (first and last layer stay at 8 bits), or None to leave the layers alone.
        activations: "int8", or "none" for weights alone.
        state: "int8" or "fp8" to keep the cached value in 8 bits, whose error the cache correction then absorbs as well; None as it is.
        smoothing: Share of the spread between input channels that is moved into the weights before both are rounded (not in the paper;
            SmoothQuant, arXiv 2211.10438, has 0.5). None searches the least rounding noise for each layer. 0 for none.
        ridge: Pulls the cache correction's scale towards 1, as a share of the channel's mean square: few samples must not decide alone.

    Raises:
        ValueError: A value is out of range.
    """

    interval: int = 5
    branch: int = 0
    schedule: str = "dps"
    cache_correction: bool = True
    output_correction: bool = True
    weights: str | None = "int8"
    activations: str = "int8"
    state: str | None = None
    smoothing: float | None = None
    ridge: float = 0.01

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        if type(self.branch) is not int or self.branch < 0:
            raise ValueError(f"branch must be a whole number of at least 0, not {self.branch!r}")
        if self.schedule not in ("dps", "uniform", "planned"):
            raise ValueError(f"schedule must be 'dps', 'uniform' or 'planned', not {self.schedule!r}")
        if self.schedule == "planned" and self.branch:
            raise ValueError(f"branch must be 0 with schedule='planned', not {self.branch}")
        if self.weights is not None and self.weights not in BITS:
            raise ValueError(f"weights must be one of {', '.join(BITS)} or None, not {self.weights!r}")
        if self.activations not in ("int8", "none"):
            raise ValueError(f"activations must be 'int8' or 'none', not {self.activations!r}")
        Packer(self.state)
        if self.smoothing is not None and not 0 <= self.smoothing <= 1:
            raise ValueError(f"smoothing must be from 0 to 1 or None, not {self.smoothing!r}")
        if not self.ridge >= 0:
            raise ValueError(f"ridge must be at least 0, not {self.ridge!r}")

    def __str__(self) -> str:
        bits = "" if self.weights is None else f" W{self.weights[3:]}A{8 if self.activations == 'int8' else 32}"
        fixed = "+".join(name for name, on in (("cache", self.cache_correction), ("output", self.output_correction and bits)) if on)
        return f"cachequant N={self.interval} {self.schedule}{bits}" + (f" corrected {fixed}" if fixed else "")

    def sites(self, trace: Trace) -> tuple[str, ...]:
        """What is cached.

        Raises:
            ValueError: The UNet has no such branch, or no block can be cached.
        """
        if trace.deep is not None:
            if self.branch >= len(trace.deep.sites):
                raise ValueError(f"branch must be from 0 to {len(trace.deep.sites) - 1} for this model, not {self.branch}")
            return (trace.deep.sites[self.branch],)
        if not trace.sites:
            raise ValueError(f"no block of {trace.model} can be cached")
        return trace.sites

    def measured(self, runs: Runs) -> Plan:
        """The plan, from several runs: distances or the planner's tables, the cache's errors, activation ranges, the layers' errors."""
        everything, distances, peaks = _Everything(self), _Distances(runs.steps), ChannelPeaks()
        with peaks.watch(runs.denoiser):
            trace, facts = runs.full(everything, observe=distances)
        sites = self.sites(trace)
        if self.schedule == "planned":
            plan = runs.planned(self.count(runs.steps))
        else:
            plan = self._plan(sites, runs.steps, self.computed(distances.total()))
        groups = 2 if str(facts.get("guidance", "")).startswith("batched x2") else 1
        while self.cache_correction and (plan.actions != Action.COMPUTE).any():
            errors = _Errors(plan, groups, 1 if trace.deep is not None else -1, self.state)
            runs.full(everything, observe=errors)
            branches, table = errors.table(self.ridge)
            # A value that moves against the true one is of no use at that step: it is refreshed there, and all is measured again. The
            # planner's weights are fitted, and belong to its steps.
            useless = np.flatnonzero(((table[0] < 0).mean(-1) > 0.5).any(-1))
            if not len(useless) or self.schedule == "planned":
                columns = [0] * len(branches)
                weights = plan.weights[:, :, columns] if plan.weights is not None else None
                plan = replace(
                    plan, actions=plan.actions[:, :, columns], branches=branches, weights=weights, corrections={sites[-1]: table}
                )
                break
            actions = plan.actions.copy()
            actions[useless] = Action.COMPUTE
            plan = replace(plan, actions=actions)
        bound = {**facts, "model": trace.model, "config": trace.config_hash, "method": str(self), "state": self.state}
        plan = replace(plan, facts={**plan.facts, **bound})
        if self.weights is None:
            return plan
        smoothed = self.smoothing != 0 and self.activations == "int8"
        return self._quantise(plan, runs, trace, peaks.smoothing(runs.denoiser, self.smoothing) if smoothed else {})

    def count(self, steps: int) -> int:
        """How many of the steps are refreshed."""
        return math.ceil(steps / self.interval)

    @staticmethod
    def _plan(sites: tuple[str, ...], steps: int, computed: Sequence[int]) -> Plan:
        actions = np.full((steps, len(sites), 1), Action.REUSE)
        actions[list(computed)] = Action.COMPUTE
        return Plan(actions, sites)

    def computed(self, distance: np.ndarray) -> list[int]:
        """The refreshed steps, from the distances [T, T] of the cached value at every two steps; the first steps of the groups."""
        steps = len(distance)
        if self.schedule == "uniform" or self.interval == 1:
            return list(range(0, steps, self.interval))
        cost = np.triu(distance).cumsum(1)
        count = self.count(steps)
        return segment_dp(cost, count, math.ceil(self.interval / 2), 2 * self.interval).starts(count)

    def consumers(self, trace: Trace, names: Sequence[str]) -> list[str]:
        """Of the quantised layers, those that read what is reused: on a UNet the first up layer that runs on a reused step, else what
        stands behind the blocks."""
        if trace.deep is not None:
            within = trace.deep.up[trace.deep.consumer(self.branch)].modules[:1]
            return [name for name in names if name.startswith(tuple(f"{path}." for path in within))]
        blocks = tuple(f"{block.path}." for block in trace.blocks)
        found = [name for name in names if not name.startswith(blocks)]
        return found[-1:]

    def _quantise(self, plan: Plan, runs: Runs, trace: Trace, smooth: Mapping[str, Tensor]) -> Plan:
        ranges = ActivationRanges(plan.steps, smooth=smooth)
        with ranges.watch(runs.denoiser):
            runs.full(plan, prepare=ranges.step.set)
        tables = ranges.tables() if self.activations == "int8" else {}
        made = quantised(
            runs.denoiser,
            tables or None,
            weights=self.weights,  # type: ignore[arg-type]
            activations=self.activations,  # type: ignore[arg-type]
            steps=plan.steps,
            smooth=smooth,
        )
        fixes: dict[str, AffineCorrection] = {}
        if self.output_correction:
            with output_errors(runs.denoiser, made, self.consumers(trace, list(made.bits))) as statistics:
                runs.full(plan, prepare=made.step.set)
            fixes = {name: found.fit() for name, found in statistics.items()}
        kept = [name for name, bits in made.bits.items() if bits == 8] if self.weights == "int4" else None
        own = [layer.weight for layer in layers(runs.denoiser).values() if isinstance(layer, nn.Linear | nn.Conv2d)]
        small, full = weight_bytes(made.module), 4 * sum(weight.numel() for weight in own)
        asked = {
            "weights": self.weights,
            "activations": self.activations,
            "keep_8bit": kept,
            "bytes_of_fp32": round((small.weights + small.scales) / full, 4),
        }
        return replace(plan, facts={**plan.facts, "quantised": asked}, tables=quantised_tables(tables, fixes, smooth))


class _Everything:
    """Computes everything, at the sites that the method caches."""

    def __init__(self, method: CacheQuant) -> None:
        self.method = method

    def plan(self, trace: Trace, steps: int) -> Plan:
        return compute_all(trace, steps, self.method.sites(trace))


def _value(values: dict[Span, dict[int, Tensor]]) -> Tensor:
    """What is cached: the deep branch's value, or the sum of the blocks' offsets on the first stream."""
    total: Tensor | None = None
    for span in sorted(values):
        part = values[span][min(values[span])]
        total = part if total is None or total.shape != part.shape else total + part
    assert total is not None
    return total


class _Distances:
    """Sketches of the cached value at every step."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.batches: list[SiteSketches] = []

    def __call__(self, branch: str, step: int, values: dict[Span, dict[int, Tensor]]) -> None:
        if step == 0 and (not self.batches or (branch, 0) in self.batches[-1].kept):
            self.batches.append(SiteSketches(self.steps, ("value",), 64))
        self.batches[-1](branch, step, {Span(0, 1, step): {0: _value(values)}})

    def total(self) -> np.ndarray:
        """[T, T] mean absolute differences, over all batches."""
        return np.asarray(np.mean([batch.tables()["value"].distance for batch in self.batches], 0))


class _Errors:
    """Compares the value at every step that is not computed with what the plan puts in its place."""

    def __init__(self, plan: Plan, groups: int, dim: int, state: str | None) -> None:
        self.pack = Packer(state)
        weights = plan.weights[:, 0, 0] if plan.weights is not None else None
        self.terms = deep_program(plan.actions[:, 0, 0], weights=weights, levels=plan.facts.get("sigmas"))
        self.groups, self.dim = groups, dim
        self.stored: dict[str, dict[int, Tensor]] = {}
        self.statistics: AffineStatistics | None = None
        self.branches: list[str] = []

    def __call__(self, branch: str, step: int, values: dict[Span, dict[int, Tensor]]) -> None:
        value = _value(values).detach()
        if branch not in self.branches:
            self.branches.append(branch)
        stored = self.stored.setdefault(branch, {})
        terms = self.terms[step]
        if not terms:
            stored[step] = read(self.pack(value.clone()))
            read_later = {source for later in self.terms[step:] for source, _ in later}
            self.stored[branch] = {source: kept for source, kept in stored.items() if source in read_later}
            return
        if self.statistics is None:
            self.statistics = AffineStatistics(len(self.terms), value.shape[self.dim])
        made = weighed([stored[source] for source, _ in terms], [weight for _, weight in terms])
        halves = zip(value.chunk(self.groups), made.chunk(self.groups), strict=True)
        for group, (true, kept) in enumerate(halves):
            self.statistics.add(step, true, kept, dim=self.dim, branch=f"{branch}/{group}")

    def table(self, ridge: float) -> tuple[tuple[str, ...], np.ndarray]:
        """Branches, and their corrections [2, steps, branches, groups * channels]."""
        branches = tuple(self.branches) if len(self.branches) > 1 else (ALL_BRANCHES,)
        assert self.statistics is not None
        columns = []
        for branch in self.branches:
            fits = []
            for group in range(self.groups):
                name = f"{branch}/{group}"
                size = float(self.statistics.moments(name).variance_approx.mean())
                fits.append(self.statistics.fit(ridge * size, branch=name))
            scale, shift = (np.concatenate([np.asarray(getattr(fit, part)) for fit in fits], 1) for part in ("scale", "shift"))
            columns.append(np.stack([scale, shift]))
        return branches, np.stack(columns, 2)
