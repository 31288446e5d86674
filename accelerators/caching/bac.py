"""Block-wise Adaptive Caching (arXiv 2506.13456): every attention and feed-forward part is refreshed by a schedule of its own.

The adaptive caching scheduler chooses each part's refreshes so that what is reused is most similar, over the segment, to what would have
been computed. Schedules made one by one let a feed-forward part refresh on stale input, and the wrong value stays; the bubbling union
algorithm therefore refreshes the parts with the greatest errors whenever a feed-forward part at or behind them refreshes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.calibrate import Tables
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.solver import segment_dp
from hasten.accelerators.caching.trace import Trace


@dataclass(frozen=True)
class BAC:
    """Calibrated: `hasten.calibrate(pipe, prompts[:1], hasten.BAC(updates=10), num_inference_steps=100)`.

    Attributes:
        updates: Refreshes of each part, the first step included (the paper's S: 5 to 20 of 100 steps; 10 in its tables).
        union: Parts whose refreshes are joined with those of the feed-forward parts at or behind them (the paper's n: 5 in simulation, 3
            on the real robot). 0 leaves the schedules apart, which the paper shows to be worse.
        sensitivity: Not in the paper: weighs the error at every step by how much the final sample suffers from it, as measured by
            replays; a loop of your own must then return its samples.
        shared: Not in the paper: one schedule for all parts, from their summed costs. No part then ever refreshes on stale input, and
            the steps between compute nothing at all.

    Raises:
        ValueError: A value is out of range.
    """

    updates: int = 10
    union: int = 5
    sensitivity: bool = False
    shared: bool = False

    sites = "parts"

    def __post_init__(self) -> None:
        if type(self.updates) is not int or self.updates < 1:
            raise ValueError(f"updates must be a whole number of at least 1, not {self.updates!r}")
        if type(self.union) is not int or self.union < 0:
            raise ValueError(f"union must be a whole number of at least 0, not {self.union!r}")

    def __str__(self) -> str:
        own = f"bac S={self.updates}" + ("" if self.shared else f" n={self.union}")
        return own + "".join(f" {name}" for name, on in (("weighed", self.sensitivity), ("shared", self.shared)) if on)

    def calibrated(self, trace: Trace, tables: Tables) -> Plan:
        """The plan for the steps of the tables.

        Raises:
            ValueError: More updates than steps, or the model's blocks have no parts that can be told apart.
        """
        if not tables.sites:
            raise ValueError(f"the blocks of {trace.model} have no parts that can be told apart: use a method for whole blocks")
        if self.updates > tables.steps:
            raise ValueError(f"updates must be at most the number of steps, {tables.steps}, not {self.updates}")
        costs = [
            np.triu(np.square(table.distance * tables.sensitivity[None])).cumsum(1) if self.sensitivity else anchored(table.cosine)
            for table in tables.sites.values()
        ]
        if self.shared:
            costs = [np.sum(costs, 0)] * len(costs)
        schedules = [set(segment_dp(_scaled(cost), self.updates).starts(self.updates)) for cost in costs]
        if self.union and not self.shared:
            layer = {part.path: i for i in trace.offered for part in trace.blocks[i].parts}
            kind = {part.path: part.kind for part in trace.parts}
            schedules = self._bubble(schedules, [t.drift for t in tables.sites.values()], list(tables.sites), layer, kind)
        actions = np.full((tables.steps, len(schedules)), Action.REUSE)
        for i, schedule in enumerate(schedules):
            actions[sorted(schedule), i] = Action.COMPUTE
        effective = sum(map(len, schedules)) / len(schedules)
        facts = {"model": trace.model, "config": trace.config_hash, "method": str(self), "effective_updates": round(effective, 2)}
        return Plan(actions, tuple(tables.sites), facts=facts)

    def _bubble(
        self, schedules: list[set[int]], drift: list[float], paths: list[str], layer: dict[str, int], kind: dict[str, str]
    ) -> list[set[int]]:
        """The union: the parts that drift most also refresh with every feed-forward part of their own or a later block."""
        chosen = sorted(range(len(paths)), key=lambda u: -drift[u])[: self.union]
        joined = [set(schedule) for schedule in schedules]
        for u in chosen:
            for v, path in enumerate(paths):
                if kind[path] == "feed-forward" and layer[path] >= layer[paths[u]]:
                    joined[u] |= schedules[v]
        return joined


def anchored(cosine: np.ndarray) -> np.ndarray:
    """[T, T] cost of a segment a..b: how unlike the value at its first step is to what it stands for, summed over the segment."""
    return np.triu(1.0 - cosine).cumsum(1)


def _scaled(cost: np.ndarray) -> np.ndarray:
    """The same cost with 1 for its largest entry: the solver adds in single precision."""
    return cost / max(float(cost.max()), 1e-30)
