"""Trajectory-segmented consistency distillation (Hyper-SD, arXiv 2404.13686).

Time is cut into 8 segments, then 4, 2 and 1; each stage begins where the one before ended. Inside a segment the student learns to jump
from any node to the clean end, or to any node before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.method import Task
from hasten.accelerators.distillation.segmented import segmented_loss
from hasten.accelerators.distillation.teacher import check_ema, check_guidance, check_huber, drawn_index, drawn_scale

Landing = Literal["start", "any"]
"""Where a jump ends: at the clean end of its segment, or at a node drawn from there to just below the one it starts at."""


@dataclass(frozen=True)
class TrajectoryConsistency:
    """One unified LoRA for as many steps as there were segments in any stage.

    Attributes:
        segments: Of each stage; the paper's are 8, 4, 2, 1. Stages are equally long: 4, 2, 1, 1 gives half of all steps to the last.
        guidance: Lowest and highest guidance scale, drawn for each row; 3 to 3 folds in one.
        landing: "any" is the paper's. A denoiser is not told where it shall land, so that "start" is the sharper aim.
        huber: Width of a pseudo-Huber distance; None is the paper's mean squared error.
        stride: Nodes that the teacher crosses at once.
        ema: Of an averaged target; None, as usual for LoRAs, has the student be its own.
        adversarial: Whether a discriminator on the teacher's features judges the jumps too, as in the paper. It costs two more calls of the
            denoiser a step with gradients, and gradient checkpointing must be off.

    Raises:
        ValueError: A value is out of range.
    """

    segments: tuple[int, ...] = (8, 4, 2, 1)
    guidance: tuple[float, float] = (3.0, 3.0)
    landing: Landing = "start"
    huber: float | None = None
    stride: int = 1
    ema: float | None = None
    adversarial: bool = False

    def __post_init__(self) -> None:
        if (
            not self.segments
            or any(type(n) is not int or n < 1 for n in self.segments)
            or list(self.segments) != sorted(self.segments)[::-1]
        ):
            raise ValueError(f"segments must be falling whole numbers of at least 1, such as (8, 4, 2, 1), not {self.segments!r}")
        if self.landing not in get_args(Landing):
            raise ValueError(f"landing must be one of {', '.join(get_args(Landing))}, not {self.landing!r}")
        check_guidance(self.guidance)
        check_huber(self.huber)
        check_whole(1, stride=self.stride)
        check_ema(self.ema)

    @property
    def stages(self) -> tuple[int, ...]:
        return self.segments

    @property
    def counts(self) -> tuple[int, ...]:
        return tuple(sorted(set(self.segments)))

    @property
    def gamma(self) -> float:
        return 1.0

    def loss(self, task: Task, segments: int) -> Tensor:
        """See `DistillationMethod`."""
        grid, rows = task.grid, len(task.x0)
        index = drawn_index(1, grid.steps, rows, task.generator)
        landing = grid.segment_start(index, segments)
        if self.landing == "any":
            share = torch.rand(rows, generator=task.generator, device=index.device)
            landing = landing + (share * (index - landing)).long()
        scale = drawn_scale(self.guidance, rows, task.generator)
        return segmented_loss(task, index, landing, scale, self.stride, self.huber, segments)
