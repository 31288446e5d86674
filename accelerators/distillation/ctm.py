"""Consistency trajectory distillation as DITTO-2 (arXiv 2405.20289) uses it: CTM (arXiv 2310.02279).

From any node the student jumps to any cleaner one. It should land where it would have landed had the teacher's solver walked the first
part of the way. Plain denoising is learned beside it, which keeps its short jumps those of a denoiser.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.distillation.method import FEW, Task
from hasten.accelerators.distillation.teacher import check_ema, check_guidance, check_huber, distance, drawn_index, drawn_scale, guided


@dataclass(frozen=True)
class ConsistencyTrajectory:
    """A denoiser is not told where it shall land: one that cannot be leans on the node it starts from alone.

    Attributes:
        guidance: Lowest and highest guidance scale, drawn for each row.
        reach: Most solver steps that the teacher walks.
        denoising: Weight of plain denoising beside the trajectory's loss; 1 in CTM.
        huber: Width of the pseudo-Huber distance; None is the mean squared error.
        ema: Of an averaged target; None has the student be its own.

    Raises:
        ValueError: A value is out of range.
    """

    guidance: tuple[float, float] = (3.0, 3.0)
    reach: int = 4
    denoising: float = 1.0
    huber: float | None = None
    ema: float | None = None

    def __post_init__(self) -> None:
        check_guidance(self.guidance)
        check_whole(1, reach=self.reach)
        check_not_negative(denoising=self.denoising)
        check_huber(self.huber)
        check_ema(self.ema)

    @property
    def stages(self) -> tuple[int, ...]:
        return (1,)

    @property
    def counts(self) -> tuple[int, ...]:
        return FEW

    @property
    def gamma(self) -> float:
        return 0.0

    def loss(self, task: Task, segments: int) -> Tensor:
        """See `DistillationMethod`; there is one segment."""
        grid, rows, told = task.grid, len(task.x0), task.conditions.told
        index = drawn_index(1, grid.steps, rows, task.generator)
        share = torch.rand(rows, generator=task.generator, device=index.device)
        landing = (share * index).long()
        walked = drawn_index(1, self.reach, rows, task.generator)
        scale = drawn_scale(self.guidance, rows, task.generator)
        latents = grid.noised(task.x0, task.noise, index)
        given = grid.estimate(task.student(latents, grid.times(index), told), latents, index)
        prediction = grid.jump(given, landing)
        end = torch.maximum(index - walked, landing)
        with torch.no_grad():
            place, at = latents, index
            for _ in range(int((index - end).max())):
                below = torch.maximum(at - 1, end)
                there = at.clamp(min=1)
                moved = grid.jump(guided(task.teacher, place, there, task.conditions, grid, scale), below)
                place, at = torch.where((below < at).view(-1, *[1] * (place.ndim - 1)), moved, place), below
            there = at.clamp(min=1)
            output = (task.target or task.student)(place, grid.times(there), told)
            onward = grid.jump(grid.estimate(output, place, there), landing)
            target = torch.where((at == landing).view(-1, *[1] * (place.ndim - 1)), place, onward)
        loss = distance(prediction, target, self.huber).mean()
        if self.denoising == 0:
            return loss
        # The top node is noise alone, and what is left of the sample there is nothing to learn from.
        seen = (index < grid.steps).to(given.noise).view(-1, *[1] * (place.ndim - 1))
        return loss + self.denoising * (seen * (given.noise - task.noise)).square().mean()
