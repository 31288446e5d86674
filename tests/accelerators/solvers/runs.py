"""Denoisers that are known exactly, and the pure solvers as whole runs: what the solvers' tests stand on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from hasten.accelerators.solvers.evodiff import Interval, correction, first_order, probe_offset
from hasten.accelerators.steering.levels import AlphaSigma
from hasten.benchmarks.mixture import denoised

Denoiser = Callable[[Tensor, AlphaSigma], Tensor]
Path = Sequence[AlphaSigma]


def _pictures() -> Tensor:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(12, 3, 3, 3, generator=generator, dtype=torch.float64)
    colour = torch.randn(12, 3, 1, 1, generator=generator, dtype=torch.float64)
    return 0.5 * colour + 0.8 * interpolate(coarse, (8, 8), mode="bilinear")


PICTURES, BLUR = _pictures(), 0.15


def pictures(latents: Tensor, at: AlphaSigma) -> Tensor:
    """Posterior mean of the clean sample [N, 3, 8, 8] in a mixture of twelve smooth pictures, each with a little noise."""
    spread = at.alpha**2 * BLUR**2 + at.sigma**2
    off = latents[:, None] - at.alpha * PICTURES
    mean = torch.einsum("nk,kchw->nchw", (-0.5 * off.square().sum((2, 3, 4)) / spread).softmax(1), PICTURES)
    return mean + at.alpha * BLUR**2 / spread * (latents - at.alpha * mean)


DENOISERS: dict[str, Denoiser] = {"numbers": denoised, "pictures": pictures}
"""Of [N, 3, 8, 8]: every entry an independent draw from three modes, and whole pictures."""


def flow(steps: int) -> list[AlphaSigma]:
    """Even levels of a rectified flow, from noise alone to the clean sample."""
    return [AlphaSigma(k / steps, 1 - k / steps) for k in range(steps + 1)]


def angles(steps: int) -> list[AlphaSigma]:
    """Even angles of a variance-preserving path, from next to no signal to the clean sample."""
    turns = [1.55 * (1 - k / steps) for k in range(steps + 1)]
    return [AlphaSigma(math.cos(turn), math.sin(turn)) for turn in turns]


def ddim(denoise: Denoiser, latents: Tensor, path: Path) -> Tensor:
    """The first-order solver."""
    for now, then in pairwise(path):
        latents = first_order(latents, denoise(latents, now), now, then)
    return latents


def dpm_2m(denoise: Denoiser, latents: Tensor, path: Path) -> Tensor:
    """DPM-Solver++ 2M, its last step of first order, written down independently of every other solver here."""
    before: tuple[float, Tensor] | None = None
    for now, then in pairwise(path):
        x0 = denoise(latents, now)
        here = math.log(max(now.alpha, 1e-6) / now.sigma)
        slope = torch.zeros_like(x0)
        if before is not None and then.sigma > 0:
            slope = 0.5 * (math.log(then.alpha / then.sigma) - here) / (here - before[0]) * (x0 - before[1])
        latents = then.sigma / now.sigma * latents + (then.alpha - then.sigma * now.alpha / now.sigma) * (x0 + slope)
        before = here, x0
    return latents


def evodiff(denoise: Denoiser, latents: Tensor, path: Path, balanced: bool = True, clock: Sequence[float] | None = None) -> Tensor:
    """EVODiff, first and last step of first order; its clock shows the noise unless told."""
    clock, steps = clock or [at.sigma for at in path], len(path) - 1
    history: list[Tensor] = []
    interval: Interval | None = None
    for k in range(steps):
        x0 = denoise(latents, path[k])
        if interval is not None:
            latents = latents + correction(x0, history[-1], history[-2], interval)
        latents, interval = first_order(latents, x0, path[k], path[k + 1]), None
        if history and k < steps - 1:
            interval = Interval(path[k - 1], path[k], path[k + 1], clock[k + 1] / clock[0], steps <= 20, balanced)
            latents = latents + probe_offset(x0, history[-1], interval)
        history.append(x0)
    return latents


def noise(rows: int, seed: int = 0) -> Tensor:
    """Latents [rows, 3, 8, 8] to start from."""
    return torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apart(found: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return float((found - reference).norm() / reference.norm())
