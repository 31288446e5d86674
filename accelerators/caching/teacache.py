"""TeaCache (arXiv 2411.19108): reuse while the estimated change of the output, summed over the steps, stays small.

The estimate comes from the first block's modulated input, which knows both the latents and the noise level: its relative change from step
to step, put through a curve fitted beforehand, is taken for the relative change of what the blocks add. The published curves are
polynomials that turn negative, or never near 0, within their range; here every increment is clamped at 0, and `hasten.calibrate` fits a
monotone curve for the model at hand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.ahead import sent
from hasten.accelerators.caching.deciders import Memory, relative_l1, tail_plan
from hasten.accelerators.caching.plan import Plan
from hasten.accelerators.caching.trace import Trace

PRESETS: dict[str, tuple[float, ...]] = {
    "flux-dev": (498.651651, -283.781631, 55.8554382, -3.82021401, 0.264230861),
    "hunyuan-video": (733.226126, -401.131952, 67.5869174, -3.149878, 0.0961237896),
    "cogvideox-5b": (-1538.80483, 843.202495, -134.363087, 7.97131516, -0.0523162339),
    "cogvideox-2b": (-31.0658903, 25.4732368, -5.92380459, 1.75769064, -0.00361568434),
    "cogvideox1.5-5b": (250.210439, -165.061612, 35.7804877, -0.781551492, 0.0358559703),
    "cogvideox1.5-5b-i2v": (122.842302, -104.088754, 26.2981677, -0.306009921, 0.037121322),
    "mochi": (-3512.41319, 811.675948, -60.9400215, 2.42429681, 0.00305291719),
    "ltx-video": (21.4700694, -12.8016453, 2.31279151, 0.792487521, 0.00969274326),
    "lumina2": (393.76566581, -603.50993606, 209.10239044, -23.00726601, 0.86377344),
    "cosmos": (271.156237, -91.9775607, 2.2443725, 2.08355751, 0.14177633),
    "hidream-i1-full": (-31360.5009, -712.425503, 49.1363285, 8.2651549, 0.108053901),
    "open-sora-1.2": (217.546007, -118.329252, 26.8662585, -0.0459364272, 0.048442624),
    "open-sora-plan": (205943.668, -14875.9286, 306.085986, 1.3141808, 0.00239658469),
    "latte": (-2464.34137, 308.044764, 80.7447667, -4.11385132, 0.111001402),
    "wan2.1-t2v-1.3b": (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774),
    "wan2.1-t2v-14b": (-5784.54975374, 5449.50911966, -1811.16591783, 256.27178429, -13.02252404),
    "wan2.1-i2v-480p": (-302.33167, 223.948934, -52.5463970, 5.8734844, -0.201973289),
    "wan2.1-i2v-720p": (-114.36346466, 65.26524496, -18.82220707, 4.91518089, -0.23412683),
}
"""Published polynomials, highest power first."""


@dataclass(frozen=True)
class TeaCache:
    """A decider: it looks at activations, so at every step the host waits until the device has come there; with `ahead`, only until
    it has come there in the step before, whose rest is still queued. Its recorded plan replays without.

    Attributes:
        threshold: Estimated change at which a row is computed (published for FLUX: .25 for 1.5x, .4 for 1.8x, .6 for 2.0x, .8 for 2.25x).
        curve: Polynomial from the proxy's relative change to the output's, highest power first, or the name of a preset; the identity by
            default. Increments are clamped at 0.
        knots: (change of the proxy, change of the output), ascending, in place of the polynomial: what `hasten.calibrate` fits. Held
            constant outside the fitted range.
        ahead: Decides each step by where the two before it lead, while the later of them still runs; a jerk of the activations is
            noticed one step late.

    Raises:
        ValueError: A value is out of range, or there is no such preset.
    """

    threshold: float = 0.25
    curve: str | tuple[float, ...] = (1.0, 0.0)
    knots: tuple[tuple[float, float], ...] = ()
    ahead: bool = False

    proxy = "modulated"
    front = 0
    back = 0

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise ValueError(f"threshold must be at least 0, not {self.threshold!r}")
        if isinstance(self.curve, str) and self.curve not in PRESETS:
            raise ValueError(f"curve must be a polynomial or one of {', '.join(PRESETS)}, not {self.curve!r}")
        if any(x1 < x0 or y1 < y0 for (x0, y0), (x1, y1) in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError("knots must ascend")

    def __str__(self) -> str:
        shape = f"fitted at {len(self.knots)} knots" if self.knots else self.curve if isinstance(self.curve, str) else "polynomial"
        return f"teacache thr={self.threshold:g} {shape}" + (" ahead" if self.ahead else "")

    def plan(self, trace: Trace, steps: int) -> Plan:
        """What may be reused at most."""
        return tail_plan(trace, steps, self, lambda k: self.open(k, steps))

    def open(self, step: int, steps: int) -> bool:
        """The first and the last step are computed."""
        return 0 < step < steps - 1

    def estimate(self, change: Tensor) -> Tensor:
        """The output's relative change for the proxy's, never negative."""
        if self.knots:
            x, y = (sent(column, change.device, change.dtype) for column in zip(*self.knots, strict=True))
            at = torch.searchsorted(x, change).clamp(1, len(x) - 1)
            share = ((change - x[at - 1]) / (x[at] - x[at - 1]).clamp_min(1e-12)).clamp(0, 1)
            return y[at - 1] + share * (y[at] - y[at - 1])
        value = torch.zeros_like(change)
        for coefficient in PRESETS[self.curve] if isinstance(self.curve, str) else self.curve:
            value = value * change + coefficient
        return value.clamp_min(0)

    def reuse(self, step: int, proxy: Tensor, memory: Memory) -> Tensor:
        """[rows] whose estimated change since they were last computed is below the threshold."""
        return self._summed(proxy, memory) < self.threshold

    def _summed(self, proxy: Tensor, memory: Memory) -> Tensor:
        return memory["sum"] + self.estimate(relative_l1(proxy, memory["before"]))

    def learn(self, step: int, proxy: Tensor, computed: Tensor, memory: Memory) -> None:
        """The proxy is compared with that of the step before, computed or not."""
        if "sum" in memory:
            memory["sum"] = torch.where(computed, 0.0, self._summed(proxy, memory))
        else:
            memory["sum"] = torch.zeros(len(proxy), device=proxy.device)
        memory["before"] = proxy.clone()

    def fitted(self, pairs: Sequence[tuple[float, float]]) -> TeaCache:
        """The same with a monotone curve fitted to measured pairs (change of the proxy, change of the output).

        Raises:
            ValueError: Fewer than two pairs.
        """
        if len(pairs) < 2:
            raise ValueError(f"a curve needs at least 2 measured pairs, not {len(pairs)}")
        return replace(self, knots=isotonic(pairs))


def isotonic(pairs: Sequence[tuple[float, float]], most: int = 32) -> tuple[tuple[float, float], ...]:
    """Knots of the ascending curve nearest to the pairs in squares (pool adjacent violators), at most `most` of them."""
    pools: list[list[float]] = []  # [sum of x, sum of y, count]
    for x, y in sorted(pairs):
        pools.append([x, y, 1.0])
        while len(pools) > 1 and pools[-2][1] / pools[-2][2] >= pools[-1][1] / pools[-1][2]:
            later = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], later, strict=True)]
    knots = [(x / n, y / n) for x, y, n in pools]
    if len(knots) > most:
        knots = [knots[i] for i in sorted({round(i) for i in np.linspace(0, len(knots) - 1, most)})]
    return tuple(knots) if len(knots) > 1 else (*knots, (knots[0][0] + 1e-6, knots[0][1]))
