"""FORA (arXiv 2407.01425) and EfficientVLA's action-head cache (arXiv 2506.10100): parts of blocks reused at an interval.

Every `interval`-th step computes all parts and stores their outputs before the gate; the steps between answer every part with what is
stored. The two papers state the same rule, for image transformers and for a robot policy's action head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.trace import Trace

KINDS = ("attention", "cross-attention", "feed-forward")


@dataclass(frozen=True)
class FORA:
    """A rule: made into a plan for each run, needs no calibration.

    Attributes:
        interval: One full step, then `interval - 1` that reuse (EfficientVLA's 5; FORA's 3 on FLUX gives 2.8x in FLOPs).
        parts: Which kinds are reused.

    Raises:
        ValueError: A value is out of range.
    """

    interval: int = 3
    parts: tuple[str, ...] = KINDS

    def __post_init__(self) -> None:
        if type(self.interval) is not int or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        if not self.parts or not set(self.parts) <= set(KINDS):
            raise ValueError(f"parts must be some of {', '.join(KINDS)}, not {self.parts!r}")

    @classmethod
    def efficient_vla(cls, interval: int = 5) -> FORA:
        """EfficientVLA's setting for an action head: self-attention and feed-forward, every fifth step of the loop."""
        return cls(interval, ("attention", "feed-forward"))

    def __str__(self) -> str:
        return f"fora N={self.interval}" + ("" if self.parts == KINDS else f" {'+'.join(self.parts)}")

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for `steps` executed steps over the trace's parts."""
        sites = tuple(part.path for part in trace.parts if part.kind in self.parts)
        facts = {"model": trace.model, "config": trace.config_hash, "method": str(self)}
        if not sites:
            blocks = np.zeros((steps, len(trace.sites)), np.uint8)
            return Plan(blocks, trace.sites, facts={**facts, "method": f"{self}: no part of this model's blocks can be told apart"})
        column = np.array([Action.COMPUTE if k % self.interval == 0 else Action.REUSE for k in range(steps)])
        return Plan(np.repeat(column[:, None], len(sites), 1), sites, facts=facts)
