"""Forecasters: on the steps between, blocks contribute the polynomial through their last computed offsets, not the last one itself.

TaylorSeer (arXiv 2503.06923) and its kin extrapolate features over the step's number. Here the polynomial runs over the noise level
(divided differences, so that uneven steps weigh as they should), and only the summed offset of a span is kept, not every module's
output: `order + 1` tensors in place of that many for each of hundreds of modules.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.trace import Trace


@dataclass(frozen=True)
class Forecast:
    """Every `interval`-th step computes everything; the steps between forecast every block.

    Attributes:
        interval: One full step, then `interval - 1` forecast ones.
        order: Of the polynomial: 0 repeats the last offset, 1 (TaylorSeer's default in diffusers) draws a straight line, 2 a parabola.
        start: Steps that are computed in full before: a fraction of all or a count. The noisiest steps change fastest.

    Raises:
        ValueError: A value is out of range.
    """

    interval: int = 3
    order: int = 1
    start: int | float = 3

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        if type(self.order) is not int or self.order not in (0, 1, 2):
            raise ValueError(f"order must be 0, 1 or 2, not {self.order!r}")
        if isinstance(self.start, bool) or not isinstance(self.start, int | float) or self.start < 0:
            raise ValueError(f"start must be a fraction from 0.0 to 1.0 or a count of at least 0, not {self.start!r}")
        if isinstance(self.start, float) and self.start > 1:
            raise ValueError(f"start must be a fraction from 0.0 to 1.0 or a count of at least 0, not {self.start!r}")

    def __str__(self) -> str:
        return f"forecast N={self.interval} order={self.order} start={self.start}"

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for `steps` executed steps over the trace's sites."""
        start = self.start if isinstance(self.start, int) else round(self.start * steps)
        computed = [k < start or (k - start) % self.interval == self.interval - 1 for k in range(steps)]
        computed[0] = True
        return forecast_plan(trace, computed, order=self.order, method=str(self))


def forecast_plan(trace: Trace, computed: list[bool], *, order: int, method: str, **facts: Any) -> Plan:
    """A plan that computes whole steps and forecasts whole steps.

    Args:
        computed: For each step, whether everything is computed; the first must be.
        facts: Further facts for the plan.
    """
    column = np.where(computed, Action.COMPUTE, Action.FORECAST if order else Action.REUSE)
    actions = np.repeat(column[:, None], len(trace.sites), 1)
    bound = {"model": trace.model, "config": trace.config_hash, "method": method, "forecast_order": order}
    return Plan(actions, trace.sites, facts={**bound, **facts})
