"""Delta-DiT (arXiv 2406.01125): cache the offset of a range of blocks, rear blocks early and front blocks late.

A DiT is a straight chain: reusing a block's output would drop the present latents, so its offset (output minus input) is reused.
Early, noisy steps settle the outline, which the front blocks make, so the rear ones are cached; late steps settle detail, which the
rear blocks make, so the front ones are cached. Every `interval`-th step computes everything.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.trace import Trace


def _count(value: int | float, whole: int) -> int:
    """A count as it stands, a fraction of `whole` rounded."""
    return min(whole, value if isinstance(value, int) else round(value * whole))


@dataclass(frozen=True)
class DeltaDiT:
    """Delta-DiT's rule: made into a plan for each run, needs no calibration.

    Attributes:
        interval: One full step, then `interval - 1` steps that reuse (the paper's N). 1 computes everything.
        cached: Blocks that are reused on those steps (the paper's Nc): a fraction of all, or a count. The default 0.75 is the value
            that reproduces the published 1.60x on PixArt-alpha at interval 2 (21 of 28 blocks; inferred, not stated).
        boundary: Steps of the late stage, in which the front is cached instead of the rear (the paper's b, counted from the end):
            a fraction of all steps, or a count. 0.5 is LCM's published b=2 at 4 steps.
        start: Steps that are computed in full before any reuse: a fraction or a count.
        placement: "stage" for the paper's rule; "front" or "rear" to cache the same end throughout; a number to cache from that
            block on.

    Raises:
        ValueError: A value is out of range; the message names it and says what is allowed.
    """

    interval: int = 2
    cached: int | float = 0.75
    boundary: int | float = 0.5
    start: int | float = 0
    placement: str | int = "stage"

    def __post_init__(self) -> None:
        if not isinstance(self.interval, int) or isinstance(self.interval, bool) or self.interval < 1:
            raise ValueError(f"interval must be a whole number of at least 1, not {self.interval!r}")
        for name in ("cached", "boundary", "start"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"{name} must be a fraction (0.0 to 1.0) or a count, not {value!r}")
            if value < 0 or (isinstance(value, float) and not value <= 1):
                raise ValueError(f"{name} must be a fraction from 0.0 to 1.0 or a count of at least 0, not {value!r}")
        if isinstance(self.placement, bool) or (
            self.placement not in ("stage", "front", "rear") and not (isinstance(self.placement, int) and self.placement >= 0)
        ):
            raise ValueError(f"placement must be 'stage', 'front', 'rear' or the first cached block's number, not {self.placement!r}")

    @classmethod
    def preset(cls, name: str) -> DeltaDiT:
        """A published setting; `PRESETS` lists them.

        Raises:
            ValueError: There is no such preset.
        """
        if name not in PRESETS:
            raise ValueError(f"no Delta-DiT preset {name!r}; there are {', '.join(PRESETS)}")
        return PRESETS[name]

    def with_options(self, **options: Any) -> DeltaDiT:
        """The same rule with some values changed."""
        return replace(self, **options)

    def __str__(self) -> str:
        text = f"delta-dit N={self.interval} Nc={self.cached} b={self.boundary}"
        text += f" start={self.start}" if self.start else ""
        return text + (f" at {self.placement}" if self.placement != "stage" else "")

    def plan(self, trace: Trace, steps: int) -> Plan:
        """The plan for `steps` executed steps over the trace's sites."""
        blocks = len(trace.sites)
        cached = _count(self.cached, blocks)
        late = steps - _count(self.boundary, steps)
        start = _count(self.start, steps)
        actions = np.zeros((steps, blocks), np.uint8)
        for k in range(start, steps):
            if (k - start) % self.interval == 0:
                continue
            if isinstance(self.placement, int):
                first = self.placement
            elif self.placement == "front" or (self.placement == "stage" and k >= late):
                first = 0
            else:
                first = blocks - cached
            actions[k, first : first + cached] = Action.REUSE
        return Plan(actions, trace.sites, facts={"model": trace.model, "config": trace.config_hash, "method": str(self)})


PRESETS: dict[str, DeltaDiT] = {
    # PixArt-alpha, 20 steps, published 1.60x; N and Nc inferred from it.
    "pixart-alpha-20": DeltaDiT(interval=2, cached=21),
    # PixArt-alpha with LCM, 4 steps, published 1.08x, b and Nc as published.
    "lcm-4": DeltaDiT(interval=2, cached=4, boundary=2),
    # The abstract's 1.12x; Nc inferred.
    "lcm-4-abstract": DeltaDiT(interval=2, cached=6, boundary=2),
    # mindone's DiTCache on SD3: 20 of 24 joint blocks from block 1 on, every second step from step 10 on.
    "sd3-mindone": DeltaDiT(interval=2, cached=20, start=10, placement=1),
    # Cache4Diffusion's baseline on FLUX: all 38 single blocks, every third step computed.
    "flux-single": DeltaDiT(interval=3, cached=38, placement=19),
}
"""Published settings, as far as they are known."""
