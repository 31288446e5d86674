"""Denoisers whose trajectories are known exactly, so that losses have known values."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hasten.accelerators.distillation.grid import Grid
from hasten.accelerators.solvers.gamma import Estimate

MEAN, STD = 0.7, 0.4
SHAPE = (3, 2)


def grid_of(prediction_type: str, steps: int = 12) -> Grid:
    """A small grid for the prediction type."""
    if prediction_type == "flow_prediction":
        return Grid.flow(steps, shift=2.0)
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    return Grid.variance_preserving(torch.cumprod(1 - betas, 0), steps, prediction_type, top=749)


def node_of(grid: Grid, timesteps: Tensor) -> Tensor:
    """The nodes that the denoiser was told of."""
    found = (grid.timesteps[None, 1:] == timesteps[:, None]).float()
    assert (found.sum(1) == 1).all()
    return found.argmax(1) + 1


def carried(grid: Grid, latents: Tensor, index: Tensor, to: Tensor) -> Tensor:
    """Along the probability-flow ODE of data N(MEAN, STD^2), exactly: latents keep their place among all others."""

    def moments(at: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = grid.at(at, latents)
        return alpha * MEAN, (alpha.square() * STD**2 + sigma.square()).sqrt()

    (mean, std), (mean_to, std_to) = moments(index), moments(to)
    return mean_to + std_to * (latents - mean) / std


def output_of(grid: Grid, latents: Tensor, index: Tensor, landing: Tensor, landed: Tensor) -> Tensor:
    """What a denoiser must say at nodes so that the deterministic jump to `landing` ends at `landed`."""
    (alpha, sigma), (alpha_to, sigma_to) = grid.at(index, latents), grid.at(landing, latents)
    noise = (alpha * landed - alpha_to * latents) / (alpha * sigma_to - alpha_to * sigma)
    flat = alpha == 0  # noise alone: the latents say what the noise is
    noise = torch.where(flat, latents / sigma, noise)
    x0 = torch.where(flat, (landed - sigma_to * noise) / alpha_to, (latents - sigma * noise) / torch.where(flat, 1.0, alpha))
    return said(grid, Estimate(x0, noise), index)


def said(grid: Grid, given: Estimate, index: Tensor) -> Tensor:
    """An estimate as the denoiser would put it."""
    alpha, sigma = grid.at(index, given.x0)
    return {
        "epsilon": given.noise,
        "sample": given.x0,
        "v_prediction": alpha * given.noise - sigma * given.x0,
        "flow_prediction": given.noise - given.x0,
    }[grid.prediction_type]


def walking(grid: Grid, landing: Callable[[Tensor], Tensor], truth: Callable[..., Tensor] = carried) -> Callable[..., Tensor]:
    """A denoiser whose jump from any node to `landing` of it follows `truth`; conditions are added to what it says."""

    def denoiser(latents: Tensor, timesteps: Tensor, conditions: Tensor | float = 0.0) -> Tensor:
        index = node_of(grid, timesteps)
        to = landing(index)
        return output_of(grid, latents, index, to, truth(grid, latents, index, to)) + conditions

    return denoiser
