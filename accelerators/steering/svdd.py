"""SVDD: soft value-based decoding (arXiv 2408.08252), and CoDe: the same every few steps (arXiv 2502.00968).

At each step the noise is drawn M times, and of the M children the one goes on whose estimate of the clean sample scores best. CoDe lets M
branches run for a block of steps before it chooses. A block of one step is SVDD, a block of all steps is best-of-N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hasten.accelerators.steering.budget import Cost
from hasten.accelerators.steering.controller import Population, Run, StepAction, require_noise
from hasten.accelerators.steering.noise import RESAMPLING, stream


@dataclass(frozen=True)
class SVDD:
    """One line of descent with M children at each step.

    The children are M rows of the batch for the whole run: each is estimated once, at its own level, and its estimate serves both the
    choice and the next step, so a run takes steps * M denoiser calls (the published code takes steps * (M + 1)).

    Attributes:
        children: M; fewer where the budget says so. 20 in the authors' code.
        temperature: None takes the best child; else a child is drawn with weights exp(reward / temperature).

    Raises:
        ValueError: A value is out of range.
    """

    children: int = 20
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check("children", self.children, self.temperature)

    def __str__(self) -> str:
        return f"SVDD M={self.children}" + ("" if self.temperature is None else f" temperature={self.temperature:g}")

    @property
    def needs_noise(self) -> bool:
        return self.children > 1

    def begin(self, run: Run) -> BlockPopulation:
        """The controller of one run; see `SteeringMethod`."""
        return BlockPopulation(self.children, 1, self.temperature, run, str(self), "SVDD")


@dataclass(frozen=True)
class CoDe:
    """One line of descent with M branches of L steps.

    Attributes:
        branches: M; fewer where the budget says so. 25 in the comparison of Rollover Budget Forcing's code at 500 denoiser calls.
        block: L, steps between two choices; 2 there.
        temperature: As for `SVDD`.

    Raises:
        ValueError: A value is out of range.
    """

    branches: int = 25
    block: int = 2
    temperature: float | None = None

    def __post_init__(self) -> None:
        _check("branches", self.branches, self.temperature)
        if type(self.block) is not int or self.block < 1:
            raise ValueError(f"block must be a whole number of at least 1, not {self.block!r}")

    def __str__(self) -> str:
        return f"CoDe M={self.branches} L={self.block}" + ("" if self.temperature is None else f" temperature={self.temperature:g}")

    @property
    def needs_noise(self) -> bool:
        return self.branches > 1

    def begin(self, run: Run) -> BlockPopulation:
        """The controller of one run; see `SteeringMethod`."""
        return BlockPopulation(self.branches, self.block, self.temperature, run, str(self), "CoDe")


class BlockPopulation(Population):
    """After every block all branches become the chosen one, and part with the noise of the next step."""

    def __init__(self, branches: int, block: int, temperature: float | None, run: Run, method: str, name: str) -> None:
        self.block, self.temperature = block, temperature
        self.boundaries = range(block, run.steps, block)
        if branches > 1 and self.boundaries:
            require_noise(run, name)
        super().__init__(run, branches, method)
        self.generators = [stream(run.seed, p, RESAMPLING) for p in range(run.prompts)]

    def cost(self, particles: int, after: int) -> Cost:
        scorings = sum(step > after for step in self.boundaries) if particles > 1 else 0
        # The last step draws no noise: after a choice there, one branch is all that is finished.
        alone = particles == 1 or self.run.steps - 1 in self.boundaries
        return self.run.cost(particles * (self.run.steps - 1 - after), particles * scorings + (1 if alone else particles))

    def scheduled(self, step: int) -> bool:
        return step in self.boundaries

    def decide(self, step: int) -> StepAction:
        chosen = self._candidates(self.rewards).argmax(1)
        if self.temperature is not None:
            finite = self.rewards.isfinite() & self.alive
            logits = torch.where(finite, self.rewards / self.temperature, -torch.inf)
            for p, generator in enumerate(self.generators):
                if finite[p].any():
                    chosen[p] = torch.multinomial(logits[p].softmax(0), 1, generator=generator)
        if step == self.run.steps - 1:
            self.alive &= torch.zeros_like(self.alive).scatter(1, chosen[:, None], True)
            return StepAction(alive=self.alive.flatten().clone())
        offset = self.particles * torch.arange(self.run.prompts)
        return StepAction(index=(chosen + offset).repeat_interleave(self.particles))


def _check(name: str, count: int, temperature: float | None) -> None:
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
    if temperature is not None and not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be above 0 and finite, or None for the best, not {temperature!r}")
