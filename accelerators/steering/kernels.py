"""Stochastic steps from the estimate of the clean sample, as pure functions.

A particle method needs a step that draws noise: after a deterministic one the copies of a particle would stay the same for ever. The
choices are the generalised DDIM step (DDIM, arXiv 2010.02502, on any path), the linear SDE of Rollover Budget Forcing
(arXiv 2503.19385), and full re-noising (LCM, arXiv 2310.04378), which is right for consistency-distilled models only.

A step never draws: it returns the mean and the standard deviation of the Gaussian to draw from, so whoever calls it owns the noise.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.steering.levels import AlphaSigma


class Transition(NamedTuple):
    """A Gaussian step."""

    mean: Tensor  # [N, ...] at least float32
    std: float  # of every entry; 0 where the step draws nothing

    def sample(self, noise: Tensor | None = None) -> Tensor:
        """The step's outcome for standard normal noise [N, ...]; none is needed where the step draws nothing."""
        if noise is None or self.std == 0:
            return self.mean
        return self.mean + self.std * noise.to(self.mean)


class Kernel(Protocol):
    """A step from `now` to the cleaner `then`."""

    def __call__(self, latents: Tensor, x0: Tensor, now: AlphaSigma, then: AlphaSigma) -> Transition:
        """The distribution of the next latents, from latents [N, ...] and the estimate of the clean sample [N, ...]."""
        ...


def _exact(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor if tensor.dtype == torch.float64 else tensor.float() for tensor in tensors)


def ddim_eta(latents: Tensor, x0: Tensor, now: AlphaSigma, then: AlphaSigma, eta: float = 1.0) -> Transition:
    """The generalised DDIM step, for variance-preserving paths and flows alike.

    Args:
        latents: [N, ...] at `now`.
        x0: [N, ...] estimate of the clean sample.
        now, then: Coefficients before and after the step.
        eta: 0 is DDIM on variance-preserving paths and Euler on flows; 1 (FK steering's choice) is DDPM's ancestral step. The
            marginals are kept for every value from 0 to 1. Rescaling the path changes nothing but the grid of levels.

    Raises:
        ValueError: `eta` is not from 0 to 1, or the step does not lead to less noise.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, not {eta!r}")
    _towards_clean(now, then)
    latents, x0 = _exact(latents, x0)
    noise = (latents - now.alpha * x0) / now.sigma
    kept = now.sigma**2 - (now.alpha / then.alpha * then.sigma) ** 2
    std = eta * then.sigma / now.sigma * math.sqrt(max(0.0, kept))
    return Transition(then.alpha * x0 + math.sqrt(max(0.0, then.sigma**2 - std**2)) * noise, std)


def linear_sde(latents: Tensor, x0: Tensor, now: AlphaSigma, then: AlphaSigma, norm: float = 3.0) -> Transition:
    """An Euler-Maruyama step of the flow's SDE with diffusion coefficient norm * t^2, t the noise level.

    On another path the latents are scaled to the flow of the same signal-to-noise ratio and back. The step to the clean sample draws
    nothing. Use 10 steps or more.

    Args:
        latents, x0, now, then: As for `ddim_eta`.
        norm: 3 in the code of Rollover Budget Forcing.

    Raises:
        ValueError: `norm` is negative, or the step does not lead to less noise.
    """
    if norm < 0:
        raise ValueError(f"norm must be at least 0, not {norm!r}")
    _towards_clean(now, then)
    latents, x0 = _exact(latents, x0)
    if then.sigma == 0:
        return Transition(then.alpha * x0, 0.0)
    scale, level, step = then.alpha + then.sigma, now.level, now.level - then.level
    flowing = latents / (now.alpha + now.sigma)
    noise = (flowing - (1 - level) * x0) / level
    g = norm * level**2
    drift = -(noise - x0) - 0.5 * g**2 * noise / level
    return Transition(scale * (flowing + step * drift), scale * g * math.sqrt(step))


def full_renoise(latents: Tensor, x0: Tensor, now: AlphaSigma, then: AlphaSigma) -> Transition:
    """All noise anew: right for consistency-distilled models, whose x0 is sharp at every level.

    On any other model it loses modes, however many steps are taken: on a mixture of variance 2.22 it ends at 1.3 to 1.5.
    """
    _towards_clean(now, then)
    (x0,) = _exact(x0)
    return Transition(then.alpha * x0, then.sigma)


def add_noise(latents: Tensor, now: AlphaSigma, then: AlphaSigma) -> Transition:
    """The forward process from `now` to the noisier `then`, exactly.

    Raises:
        ValueError: `then` is not noisier.
    """
    if then.level < now.level:
        raise ValueError(f"add_noise goes to more noise, not from level {now.level:.4g} to {then.level:.4g}")
    (latents,) = _exact(latents)
    ratio = then.alpha / now.alpha
    return Transition(ratio * latents, math.sqrt(max(0.0, then.sigma**2 - (ratio * now.sigma) ** 2)))


def _towards_clean(now: AlphaSigma, then: AlphaSigma) -> None:
    if not 0 <= then.sigma * now.alpha <= then.alpha * now.sigma or now.sigma <= 0:
        raise ValueError(f"a step must lead to less noise, not from level {now.level:.4g} to {then.level:.4g}")
