"""Pairwise sample optimisation of a distilled model (PSO, arXiv 2410.03190): it learns what is preferred and stays one of few steps.

Of two samples of a prompt one is preferred. Offline, the pairs are given as clean samples. Online, the student draws both, and what is
made likelier are the random steps it took. The reference is the same denoiser as it was: its new adapters off.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hasten.accelerators.checks import check_not_negative
from hasten.accelerators.distillation.dmd import drawn_noise
from hasten.accelerators.distillation.grid import Denoiser, Grid
from hasten.accelerators.distillation.method import TuningTask
from hasten.accelerators.steering.verifiers import checked_score


@dataclass(frozen=True)
class OfflinePSO:
    """Pairs of clean samples.

    Attributes:
        beta: How sharply a pair is told apart: 200 by default in the published code, 5 in its launch scripts.
        rejection: How much of the rejected sample's error counts: with 1 it is pushed away as hard as the preferred one is pulled.
        reference: Whether errors are compared with those of the reference ("pso" in the published code), or a margin is asked for without
            it ("pso_db").
        anchor: Weight of the rejected sample's error itself, which keeps the student able to draw it.

    Raises:
        ValueError: A value is below 0.
    """

    beta: float = 200.0
    rejection: float = 0.1
    reference: bool = True
    anchor: float = 0.5

    def __post_init__(self) -> None:
        check_not_negative(beta=self.beta, rejection=self.rejection, anchor=self.anchor)

    @property
    def from_pairs(self) -> bool:
        return True

    def tuning_loss(self, task: TuningTask) -> Tensor:
        """See `TuningMethod`."""
        assert task.pairs is not None
        return self.loss(task.student, task.reference, *task.pairs, task.told, task.grid, task.generator)

    def loss(
        self, student: Denoiser, reference: Denoiser, preferred: Tensor, rejected: Tensor, told: Any, grid: Grid, generator: torch.Generator
    ) -> Tensor:
        """The mean loss of the pairs.

        Args:
            student: Its gradients flow.
            reference: The student as it was.
            preferred, rejected: [B, ...] clean latents; both of a pair are noised alike.
            told: The rows' conditions.
            grid: Nodes are drawn from it evenly.
            generator: For nodes and noise.
        """
        index = torch.randint(1, grid.steps + 1, (len(preferred),), generator=generator, device=generator.device)
        noise = drawn_noise(preferred, generator)

        def errors(denoiser: Denoiser) -> tuple[Tensor, Tensor]:
            found = []
            for x0 in (preferred, rejected):
                noisy = grid.noised(x0, noise, index)
                given = grid.estimate(denoiser(noisy, grid.times(index), told), noisy, index)
                found.append((given.x0 - x0).square().flatten(1).mean(1))
            return found[0], found[1]

        better, worse = errors(student)
        margin = self.rejection * worse - better
        if self.reference:
            with torch.no_grad():
                better_before, worse_before = errors(reference)
            losses = -F.logsigmoid(self.beta * (margin - (self.rejection * worse_before - better_before)))
        else:
            losses = F.relu(1 - self.beta * margin)
        return (losses + self.anchor * worse).mean()


class Trajectory(NamedTuple):
    """One run of the few-step sampler.

    Attributes:
        latents: [B, ...] before each step.
        nodes: Of each step, falling.
        x0: [B, ...] what came out.
    """

    latents: tuple[Tensor, ...]
    nodes: tuple[int, ...]
    x0: Tensor


@torch.no_grad()
def drawn_trajectory(
    student: Denoiser, noise: Tensor, told: Any, grid: Grid, nodes: Sequence[int], generator: torch.Generator
) -> Trajectory:
    """Samples [B, ...] with all noise anew at each step (`GammaScheduler(gamma=1)`), and the way there; arguments as for `dmd.rollout`."""
    latents, kept = noise, []
    for place, node in enumerate(nodes):
        index = torch.full((len(noise),), node, device=noise.device)
        kept.append(latents)
        x0 = grid.estimate(student(latents, grid.times(index), told), latents, index).x0
        if place < len(nodes) - 1:
            latents = grid.noised(x0, drawn_noise(x0, generator), torch.full_like(index, nodes[place + 1]))
    return Trajectory(tuple(kept), tuple(nodes), x0)


@dataclass(frozen=True)
class OnlinePSO:
    """Pairs that the student draws itself.

    Attributes:
        beta: How sharply a pair is told apart; 50 in the published code.
        clip: How far a step's likelihood ratio may go from 1 before it has no gradient any more; 0.1 in the published code.

    Raises:
        ValueError: A value is out of range.
    """

    beta: float = 50.0
    clip: float = 0.1

    def __post_init__(self) -> None:
        check_not_negative(beta=self.beta)
        if not 0 < self.clip < 1:
            raise ValueError(f"clip must be above 0 and below 1, not {self.clip!r}")

    @property
    def from_pairs(self) -> bool:
        return False

    def tuning_loss(self, task: TuningTask) -> Tensor:
        """See `TuningMethod`: the student draws both samples of a pair, each from a noise of its own, and the reward prefers one."""
        assert task.reward is not None
        runs, scores = [], []
        for noise in (task.noise, drawn_noise(task.noise, task.generator)):
            runs.append(drawn_trajectory(task.student, noise, task.told, task.grid, task.nodes, task.generator))
            with torch.no_grad():
                scores.append(checked_score(task.reward, task.decode(runs[-1].x0), task.prompts))
        preference = torch.where(scores[0] == scores[1], 0, torch.where(scores[0] > scores[1], 1, -1))
        return self.loss(task.student, task.reference, runs[0], runs[1], preference, task.told, task.grid)

    def loss(
        self, student: Denoiser, reference: Denoiser, first: Trajectory, second: Trajectory, preference: Tensor, told: Any, grid: Grid
    ) -> Tensor:
        """The mean loss over pairs and over all steps but the last, which draws nothing.

        Args:
            student: Its gradients flow.
            reference: The student as it was.
            first, second: Runs of the same prompts over the same nodes, of two steps or more.
            preference: [B] 1 where the first is preferred, -1 where the second is, 0 where neither is.
            told: The rows' conditions.
            grid: The nodes are of it.

        Raises:
            ValueError: The runs have other nodes, or a single step.
        """
        if first.nodes != second.nodes or len(first.nodes) < 2:
            raise ValueError(f"both trajectories must have the same two nodes or more, not {first.nodes} and {second.nodes}")
        sign, losses = preference.to(first.x0), []
        for step in range(len(first.nodes) - 1):
            ratios = [self._log_ratio(student, reference, run, step, told, grid) for run in (first, second)]
            losses.append(-F.logsigmoid(self.beta * sign * (ratios[0] - ratios[1])))
        return torch.stack(losses).mean()

    def _log_ratio(self, student: Denoiser, reference: Denoiser, run: Trajectory, step: int, told: Any, grid: Grid) -> Tensor:
        """[B] how much likelier the step that was taken is for the student than for the reference, averaged over entries, clipped."""
        latents, then = run.latents[step], run.latents[step + 1]
        index = torch.full((len(latents),), run.nodes[step], device=latents.device)
        alpha, sigma = grid.at(torch.full_like(index, run.nodes[step + 1]), then)

        def log_density(denoiser: Denoiser) -> Tensor:
            x0 = grid.estimate(denoiser(latents, grid.times(index), told), latents, index).x0
            return (-0.5 * ((then - alpha * x0) / sigma).square()).flatten(1).mean(1)

        with torch.no_grad():
            before = log_density(reference)
        # Clipped as logarithms: a ratio that overflows would have a gradient of infinity times zero.
        return (log_density(student) - before).clamp(math.log(1 - self.clip), math.log(1 + self.clip))
