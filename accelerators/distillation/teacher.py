"""What the teacher says, with guidance folded in, and how far the student is off."""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid, exact
from hasten.accelerators.solvers.gamma import Estimate


@torch.no_grad()
def guided(teacher: Denoiser, latents: Tensor, index: Tensor, conditions: Conditions, grid: Grid, scale: Tensor) -> Estimate:
    """The teacher's guided estimate; nothing of it has a gradient.

    Args:
        teacher: The denoiser with its adapters off.
        latents: [B, ...] at nodes `index` [B].
        conditions: Of the rows; without `untold` no guidance is applied, however large `scale`.
        grid: The nodes.
        scale: [B] guidance scale of each row. Papers on distillation write w for it less one.
    """
    times = grid.times(index)
    output = exact(teacher(latents, times, conditions.told))
    if conditions.untold is not None and (scale != 1).any():
        untold = exact(teacher(latents, times, conditions.untold))
        output = untold + scale.to(output).view(-1, *[1] * (output.ndim - 1)) * (output - untold)
    return grid.estimate(output, latents, index)


def drawn_scale(guidance: tuple[float, float], rows: int, generator: torch.Generator) -> Tensor:
    """[rows] guidance scales, each drawn evenly from the range."""
    low, high = guidance
    return low + (high - low) * torch.rand(rows, generator=generator, device=generator.device)


def drawn_index(low: int, high: int, rows: int, generator: torch.Generator) -> Tensor:
    """[rows] nodes, each drawn evenly from `low` to `high`, both included."""
    return torch.randint(low, high + 1, (rows,), generator=generator, device=generator.device)


def distance(prediction: Tensor, target: Tensor, huber: float | None) -> Tensor:
    """[B] mean squared error of rows, or their mean pseudo-Huber distance sqrt(d^2 + c^2) - c where c is given."""
    squared = (prediction - target).square()
    if huber is not None:
        squared = (squared + huber**2).sqrt() - huber
    return squared.flatten(1).mean(1)


def check_guidance(guidance: tuple[float, float]) -> None:
    """Refuses what is no range of guidance scales.

    Raises:
        ValueError: It is not two rising numbers of at least 0.
    """
    if len(guidance) != 2 or not 0 <= guidance[0] <= guidance[1]:
        raise ValueError(f"guidance must be (lowest, highest) guidance scale, rising and of at least 0, not {guidance!r}")


def check_huber(huber: float | None) -> None:
    """Refuses what is no width of a pseudo-Huber distance.

    Raises:
        ValueError: It is neither None nor above 0.
    """
    if huber is not None and not huber > 0:
        raise ValueError(f"huber must be above 0, or None for the mean squared error, not {huber!r}")


def check_ema(ema: float | None) -> None:
    """Refuses what is no share of an average.

    Raises:
        ValueError: It is neither None nor from 0 to below 1.
    """
    if ema is not None and not 0 <= ema < 1:
        raise ValueError(f"ema must be from 0 to below 1, or None, not {ema!r}")
