"""First-block caching (ParaAttention's FBCache; DBCache of cache-dit with more blocks in front and behind).

The first blocks always run. How far their offset has moved since the last computed step, relative to its size, tells how far the offset of
the blocks behind has moved: while that stays below a threshold the latter is reused. Decided for every row of the batch by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.caching.deciders import Memory, relative_l1, tail_plan
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.trace import Trace


@dataclass(frozen=True)
class FirstBlock:
    """A decider: it looks at activations, so at every step the host waits until the device has come there; with `ahead`, only until
    it has come there in the step before, whose rest is still queued. Its recorded plan replays without.

    Attributes:
        threshold: Least relative L1 drift at which a row is computed (cache-dit's default for DBCache; FBCache on FLUX uses 0.05 to 0.12).
        front: Blocks that always run and are looked at (1 in FBCache, 8 by default in DBCache).
        back: Blocks at the end that always run.
        warmup: Steps at the start that are computed: a fraction of all or a count (cache-dit's default is 8).
        max_continuous: Most reused steps in a row; None for no limit (cache-dit's default).
        ahead: Decides each step by where the two before it lead, while the later of them still runs; a jerk of the activations is
            noticed one step late.

    Raises:
        ValueError: A value is out of range.
    """

    threshold: float = 0.08
    front: int = 1
    back: int = 0
    warmup: int | float = 8
    max_continuous: int | None = None
    ahead: bool = False

    proxy = "residual"

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold!r}")
        for name, least in (("front", 1), ("back", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} must be a whole number of at least {least}, not {value!r}")
        if isinstance(self.warmup, bool) or self.warmup < 0 or (isinstance(self.warmup, float) and self.warmup > 1):
            raise ValueError(f"warmup must be a fraction from 0.0 to 1.0 or a count of at least 0, not {self.warmup!r}")
        if self.max_continuous is not None and (type(self.max_continuous) is not int or self.max_continuous < 1):
            raise ValueError(f"max_continuous must be a whole number of at least 1 or None, not {self.max_continuous!r}")

    def __str__(self) -> str:
        text = f"first-block F{self.front}B{self.back} thr={self.threshold:g} warmup={self.warmup}"
        return text + (f" MC={self.max_continuous}" if self.max_continuous else "") + (" ahead" if self.ahead else "")

    def plan(self, trace: Trace, steps: int) -> Plan:
        """What may be reused at most."""
        return tail_plan(trace, steps, self, lambda k: self.open(k, steps))

    def open(self, step: int, steps: int) -> bool:
        """Whether the warm-up is over."""
        return step >= (self.warmup if isinstance(self.warmup, int) else round(self.warmup * steps))

    def reuse(self, step: int, proxy: Tensor, memory: Memory) -> Tensor:
        """[rows] whose front offset has hardly moved since they were last computed."""
        still = relative_l1(proxy, memory["anchor"]) < self.threshold
        return still & (memory["reused"] < self.max_continuous) if self.max_continuous is not None else still

    def learn(self, step: int, proxy: Tensor, computed: Tensor, memory: Memory) -> None:
        """The anchor is the front offset of the last computed step."""
        anchor = memory.get("anchor", proxy)
        memory["anchor"] = torch.where(computed.view(-1, *[1] * (proxy.ndim - 1)), proxy, anchor)
        before = memory.get("reused", torch.zeros(len(proxy), dtype=torch.long, device=proxy.device))
        memory["reused"] = torch.where(computed, 0, before + 1)
