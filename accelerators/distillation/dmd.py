"""Distribution matching (DMD2, arXiv 2405.14867) with two adapters on one base: the student's and that of a second score.

The student's clean samples are noised again, and moved along the difference of what the teacher and the second score say about them. The
second score learns, by plain denoising, what the student makes. The base with no adapter is the teacher, so that nothing is held thrice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.distillation.grid import Conditions, Denoiser, Grid, exact
from hasten.accelerators.distillation.method import FEW, Task
from hasten.accelerators.distillation.teacher import check_guidance, drawn_index, drawn_scale, guided


class Rollout(NamedTuple):
    """What the student makes as it is sampled.

    Attributes:
        latents: [B, ...] at `node`, without gradients.
        node: [B] nodes, one for all rows.
        x0: [B, ...] the student's clean sample from there, with gradients.
    """

    latents: Tensor
    node: Tensor
    x0: Tensor


@dataclass(frozen=True)
class DistributionMatching:
    """The adversarial part of the paper is left out: it needs real pictures and a third network's head.

    Attributes:
        guidance: Lowest and highest guidance scale of the teacher, drawn for each row; 8 in the published code for SDXL.
        noise: Lowest and highest share of the scores' grid that samples are noised to; 0.02 to 0.98 in the published code.
        updates: Steps of the second score for each of the student's; 5 in the published code.
        counts: Numbers of steps that the student is sampled in, evenly often.

    Raises:
        ValueError: A value is out of range.
    """

    guidance: tuple[float, float] = (8.0, 8.0)
    noise: tuple[float, float] = (0.02, 0.98)
    updates: int = 5
    counts: tuple[int, ...] = FEW

    def __post_init__(self) -> None:
        if not self.counts or any(type(count) is not int or count < 1 for count in self.counts):
            raise ValueError(f"counts must be whole numbers of at least 1, not {self.counts!r}")
        check_guidance(self.guidance)
        check_whole(1, updates=self.updates)
        if not 0 <= self.noise[0] < self.noise[1] <= 1:
            raise ValueError(f"noise must be two rising shares from 0 to 1, not {self.noise!r}")

    @property
    def ema(self) -> float | None:
        return None

    @property
    def stages(self) -> tuple[int, ...]:
        return (1,)

    @property
    def gamma(self) -> float:
        return 1.0

    def loss(self, task: Task, segments: int) -> Tensor:
        """See `DistillationMethod`: the scores are compared on the teacher's grid."""
        assert task.score is not None
        x0 = self._made(task)
        return self.student_loss(x0, task.score, task.teacher, task.conditions, task.grid, task.generator)

    def own_loss(self, task: Task) -> Tensor:
        """See `ScoredMethod`."""
        assert task.score is not None
        with torch.no_grad():
            x0 = self._made(task)
        return self.score_loss(x0, task.score, task.conditions, task.grid, task.generator)

    def _made(self, task: Task) -> Tensor:
        """Samples of the student, in a number of steps and up to one of them that are drawn."""
        counts = [count for count in self.counts if count <= task.grid.steps]
        count = counts[_drawn(len(counts), task.generator)]
        nodes = few_nodes(task.grid, count)[: 1 + _drawn(count, task.generator)]
        return rollout(task.student, task.noise, task.conditions.told, task.grid, nodes, task.generator).x0

    def student_loss(
        self, x0: Tensor, fake: Denoiser, teacher: Denoiser, conditions: Conditions, scores: Grid, generator: torch.Generator
    ) -> Tensor:
        """The loss whose gradient in `x0` is the difference of the scores.

        Args:
            x0: [B, ...] the student's clean samples, with gradients.
            fake: The denoiser with the second score's adapters on.
            teacher: The denoiser with its adapters off.
            conditions: Of the rows.
            scores: Noise levels at which the scores are compared.
            generator: For levels, noise and guidance scales.
        """
        index = self._levels(len(x0), scores, generator)
        scale = drawn_scale(self.guidance, len(x0), generator)
        with torch.no_grad():
            given = exact(x0.detach())
            noisy = scores.noised(given, drawn_noise(given, generator), index)
            real = guided(teacher, noisy, index, conditions, scores, scale).x0
            made = scores.estimate(fake(noisy, scores.times(index), conditions.told), noisy, index).x0
            off = (given - real).abs().flatten(1).mean(1).clamp(min=1e-8).view(-1, *[1] * (given.ndim - 1))
            target = given - (made - real) / off
        return 0.5 * (exact(x0) - target).square().mean()

    def score_loss(self, x0: Tensor, fake: Denoiser, conditions: Conditions, scores: Grid, generator: torch.Generator) -> Tensor:
        """Plain denoising of what the student made; arguments as for `student_loss`, `x0` without gradients."""
        index = self._levels(len(x0), scores, generator)
        noise = drawn_noise(x0, generator)
        noisy = scores.noised(x0, noise, index)
        given = scores.estimate(fake(noisy, scores.times(index), conditions.told), noisy, index)
        # The noise weighs all levels alike, whatever is predicted.
        return (given.noise - noise).square().mean()

    def _levels(self, rows: int, scores: Grid, generator: torch.Generator) -> Tensor:
        low, high = (round(share * scores.steps) for share in self.noise)
        return drawn_index(max(1, low), max(1, min(high, scores.steps - 1)), rows, generator)


def rollout(student: Denoiser, noise: Tensor, told: object, grid: Grid, nodes: Sequence[int], generator: torch.Generator) -> Rollout:
    """Backward simulation: samples as the student is sampled, up to one of its steps, so that it learns on what it will be given.

    Args:
        student: The denoiser with its adapters on.
        noise: [B, ...] that sampling begins with.
        told: The rows' conditions.
        grid: The nodes are of it.
        nodes: Falling, those of the steps before the one that has a gradient, and of that one.
        generator: For the noise of each step: all of it is new, as `GammaScheduler(gamma=1)` draws it.
    """
    latents = noise
    for place, node in enumerate(nodes):
        index = torch.full((len(noise),), node, device=noise.device)
        if place == len(nodes) - 1:
            break
        with torch.no_grad():
            x0 = grid.estimate(student(latents, grid.times(index), told), latents, index).x0
            latents = grid.noised(x0, drawn_noise(x0, generator), torch.full_like(index, nodes[place + 1]))
    return Rollout(latents, index, grid.estimate(student(latents, grid.times(index), told), latents, index).x0)


def few_nodes(grid: Grid, steps: int) -> list[int]:
    """Nodes that a run of so many steps begins its steps at, noisiest first.

    Raises:
        ValueError: The grid has fewer steps.
    """
    if not 1 <= steps <= grid.steps:
        raise ValueError(f"steps must be from 1 to the grid's, {grid.steps}, not {steps}")
    return [grid.steps] + [grid.steps * k // steps for k in range(steps - 1, 0, -1)]


def _drawn(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (), generator=generator, device=generator.device))


def drawn_noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal noise of the shape of `like`, drawn where the generator is."""
    return torch.randn(like.shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)
