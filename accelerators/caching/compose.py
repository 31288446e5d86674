"""Several methods at once: each decides its own part of one plan.

What two methods may not decide together stands in a table, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

import numpy as np

from hasten.accelerators.caching.plan import GUIDANCE, HARD_FACTS, ROW, Action, Plan, PlanError
from hasten.accelerators.caching.trace import Trace

_DECIDED = "what is reused is decided during the run, from activations: "
_ONE_KIND = "a run reuses one kind of site: "
CONFLICTS: Mapping[tuple[str, str], str] = {
    ("blocks", "deep"): _ONE_KIND + "blocks, or a UNet's deep branch, which contains them",
    ("blocks", "parts"): _ONE_KIND + "whole blocks, or the parts inside them",
    ("deep", "parts"): _ONE_KIND + "parts of blocks, or a UNet's deep branch, which contains them",
    ("blocks", "decisions"): _DECIDED + "a fixed schedule has no place beside it",
    ("decisions", "deep"): _DECIDED + "a fixed schedule has no place beside it",
    ("decisions", "parts"): _DECIDED + "a fixed schedule has no place beside it",
    ("decisions", "guidance"): _DECIDED + "a guidance branch that is skipped shows none",
    ("corrections", "decisions"): _DECIDED + "corrections are fitted for steps that are known beforehand",
}
"""Why two axes of a plan (in alphabetical order) exclude each other."""


class _Planner(Protocol):
    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for a run."""


def _reuses(plan: Plan) -> bool:
    return bool(np.isin(plan.blocks.actions, [Action.REUSE, Action.FORECAST]).any())


def _is_decided(method: Any) -> bool:
    return hasattr(method, "reuse") and hasattr(method, "learn")


AXES: Mapping[str, Callable[[Any, Plan, Trace], bool]] = {
    "blocks": lambda method, plan, trace: _reuses(plan) and trace.kind_of(plan.blocks.sites) == "blocks" and not _is_decided(method),
    "corrections": lambda method, plan, trace: bool(plan.corrections),
    "decisions": lambda method, plan, trace: _is_decided(method) or any(ROW in name for name in plan.branches),
    "deep": lambda method, plan, trace: _reuses(plan) and trace.kind_of(plan.blocks.sites) == "deep",
    "guidance": lambda method, plan, trace: bool(plan.skips.any()),
    "layers": lambda method, plan, trace: bool(plan.facts.get("quantised")),
    "parts": lambda method, plan, trace: _reuses(plan) and trace.kind_of(plan.blocks.sites) == "parts",
    "state": lambda method, plan, trace: plan.facts.get("state") is not None,
}
"""What a plan may decide, and how to see that it does."""


@dataclass(frozen=True)
class Composed:
    """Several methods or plans as one: `hasten.accelerate(pipe, [hasten.Forecast(interval=3), hasten.SkipGuidance()])`.

    Attributes:
        methods: Two or more; each decides something else: which sites are reused, which guidance branches are skipped, how layers are
            quantised, how stored values are kept.

    Raises:
        ValueError: There is none, or one is neither a method nor a plan.
    """

    methods: tuple[_Planner | Plan, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        if not self.methods:
            raise ValueError("methods must name at least one method or plan")
        for method in self.methods:
            if not isinstance(method, Plan) and not hasattr(method, "plan"):
                raise ValueError(f"methods must be caching methods or plans, not {type(method).__name__}")

    def __str__(self) -> str:
        return " + ".join(str(m.facts.get("method", "plan")) if isinstance(m, Plan) else str(m) for m in self.methods)

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The one plan.

        Raises:
            PlanError: Two methods decide the same, or what may not be decided together; the message gives the reason.
        """
        plans = [m if isinstance(m, Plan) else m.plan(trace, steps) for m in self.methods]
        axes = [{axis for axis, seen in AXES.items() if seen(m, p, trace)} for m, p in zip(self.methods, plans, strict=True)]
        for i, j in combinations(range(len(plans)), 2):
            names = [str(m.facts.get("method", "plan")) if isinstance(m, Plan) else str(m) for m in (self.methods[i], self.methods[j])]
            if both := sorted(axes[i] & axes[j]):
                raise PlanError(f"{names[0]} and {names[1]} both decide the {both[0]}: take one of them")
            for pair in sorted({*((a, b) if a < b else (b, a) for a in axes[i] for b in axes[j])}):
                if pair in CONFLICTS:
                    raise PlanError(f"{names[0]} and {names[1]} do not go together: {CONFLICTS[pair]}")
        return merged(plans, axes, str(self))


def merged(plans: Sequence[Plan], axes: Sequence[set[str]], method: str) -> Plan:
    """One plan from plans that decide different things."""
    steps = plans[0].steps
    if any(plan.steps != steps for plan in plans):
        raise PlanError(f"the plans are for {', '.join(str(plan.steps) for plan in plans)} steps; they must be for the same number")
    core = next((p for p, found in zip(plans, axes, strict=True) if found & {"blocks", "parts", "deep"}), plans[0]).blocks
    facts: dict[str, Any] = {}
    tables: dict[str, np.ndarray] = {}
    for plan in (core, *plans):
        for name, value in plan.facts.items():
            if name in HARD_FACTS and facts.get(name, value) != value:
                raise PlanError(f"one plan is for {name} {facts[name]!r}, another for {value!r}")
            if facts.get(name) is None:
                facts[name] = value
        tables |= plan.tables
    skips = aligned(np.any([plan.skips for plan in plans], 0), (core.actions == Action.COMPUTE).all((1, 2)))
    actions, sites, weights = core.actions, core.sites, core.weights
    if skips.any():
        column = np.where(skips, Action.SKIP_BRANCH, Action.COMPUTE).astype(np.uint8)
        column = np.repeat(column[:, None, None], len(core.branches), 2)
        actions, sites = np.concatenate([actions, column], 1), (*sites, GUIDANCE)
        weights = np.pad(weights, ((0, 0), (0, 1), (0, 0), (0, 0))) if weights is not None else None
    return Plan(actions, sites, core.branches, {**facts, "method": method}, weights, core.corrections, tables)


def aligned(skips: np.ndarray, computed: np.ndarray) -> np.ndarray:
    """Puts off a step with both branches to the next one at which all blocks are computed.

    What was stored while a branch was skipped lacks that branch's rows, so a step with both could not reuse it.

    Args:
        skips: [steps] where a branch is skipped.
        computed: [steps] where all blocks are computed.
    """
    if not skips.any():
        return skips
    first = int(np.argmax(skips))
    gaps = np.diff(np.flatnonzero(~skips), append=len(skips))
    patience = int(gaps.max())  # then it is taken at any price: the difference grows old
    found, waiting = skips.copy(), -1
    for k in range(first, len(skips)):
        if not skips[k] and waiting < 0:
            waiting = k
        found[k] = waiting < 0 or not (computed[k] or k - waiting >= patience)
        if not found[k]:
            waiting = -1
    return found
