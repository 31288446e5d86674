"""The step that phased (PCM, arXiv 2405.18407) and trajectory-segmented consistency (Hyper-SD, arXiv 2404.13686) share.

Time is cut into segments. Inside each the student must land on the same point of the segment's clean end wherever on the teacher's
trajectory it starts: from a node, and from where the teacher's next step leads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.teacher import distance, guided


def segmented_jumps(
    student: Denoiser,
    teacher: Denoiser,
    latents: Tensor,
    index: Tensor,
    landing: Tensor,
    conditions: Conditions,
    grid: Grid,
    scale: Tensor,
    target: Denoiser | None = None,
    stride: int = 1,
) -> tuple[Tensor, Tensor]:
    """Where the student lands from a node, and where it should.

    Args:
        student: Its gradients flow.
        teacher: Takes one step, with guidance.
        latents: [B, ...] at nodes `index` [B] of at least 1.
        landing: [B] nodes below `index`.
        conditions, grid: Of the rows.
        scale: [B] guidance scales.
        target: Jumps from where the teacher's step leads; the student itself by default. It gets no gradient.
        stride: Nodes that the teacher crosses in its step, fewer where the landing comes before.

    Returns:
        Prediction and target [B, ...] at the landing. Where the teacher's step ends on it, the target is the teacher's own.
    """
    prediction = grid.jump(grid.estimate(student(latents, grid.times(index), conditions.told), latents, index), landing)
    below = torch.maximum(index - stride, landing)
    with torch.no_grad():
        stepped = grid.jump(guided(teacher, latents, index, conditions, grid, scale), below)
        # A jump of no length stays where it is; node 0, where the denoiser knows nothing, is only ever such a place.
        there = below.clamp(min=1)
        output = (target or student)(stepped, grid.times(there), conditions.told)
        onward = grid.jump(grid.estimate(output, stepped, there), landing)
        arrived = (below == landing).view(-1, *[1] * (stepped.ndim - 1))
        return prediction, torch.where(arrived, stepped, onward)


def segmented_loss(task: Task, index: Tensor, landing: Tensor, scale: Tensor, stride: int, huber: float | None, segments: int) -> Tensor:
    """The mean distance of the two jumps, from the task's samples noised to nodes `index`; see `segmented_jumps`. With the task's adversary
    its loss is added."""
    latents = task.grid.noised(task.x0, task.noise, index)
    prediction, target = segmented_jumps(
        task.student, task.teacher, latents, index, landing, task.conditions, task.grid, scale, task.target, stride
    )  # fmt: skip
    loss = distance(prediction, target, huber).mean()
    return loss if task.adversary is None else task.adversary.added(loss, task, prediction, target, landing, segments)
