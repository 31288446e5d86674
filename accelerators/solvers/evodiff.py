"""EVODiff: entropy-aware variance optimisation (arXiv 2509.26096, NeurIPS 2025), order 2, multistep, one denoiser call a step.

Each interval is crossed twice. A probe extrapolates from the last two estimates of the clean sample; when the denoiser has seen the probe,
the interval is corrected with what it said. Both differences of estimates are weighted by projections of one estimate on the other, taken
for each channel of each row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.steering.levels import AlphaSigma

FAINTEST = 1e-3
"""Least signal for the logarithm of a signal-to-noise ratio: a flow begins at none, and one training timestep of 1,000 is the next best."""


@dataclass(frozen=True)
class Interval:
    """One interval of the grid and the one before it.

    Attributes:
        before, now, then: Coefficients at the previous, the present and the next point; `then` is not clean.
        progress: From 1 at the start of the run to 0 at its end: (time_then + time_end) / (time_start + time_end).
        short: Whether the run has few steps (20 in the authors' code), which turns a rule of the corrector round.
        balanced: Whether differences are balanced by the ratio of successive noise ratios, as published. Without, two equal estimates have
            no difference, and the limit of many steps is better kept.
    """

    before: AlphaSigma
    now: AlphaSigma
    then: AlphaSigma
    progress: float
    short: bool = True
    balanced: bool = True

    @property
    def span(self) -> float:
        """Weight of the present estimate in the first-order step."""
        return _span(self.now, self.then)

    @property
    def ratio(self) -> float:
        """Length of the previous interval over that of this one, in log signal-to-noise."""
        return (_log_snr(self.now) - _log_snr(self.before)) / (_log_snr(self.then) - _log_snr(self.now))

    @property
    def decay(self) -> float:
        """Noise left at the end of the interval over that at its beginning."""
        return self.then.sigma / self.now.sigma

    def difference(self, later: Tensor, earlier: Tensor) -> tuple[Tensor, Tensor]:
        """What is new in the later of two estimates, and the share of the earlier one that is taken for old, one a channel."""
        balance = math.sqrt(self.decay / (self.now.sigma / self.before.sigma)) if self.balanced else 1.0
        weight = 0.5 * (1 - self.progress**2)
        share = (1 - weight) * balance + weight * projection(later, earlier)
        return later - share * earlier, share


def first_order(latents: Tensor, x0: Tensor, now: AlphaSigma, then: AlphaSigma) -> Tensor:
    """The first-order step in data prediction: DDIM, and Euler on a flow. All [N, ...]."""
    return then.sigma / now.sigma * latents + _span(now, then) * x0


def probe_offset(x0: Tensor, x0_before: Tensor, interval: Interval) -> Tensor:
    """How far the probe lies from the first-order step, [N, ...].

    Args:
        x0: [N, ...] the estimate at the beginning of the interval.
        x0_before: [N, ...] the estimate at the beginning of the interval before.
        interval: The interval.
    """
    return _probe(x0, x0_before, interval)[0]


def correction(x0_probe: Tensor, x0: Tensor, x0_before: Tensor, interval: Interval) -> Tensor:
    """What to add to the probe, [N, ...]; to be computed when the denoiser has been called with the probe.

    Args:
        x0_probe: [N, ...] the estimate at the probe, at the end of the interval.
        x0, x0_before, interval: As for `probe_offset`.
    """
    offset, old, stretch = _probe(x0, x0_before, interval)
    span, ratio = interval.span, interval.ratio
    new, _ = interval.difference(x0_probe, x0)
    # Gradients at the two ends; the common factor 1 / h cancels in the projection.
    backward, forward = old / ratio, ratio * new
    mix = 0.5 * torch.sigmoid(0.5 * projection(forward + backward, forward - backward).abs())
    gradient = (1 - mix) * forward - mix * backward
    missed = offset - 0.5 * span / stretch * gradient
    excess = projection(missed, old).abs() / span - 0.5
    if interval.short:
        damping = torch.sigmoid(excess)
    else:
        step = span / interval.then.sigma
        trust = torch.sigmoid(projection(x0, (x0 - x0_before) / step) * (2 - interval.decay**2))
        damping = torch.sigmoid(-excess * trust)
    return 0.5 * span / damping * gradient - offset


def projection(vector: Tensor, onto: Tensor) -> Tensor:
    """Coefficient of one on the other, from -2 to 2, with a position for each row and channel; 0 where the other is zero.

    Channels are the second dimension of [N, C, ...], and the last one of packed latents [N, L, C]; the rows of [N, C] are one channel.
    """
    dims = (-1,) if vector.ndim <= 2 else (1,) if vector.ndim == 3 else tuple(range(2, vector.ndim))
    length = onto.square().sum(dims, keepdim=True)
    overlap = (vector * onto).sum(dims, keepdim=True)
    return torch.where(length > 0, overlap / length, torch.zeros_like(length)).clamp(-2, 2)


def _probe(x0: Tensor, x0_before: Tensor, interval: Interval) -> tuple[Tensor, Tensor, Tensor]:
    old, share = interval.difference(x0, x0_before)
    # The authors clip the sigmoid to 0.25 and 1.5, which it cannot reach.
    stretch = torch.sigmoid(0.25 * share.abs()) * interval.ratio
    return 0.5 * interval.span / stretch * old, old, stretch


def _span(now: AlphaSigma, then: AlphaSigma) -> float:
    return then.alpha - then.sigma * now.alpha / now.sigma


def _log_snr(at: AlphaSigma) -> float:
    return math.log(max(at.alpha, FAINTEST) / at.sigma)
