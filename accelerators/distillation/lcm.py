"""Latent consistency distillation (LCM, arXiv 2310.04378; LCM-LoRA, arXiv 2311.05556).

From every node the student learns to jump to the clean sample, as it would from where the teacher's next guided step leads. It is sampled
with all noise anew at each step (`GammaScheduler(gamma=1)`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.grid import Denoiser, Grid, exact
from hasten.accelerators.distillation.method import FEW, Task
from hasten.accelerators.distillation.teacher import check_ema, check_guidance, check_huber, distance, drawn_index, drawn_scale, guided

SIGMA_DATA, TIMESTEP_SCALE = 0.5, 10.0
"""Of the boundary condition, in the published code; timesteps are counted in thousandths of the training."""


@dataclass(frozen=True)
class LCM:
    """Attributes are the published code's.

    Attributes:
        guidance: Lowest and highest guidance scale, drawn for each row (the papers' w of 3 to 15, plus 1).
        huber: Width of the pseudo-Huber distance; None is the mean squared error.
        stride: Nodes that the teacher crosses at once; the paper's 20 timesteps are one step on a grid of 50.
        ema: Of an averaged target: 0.95 where all weights are trained; None for LoRAs.

    Raises:
        ValueError: A value is out of range.
    """

    guidance: tuple[float, float] = (4.0, 16.0)
    huber: float | None = 0.001
    stride: int = 1
    ema: float | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance)
        check_huber(self.huber)
        check_whole(1, stride=self.stride)
        check_ema(self.ema)

    @property
    def stages(self) -> tuple[int, ...]:
        return (1,)

    @property
    def counts(self) -> tuple[int, ...]:
        return FEW

    @property
    def gamma(self) -> float:
        return 1.0

    def loss(self, task: Task, segments: int) -> Tensor:
        """See `DistillationMethod`; there is one segment."""
        grid, rows = task.grid, len(task.x0)
        index = drawn_index(1, grid.steps, rows, task.generator)
        scale = drawn_scale(self.guidance, rows, task.generator)
        latents = grid.noised(task.x0, task.noise, index)
        prediction = consistency(task.student, latents, index, task.conditions.told, grid)
        below = (index - self.stride).clamp(min=0)
        with torch.no_grad():
            stepped = grid.jump(guided(task.teacher, latents, index, task.conditions, grid, scale), below)
            target = consistency(task.target or task.student, stepped, below, task.conditions.told, grid)
        return distance(prediction, target, self.huber).mean()


def consistency(denoiser: Denoiser, latents: Tensor, index: Tensor, told: object, grid: Grid) -> Tensor:
    """The consistency function [B, ...] of latents [B, ...] at nodes [B]: a clean sample, and the latents themselves at node 0."""
    there = index.clamp(min=1)
    x0 = grid.estimate(denoiser(latents, grid.times(there), told), latents, there).x0
    time = exact(grid.thousandths(index)).to(latents.device).view(-1, *[1] * (latents.ndim - 1)) * TIMESTEP_SCALE
    length = time.square() + SIGMA_DATA**2
    return (SIGMA_DATA**2 / length * latents + time / length.sqrt() * x0).to(x0.dtype)
