"""The method of `hasten.accelerate(pipe)` when none is named: a conservative rule chosen from the trace and the number of steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.deepcache import DeepCache
from hasten.accelerators.caching.delta_dit import DeltaDiT
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.trace import Trace

FEWEST_STEPS = 8
"""Below this every step matters too much (few-step models change a great deal from one step to the next)."""


@dataclass(frozen=True)
class Auto:
    """Delta-DiT with half the blocks on every second step, the first quarter of the steps computed; on a UNet DeepCache on every second
    step with one more skip connection live than its default; nothing below 8 steps."""

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan, or one that computes everything where caching is not worth it (its `method` fact says why)."""
        facts = {"model": trace.model, "config": trace.config_hash}
        if not trace.sites and trace.deep is None:
            return Plan(np.zeros((steps, 0), np.uint8), (), facts={**facts, "method": "none: no block of this model can be cached"})
        if steps < FEWEST_STEPS:
            why = f"none: {steps} steps are too few to reuse anything (at least {FEWEST_STEPS})"
            return Plan(np.zeros((steps, len(trace.sites)), np.uint8), trace.sites, facts={**facts, "method": why})
        if trace.deep is not None:
            return DeepCache(interval=2, branch=min(1, len(trace.deep.sites) - 1)).plan(trace, steps)
        return DeltaDiT(interval=2, cached=0.5, boundary=0.5, start=0.25).plan(trace, steps)
