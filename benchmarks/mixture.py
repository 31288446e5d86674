"""A one-dimensional mixture whose denoiser, moments and tilted moments are known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from hasten.accelerators.steering.budget import Meter
from hasten.accelerators.steering.controller import Population, Run, SteeringMethod, StepInfo
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.kernels import Kernel, ddim_eta
from hasten.accelerators.steering.levels import AlphaSigma

MEANS = torch.tensor([-2.0, 0.5, 2.0], dtype=torch.float64)
STDS = torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEAN, VARIANCE = 0.05, 2.2195


def denoised(latents: Tensor, at: AlphaSigma) -> Tensor:
    """The posterior mean of the clean sample, of any shape: entries are independent."""
    # Components lead: a softmax over three numbers that lie side by side is slow.
    means, stds, weights = (row.to(latents).view(-1, *[1] * latents.ndim) for row in (MEANS, STDS, WEIGHTS))
    spread = at.alpha**2 * stds**2 + at.sigma**2
    off = latents - at.alpha * means
    share = (weights.log() - 0.5 * spread.log() - 0.5 * off**2 / spread).softmax(0)
    return (share * (means + at.alpha * stds**2 / spread * off)).sum(0)


def reward(x0: Tensor) -> Tensor:
    """-0.5 min((x - 1.5)^2, 4), of x0 [N, 1]."""
    return -0.5 * (x0[:, 0] - 1.5).square().clamp(max=4)


def tilted(strength: float) -> tuple[float, float, float]:
    """Mean and variance of the mixture tilted by exp(strength * reward), and the mean reward there, by quadrature."""
    x = torch.linspace(-6, 6, 400_001, dtype=torch.float64)
    density = (WEIGHTS / STDS * torch.exp(-0.5 * ((x[:, None] - MEANS) / STDS) ** 2)).sum(1)
    density = density * torch.exp(strength * reward(x[:, None]))
    density = density / density.sum()
    mean = float((density * x).sum())
    return mean, float((density * (x - mean) ** 2).sum()), float((density * reward(x[:, None])).sum())


def flow_path(steps: int) -> list[AlphaSigma]:
    """Even steps of a rectified flow."""
    return [AlphaSigma(k / steps, 1 - k / steps) for k in range(steps + 1)]


def vp_path(steps: int) -> list[AlphaSigma]:
    """Even angles of a variance-preserving path."""
    angles = [0.5 * math.pi * (1 - k / steps) for k in range(steps + 1)]
    return [AlphaSigma(math.cos(angle), math.sin(angle)) for angle in angles]


def sampled(kernel: Kernel, path: Sequence[AlphaSigma], n: int, seed: int = 0) -> Tensor:
    """n samples [n] by a kernel, all noise from one generator."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 1, generator=generator, dtype=torch.float64)
    for now, then in pairwise(path):
        x = kernel(x, denoised(x, now), now, then).sample(torch.randn(n, 1, generator=generator, dtype=torch.float64))
    return x[:, 0]


def steered(
    method: SteeringMethod, path: Sequence[AlphaSigma], seed: int = 0, kernel: Kernel = ddim_eta
) -> tuple[Tensor, Tensor, Population]:
    """Final samples [K], their weights [K] and the controller, for a population too large for a generator each."""
    generator = torch.Generator().manual_seed(seed)
    steps = len(path) - 1
    controller = method.begin(Run(prompts=1, steps=steps, meter=Meter(), seed=seed))
    n = controller.particles
    x = torch.randn(n, 1, generator=generator)
    for step, (now, then) in enumerate(pairwise(path)):
        x0 = denoised(x, now)
        action = controller.on_step(StepInfo(step, x, x0, reward(x0) if controller.scores_at(step) else None))
        if action.index is not None:
            x, x0 = x[action.index], x0[action.index]
        x = kernel(x, x0, now, then).sample(torch.randn(n, 1, generator=generator))
    selection = controller.finish(reward(x))
    return x[:, 0], selection.weights[0], controller


# With more scorings the weights of all but the difference vary so much that 50,000 particles do not suffice.
ORACLES = {
    "difference": (FKSteering(potential="difference", ess=None), 1.0),
    "difference, adaptive": (FKSteering(potential="difference", ess=0.7), 1.0),
    "max": (FKSteering(potential="max", start=0.6, ess=None), 1.0),
    "max, adaptive": (FKSteering(potential="max", start=0.6, resampling="ssp"), 1.0),
    "current": (FKSteering(potential="current", start=0.6, ess=None, resampling="stratified"), 1.0),
    "current, adaptive": (FKSteering(potential="current", start=0.6), 1.0),
    "sum": (FKSteering(potential="sum", start=0.6, ess=None, resampling="residual"), 0.5),
    "sum, adaptive": (FKSteering(potential="sum", start=0.6), 1.0),
    "difference, lambda 3": (FKSteering(potential="difference", resampling="multinomial", ess=None), 3.0),
}


def moments(method: FKSteering, strength: float, particles: int) -> tuple[float, float, Population]:
    """Mean and variance of a method's weighted population, and the controller."""
    x, weights, controller = steered(replace(method, particles=particles, lambda_=strength), vp_path(100))
    mean = float((weights * x).sum())
    return mean, float((weights * (x - mean) ** 2).sum()), controller
