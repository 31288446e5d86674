"""What the trainer knows of a method."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid

FEW = (1, 2, 4, 8)
"""Numbers of steps that a student of jumps to the clean sample is for."""


class Task(NamedTuple):
    """Everything one loss is computed from.

    Attributes:
        student: The denoiser with its adapters on.
        teacher: The same with its adapters off.
        x0: [B, ...] clean latents.
        noise: [B, ...] standard normal.
        conditions: Of the rows.
        grid: The teacher's.
        generator: For nodes and guidance scales.
        target: The student as it was, averaged, where the method wants an average; else the student.
    """

    student: Denoiser
    teacher: Denoiser
    x0: Tensor
    noise: Tensor
    conditions: Conditions
    grid: Grid
    generator: torch.Generator
    target: Denoiser | None = None


class DistillationMethod(Protocol):
    """A loss that turns a denoiser into one of fewer steps.

    Attributes:
        guidance: Lowest and highest guidance scale that is folded in.
        ema: How much of the averaged target is kept at each step; None where the student is its own target.
    """

    @property
    def guidance(self) -> tuple[float, float]: ...

    @property
    def ema(self) -> float | None: ...

    @property
    def stages(self) -> tuple[int, ...]:
        """Segments of each stage, of equal numbers of optimiser steps."""
        ...

    @property
    def counts(self) -> tuple[int, ...]:
        """Numbers of steps that the student is for."""
        ...

    @property
    def gamma(self) -> float:
        """With which `GammaScheduler` samples the student of this method."""
        ...

    def loss(self, task: Task, segments: int) -> Tensor:
        """The mean loss of the batch, with gradients into the student alone."""
        ...
