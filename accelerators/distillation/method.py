"""What the trainer knows of a method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid
from hasten.accelerators.steering.verifiers import Verifier

FEW = (1, 2, 4, 8)
"""Numbers of steps that a student of jumps to the clean sample is for."""


class Adversary(Protocol):
    """A discriminator beside a consistency loss (`adversarial.Adversarial`)."""

    def added(self, loss: Tensor, task: Task, prediction: Tensor, target: Tensor, landing: Tensor, segments: int) -> Tensor:
        """The loss with the adversarial one, weighed against it: where jumps landed [B, ...], where they should, and at what nodes [B]."""
        ...


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
        score: The denoiser with a second score's adapters on, where the method learns one.
        adversary: Where the method has an adversarial part.
    """

    student: Denoiser
    teacher: Denoiser
    x0: Tensor
    noise: Tensor
    conditions: Conditions
    grid: Grid
    generator: torch.Generator
    target: Denoiser | None = None
    score: Denoiser | None = None
    adversary: Adversary | None = None


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


@runtime_checkable
class ScoredMethod(DistillationMethod, Protocol):
    """One with a second score, which has adapters and an optimiser of its own."""

    @property
    def updates(self) -> int:
        """Steps of the second score for each of the student's."""
        ...

    def own_loss(self, task: Task) -> Tensor:
        """The second score's loss, with gradients into it alone."""
        ...


class TuningTask(NamedTuple):
    """Everything one loss of a method that tunes a distilled student is computed from.

    Attributes:
        student: Its gradients flow.
        reference: The student as it began.
        noise: [B, ...] standard normal, that samples begin with.
        told: The rows' conditions.
        prompts: Of the rows.
        grid: Of the student's few steps: its nodes are theirs, and the clean sample.
        generator: For whatever is drawn.
        decode: From latents to images in 0 to 1, differentiable.
        reward: Of images and prompts; None where there are pairs.
        pairs: Clean latents [B, ...] that are preferred, and such that are not, where the method learns from given pairs.
    """

    student: Denoiser
    reference: Denoiser
    noise: Tensor
    told: Any
    prompts: Sequence[str]
    grid: Grid
    generator: torch.Generator
    decode: Callable[[Tensor], Tensor]
    reward: Verifier | None = None
    pairs: tuple[Tensor, Tensor] | None = None

    @property
    def nodes(self) -> list[int]:
        """Of the student's run, noisiest first."""
        return list(range(self.grid.steps, 0, -1))


@runtime_checkable
class TuningMethod(Protocol):
    """A loss that moves a distilled student towards what is preferred."""

    @property
    def from_pairs(self) -> bool:
        """Whether it learns from given pairs of samples."""
        ...

    def tuning_loss(self, task: TuningTask) -> Tensor:
        """The mean loss of the batch, with gradients into the student alone."""
        ...
