"""Guidance-branch skipping (the CFG cache of FasterCache, arXiv 2410.19355, without its Fourier bands).

Guidance needs two predictions, with and without the caption. On most steps only the first is computed; the other is rebuilt from it and
their difference as it was when both were computed last. Up to half of a step is saved, whatever else is cached.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.plan import GUIDANCE, Action, Plan
from hasten.accelerators.caching.trace import Trace

HALVES = {None: None, "first": 0, "second": 1}


@dataclass(frozen=True)
class SkipGuidance:
    """A rule: made into a plan for each run, needs no calibration.

    Attributes:
        interval: One step with both branches, then `interval - 1` with one (FasterCache's 5).
        start: Steps before with both: a fraction of all or a count. FasterCache begins at timestep 641 of 1000, after 36% of a linear
            schedule.
        order: 0 repeats the last difference, 1 draws a line through the last two over the noise level.
        conditional: "first" or "second" half of a batch with both branches; None learns it from what the scheduler is given, which takes a
            pipeline. In a loop of your own it has to be said; diffusers' own order is "second".

    Raises:
        ValueError: A value is out of range.
    """

    interval: int = 5
    start: int | float = 0.36
    order: int = 1
    conditional: str | None = None

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        if isinstance(self.start, bool) or self.start < 0 or (isinstance(self.start, float) and self.start > 1):
            raise ValueError(f"start must be a fraction from 0.0 to 1.0 or a count of at least 0, not {self.start!r}")
        if type(self.order) is not int or self.order not in (0, 1):
            raise ValueError(f"order must be 0 or 1, not {self.order!r}")
        if self.conditional not in HALVES:
            raise ValueError(f"conditional must be 'first', 'second' or None, not {self.conditional!r}")

    def __str__(self) -> str:
        return f"skip-guidance N={self.interval} start={self.start} order={self.order}"

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for `steps` executed steps: all blocks computed, and a column that says where one branch is skipped."""
        start = max(1, self.start if isinstance(self.start, int) else round(self.start * steps))
        skipped = [k >= start and (k - start) % self.interval != self.interval - 1 for k in range(steps)]
        actions = np.zeros((steps, len(trace.sites) + 1), np.uint8)
        actions[skipped, -1] = Action.SKIP_BRANCH
        facts = {"model": trace.model, "config": trace.config_hash, "method": str(self), "guidance_order": self.order}
        if self.conditional is not None:
            facts["conditional"] = HALVES[self.conditional]
        return Plan(actions, (*trace.sites, GUIDANCE), facts=facts)
