"""MagCache (arXiv 2506.09045): steps are skipped while the magnitude of the residual, known from one prompt, drifts little.

The ratio of the residual's norm to that of the step before hardly depends on the prompt. While the product of these ratios since the
last computed step stays near 1 the residual is repeated. Given the ratios the decision is fixed before the run, so it is a plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.calibrate import Tables
from hasten.accelerators.caching.forecast import forecast_plan
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.trace import Trace


@dataclass(frozen=True)
class MagCache:
    """Calibrated: `hasten.calibrate(pipe, prompts[:1], MagCache(), num_inference_steps=28)`.

    Attributes:
        threshold: Most accumulated |1 - product of ratios| since the last computed step (diffusers' default).
        max_skip: Most skipped steps in a row (diffusers' default).
        retention: Share of the steps at the start that are all computed (diffusers' default).

    Raises:
        ValueError: A value is out of range.
    """

    threshold: float = 0.06
    max_skip: int = 3
    retention: float = 0.2

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold!r}")
        if type(self.max_skip) is not int or self.max_skip < 0:
            raise ValueError(f"max_skip must be a whole number of at least 0, not {self.max_skip!r}")
        if not 0 <= self.retention <= 1:
            raise ValueError(f"retention must be from 0 to 1, not {self.retention!r}")

    def __str__(self) -> str:
        return f"magcache thr={self.threshold:g} K={self.max_skip} ret={self.retention:g}"

    def calibrated(self, trace: Trace, tables: Tables) -> Plan:
        """The plan for the steps of the tables."""
        norms = np.sqrt(np.maximum(np.diagonal(tables.gram, axis1=1, axis2=2), 1e-30))
        ratios = (norms[:, 1:] / norms[:, :-1]).mean(0)
        return forecast_plan(trace, self.computed(ratios), order=0, method=str(self), ratios=[round(float(r), 6) for r in ratios])

    def computed(self, ratios: np.ndarray) -> list[bool]:
        """Which steps are computed, given each step's ratio to the one before ([T - 1])."""
        steps = len(ratios) + 1
        product, drift, skipped = 1.0, 0.0, 0
        found = [True]
        for k in range(1, steps):
            product *= float(ratios[k - 1])
            drift += abs(1.0 - product)
            skipped += 1
            skip = k >= self.retention * steps and drift <= self.threshold and skipped <= self.max_skip
            if not skip:
                product, drift, skipped = 1.0, 0.0, 0
            found.append(not skip)
        return found
