"""DeepCache (arXiv 2312.00858): a UNet's deep features are reused, its shallow layers run on the present latents.

Every `interval`-th step, or steps that lie denser around a centre, computes everything.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.trace import Trace


@dataclass(frozen=True)
class DeepCache:
    """A rule for UNets: made into a plan for each run, needs no calibration.

    Attributes:
        interval: One full step for so many (the package's default is 5, the paper's range 2 to 10).
        branch: How many skip connections beyond the input convolution stay live; 0 is fastest.
        schedule: "uniform", or "power": as many full steps, denser around `center`.
        center: Of the power schedule: a fraction of all steps (15 of 50 in the paper).
        power: Of the power schedule (the paper's range is 1.2 to 1.5).

    Raises:
        ValueError: A value is out of range.
    """

    interval: int = 3
    branch: int = 0
    schedule: str = "uniform"
    center: float = 0.3
    power: float = 1.5

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        if type(self.branch) is not int or self.branch < 0:
            raise ValueError(f"branch must be a whole number of at least 0, not {self.branch!r}")
        if self.schedule not in ("uniform", "power"):
            raise ValueError(f"schedule must be 'uniform' or 'power', not {self.schedule!r}")
        if not 0 <= self.center <= 1:
            raise ValueError(f"center must be a fraction from 0.0 to 1.0, not {self.center!r}")
        if not self.power >= 1:
            raise ValueError(f"power must be at least 1, not {self.power!r}")

    def __str__(self) -> str:
        return f"deepcache N={self.interval} branch={self.branch}" + (" power" if self.schedule == "power" else "")

    def computed(self, steps: int) -> list[int]:
        """The full steps, ascending."""
        if self.schedule == "uniform":
            return list(range(0, steps, self.interval))
        count, middle = -(-steps // self.interval), self.center * (steps - 1)
        low, high = -(middle ** (1 / self.power)), (steps - 1 - middle) ** (1 / self.power)
        at = np.linspace(low, high, count + 1)[:-1]
        wanted = np.sign(at) * np.abs(at) ** self.power + middle
        return sorted({0, *(round(float(step)) for step in wanted)})

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for `steps` executed steps.

        Raises:
            ValueError: The model is no UNet, or has fewer skip connections.
        """
        if trace.deep is None:
            raise ValueError(f"DeepCache needs a UNet with skip connections; {trace.model} is none (use hasten.DeltaDiT for transformers)")
        if self.branch >= len(trace.deep.sites):
            raise ValueError(f"branch must be from 0 to {len(trace.deep.sites) - 1} for this model, not {self.branch}")
        actions = np.full((steps, 1), Action.REUSE)
        actions[self.computed(steps)] = Action.COMPUTE
        facts = {"model": trace.model, "config": trace.config_hash, "method": str(self)}
        return Plan(actions, (trace.deep.sites[self.branch],), facts=facts)
