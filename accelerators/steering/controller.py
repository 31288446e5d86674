"""The core of steering: what a controller is told at every step of a run, and what it answers.

A run has P prompts x K particles, prompt-major: row p * K + k is particle k of prompt p, and keeps its number to the end. At each step
the denoiser has seen the latents and the estimate of the clean sample is at hand; the controller is asked *before* the step's noise
is drawn. Whoever carries it on a sampler makes everything that belongs to a row (latents, estimate, scheduler history, cached blocks)
follow the index map, computes only the rows that are alive, and draws noise per row from `NoiseStreams`, whose streams stay with the rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.steering.budget import Cost, Meter
from hasten.accelerators.steering.report import ROOT, Lineage, SearchReport

SELECTIONS = ("best", "sample", "all")


class SteeringError(ValueError):
    """A method cannot steer this sampler; the message says what to change."""


@dataclass(frozen=True)
class Run:
    """What a controller is told before the first step.

    Attributes:
        prompts: P.
        steps: Completed steps of the sampler; the two calls of a Heun-like step are one.
        meter: What may be spent, over all prompts.
        seed: Of the run.
        stochastic: Whether the sampler draws noise at its steps.
        rows_per_step: Denoiser rows of a particle's step: 2 under batched guidance.
        verifiers: Verifiers that score each image.
        reward_std: Standard deviation of the reward over samples of a prompt, as far as the verifier knows.
    """

    prompts: int
    steps: int
    meter: Meter = field(default_factory=Meter)
    seed: int = 0
    stochastic: bool = True
    rows_per_step: int = 1
    verifiers: int = 1
    reward_std: float = 1.0

    def __post_init__(self) -> None:
        for name in ("prompts", "steps", "rows_per_step", "verifiers"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {getattr(self, name)!r}")

    def cost(self, particle_steps: int, scored: int) -> Cost:
        """Of so many denoiser calls, and so many images decoded and scored."""
        return Cost(particle_steps, particle_steps * self.rows_per_step, scored, scored * self.verifiers)


class StepInfo(NamedTuple):
    """What a controller sees at a step. Rows that are not alive hold anything."""

    step: int  # 0 is the noisiest
    latents: Tensor  # [P * K, ...] before the step
    x0: Tensor  # [P * K, ...] estimate of the clean sample from them
    rewards: Tensor | None  # [P * K] of the decoded estimates, where `scores_at` asked for them


@dataclass(frozen=True, eq=False)
class StepAction:
    """What a controller answers. The default changes nothing.

    Attributes:
        index: [P * K] int64: row i goes on from what row index[i] is now; the noise of this very step is its own already.
        alive: [P * K] bool: rows that are still worth computing; the others never come back.
        stop: End the run now: the estimates of the rows that are alive are the samples.
    """

    index: Tensor | None = None
    alive: Tensor | None = None
    stop: bool = False


@dataclass(frozen=True)
class Selection:
    """What is returned.

    Attributes:
        rows: For every prompt, rows of the run (0 to P * K - 1), best first; one unless all were asked for.
        weights: [P, K] of the particles, float64; 0 for those that are not alive.
        rewards: [P, K] of the finished samples; -inf for those that are not alive.
    """

    rows: list[list[int]]
    weights: Tensor
    rewards: Tensor


class SteeringMethod(Protocol):
    """The settings of a method."""

    @property
    def needs_noise(self) -> bool:
        """Whether it copies particles, which part only where the sampler draws noise."""
        ...

    def begin(self, run: Run) -> Population:
        """The controller of one run.

        Raises:
            BudgetError: The budget does not suffice for one sample of every prompt.
            SteeringError: The sampler will not do.
        """
        ...


class Population(ABC):
    """The state of P x K particles, and what all controllers share: the size that the budget affords, pruning before the time is up,
    the lineage, and the choice at the end.

    Args:
        run: The run.
        wanted: Particles of each prompt, where the budget affords them.
        method: For the report.
        select: What `choose` returns: "best" or "all".

    Attributes:
        particles: K: what was wanted, or fewer.
        alive: [P, K] bool.
        rewards: [P, K] float64 last rewards, as they followed the particles; NaN before any.
        lineage: The family tree.
        facts, warnings: For the report.

    Raises:
        BudgetError: The budget does not suffice for one sample of every prompt.
    """

    def __init__(self, run: Run, wanted: int, method: str, select: str = "best") -> None:
        self.run, self.method, self.select = run, method, select
        run.meter.require_sample(run.cost(run.steps, 1) * run.prompts)
        self.particles = run.meter.most(lambda count: self.cost(count, -1) * run.prompts, wanted)
        self.lineage = Lineage()
        self.facts: dict[str, Any] = {"particles": self.particles}
        self.warnings: list[str] = []
        if self.particles < wanted:
            self.warnings.append(f"the budget affords {self.particles} of {wanted} particles")
        shape = run.prompts, self.particles
        self.alive = torch.ones(shape, dtype=torch.bool)
        self.rewards = torch.full(shape, torch.nan, dtype=torch.float64)
        self._nodes = torch.full(shape, ROOT)
        self._final: list[list[int]] = []

    @property
    def rows(self) -> int:
        """P * K."""
        return self.alive.numel()

    def scores_at(self, step: int) -> bool:
        """Whether the estimates of step `step` shall be decoded and scored: never where nobody is left to choose from."""
        return self.scheduled(step) and bool((self.alive.sum(1) > 1).any())

    def on_step(self, info: StepInfo) -> StepAction:
        """The answer to one step. Ask once for every step, in order."""
        action = StepAction()
        if info.rewards is not None:
            self._score(info.step, info.rewards)
            action = self.decide(info.step)
            if action.index is not None:
                index = action.index.view(self.alive.shape) % self.particles
                self.rewards, self._nodes = self.rewards.gather(1, index), self._nodes.gather(1, index)
        return self._in_time(info.step, action)

    def finish(self, rewards: Tensor) -> Selection:
        """The choice, from rewards [P * K] of the finished samples; those of rows that are not alive are not looked at."""
        self._score(self.run.steps, rewards)
        final = torch.where(self.alive, self.rewards, -torch.inf)
        chosen, weights = self.choose(final)
        selection = Selection([[p * self.particles + k for k in row] for p, row in enumerate(chosen)], weights, final)
        self._final = [[int(self._nodes[p, k]) for k in row] for p, row in enumerate(chosen)]
        return selection

    def report(self) -> SearchReport:
        """What was done; complete after `finish`."""
        return SearchReport(self.method, self.lineage, self._final, self.run.meter, self.facts, self.warnings)

    # -------------------------------------------------------------------------------------------- what a method says

    @abstractmethod
    def cost(self, particles: int, after: int) -> Cost:
        """Of one prompt with so many particles (at least 1), from the denoiser call after step `after` to the end."""

    def scheduled(self, step: int) -> bool:
        """Whether the method wants rewards at a step."""
        return False

    def decide(self, step: int) -> StepAction:
        """The answer to `self.rewards`, which are those of this step. Unless a method says more, they are written into the lineage and
        nothing changes."""
        return StepAction()

    def choose(self, rewards: Tensor) -> tuple[list[list[int]], Tensor]:
        """For every prompt the particles to return, best first, and the weights [P, K]: even ones unless a method has others."""
        order = self._candidates(rewards).argsort(dim=1, descending=True, stable=True).tolist()
        counts = self.alive.sum(1).tolist() if self.select == "all" else [1] * len(order)
        weights = self.alive.double() / self.alive.sum(1, keepdim=True)
        return [row[:count] for row, count in zip(order, counts, strict=True)], weights

    # ------------------------------------------------------------------------------------------------------- shared

    def _candidates(self, rewards: Tensor) -> Tensor:
        """Rewards by which the best can be looked for: where all are lost, one that is alive must win over those that are not."""
        return rewards.clamp(min=torch.finfo(torch.float64).min).masked_fill(~self.alive, -torch.inf)

    def keep_best(self, counts: list[int]) -> StepAction:
        """Leaves the best so many of each prompt alive; the first of equals stays."""
        order = self._candidates(self.rewards.nan_to_num(nan=-torch.inf)).argsort(dim=1, descending=True, stable=True)
        kept = torch.zeros_like(self.alive)
        for p, count in enumerate(counts):
            kept[p, order[p, :count]] = True
        self.alive &= kept
        return StepAction(alive=self.alive.flatten().clone())

    def _score(self, step: int, rewards: Tensor) -> None:
        if rewards.shape != (self.rows,):
            raise ValueError(f"rewards must have shape [{self.rows}], one for each row, not {list(rewards.shape)}")
        fresh = rewards.detach().to("cpu", torch.float64).view(self.alive.shape)
        self.rewards = torch.where(self.alive, fresh.nan_to_num(nan=-torch.inf, posinf=-torch.inf, neginf=-torch.inf), self.rewards)
        for p in range(self.run.prompts):
            slots = self.alive[p].nonzero()[:, 0]
            added = self.lineage.add(step, self._nodes[p, slots].tolist(), self.rewards[p, slots].tolist(), p, slots.tolist())
            self._nodes[p, slots] = torch.arange(added.start, added.stop)

    def _in_time(self, step: int, action: StepAction) -> StepAction:
        """Prunes, or stops, where what is left to do would not be ended within the budget."""
        counts = self.alive.sum(1).tolist()

        def rest(cap: int) -> Cost:
            return sum((self.cost(min(count, cap), step) for count in counts), Cost())

        cap = self.run.meter.most(rest, max(counts))
        if cap == max(counts):
            return action
        pruned = self.keep_best([min(count, max(cap, 1)) for count in counts])
        if cap == 0:
            self.warnings.append(f"the budget ran out: stopped at step {step} of {self.run.steps}, the samples are its estimates")
            return StepAction(action.index, pruned.alive, stop=True)
        self.warnings.append(f"the budget ran short: at most {cap} particles a prompt after step {step}")
        return StepAction(action.index, pruned.alive)


def resolve_schedule(start: float, end: float, every: float, steps: int) -> list[int]:
    """Steps at the fractions start, start + every, ... up to end of all steps, the last step left out.

    Raises:
        SteeringError: There is none.
    """
    count = int((end - start) / every + 1e-9) + 1
    found = sorted({int((start + i * every) * steps + 0.5) for i in range(count)} - set(range(steps - 1, steps + 1)))
    if not found:
        raise SteeringError(
            f"no step of {steps} before the last lies at the fractions {start:g} to {end:g} every {every:g}; take more steps or widen them"
        )
    return found


def require_noise(run: Run, method: str) -> None:
    """Refuses a sampler whose copies would stay the same.

    Raises:
        SteeringError: It draws no noise.
    """
    if not run.stochastic:
        raise SteeringError(
            f"{method} copies particles, and a sampler that draws no noise would keep the copies the same; use a stochastic step "
            "(eta above 0), or SuccessiveHalving or BestOfN, which need none"
        )
