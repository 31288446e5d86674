"""FK steering: a general framework for inference-time scaling and steering of diffusion models (arXiv 2501.06848).

K particles run through a stochastic sampler. At a few steps the clean sample is estimated, decoded and scored; particles are weighed by a
potential of the reward and resampled. The weights' product along a path is exp(lambda * r) of the finished sample, so that the final
weighted population follows the model's distribution tilted by exp(lambda * r).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.steering.budget import Cost
from hasten.accelerators.steering.controller import (
    SELECTIONS,
    Population,
    Run,
    StepAction,
    require_noise,
    resolve_schedule,
)
from hasten.accelerators.steering.noise import RESAMPLING, stream
from hasten.accelerators.steering.resampling import SCHEMES, effective_sample_size, normalised, settled

POTENTIALS = ("difference", "max", "sum", "current")


@dataclass(frozen=True)
class FKSteering:
    """Particles that are weighed and resampled along the way.

    Weights are kept as logarithms and carried over steps without resampling, and the last ones close the product to exp(lambda * r)
    for every potential; the published code does neither, and then samples from another distribution (adaptive resampling there does
    not steer at all). A particle is resampled before its step's noise is drawn, so that copies part at once.

    Attributes:
        particles: K of each prompt; fewer where the budget says so. 4 in the paper, which also tried 2, 3 and 8.
        potential: "difference" (of the reward from the last scoring; the paper's best), "max" (of the rewards so far), "sum" (of them)
            or "current" (the reward alone, "rt" in the authors' code). The weights of "sum" vary most: use few scorings and a small
            lambda.
        lambda_: How strongly the reward tilts, for each `reward_std` of it. The paper takes 10 with ImageReward and plain resampling; 4
            of a reward's standard deviations is ours.
        reward_std: Standard deviation of the reward over plain samples of a prompt; 1 takes rewards as they are, None what the verifier
            says of itself (its attribute `spread`), and 1 if it says nothing.
        start, end, every: Scored steps, as fractions of all steps from the noisiest on; 0.2, 0.8 and 0.2 are steps 20, 40, 60 and 80 of
            100, the paper's. Earlier estimates are too blurred to be judged. The finished samples are scored in any case.
        resampling: "systematic", "ssp", "residual", "stratified" or "multinomial" (the paper's, which loses most particles).
        ess: Resample only where the effective sample size is below this share of K; None at every scoring. 0.5 in the authors' code.
        select: "best" by the finished samples' reward (the paper's), "sample" (one by its weight: the only unbiased choice), or "all".

    Raises:
        ValueError: A value is out of range.
    """

    particles: int = 4
    potential: str = "difference"
    lambda_: float = 4.0
    reward_std: float | None = None
    start: float = 0.2
    end: float = 0.8
    every: float = 0.2
    resampling: str = "systematic"
    ess: float | None = 0.5
    select: str = "best"

    def __post_init__(self) -> None:
        if type(self.particles) is not int or self.particles < 1:
            raise ValueError(f"particles must be a whole number of at least 1, not {self.particles!r}")
        if self.potential not in POTENTIALS:
            raise ValueError(f"potential must be one of {', '.join(POTENTIALS)}, not {self.potential!r}")
        if not 0 <= self.lambda_ < float("inf"):
            raise ValueError(f"lambda_ must be at least 0 and finite, not {self.lambda_!r}")
        if self.reward_std is not None and not 0 < self.reward_std < float("inf"):
            raise ValueError(f"reward_std must be above 0 and finite, or None, not {self.reward_std!r}")
        if not 0 <= self.start <= self.end <= 1:
            raise ValueError(f"start and end must be fractions with 0 <= start <= end <= 1, not {self.start!r} and {self.end!r}")
        if not 0 < self.every <= 1:
            raise ValueError(f"every must be a fraction above 0 and at most 1, not {self.every!r}")
        if self.resampling not in SCHEMES:
            raise ValueError(f"resampling must be one of {', '.join(SCHEMES)}, not {self.resampling!r}")
        if self.ess is not None and not 0 < self.ess <= 1:
            raise ValueError(f"ess must be a share above 0 and at most 1, or None, not {self.ess!r}")
        if self.select not in SELECTIONS:
            raise ValueError(f"select must be one of {', '.join(SELECTIONS)}, not {self.select!r}")

    def __str__(self) -> str:
        return f"FK steering K={self.particles} {self.potential} lambda={self.lambda_:g} {self.resampling}"

    @property
    def needs_noise(self) -> bool:
        return self.particles > 1

    def begin(self, run: Run) -> FKPopulation:
        """The controller of one run; see `SteeringMethod`."""
        return FKPopulation(self, run)


class FKPopulation(Population):
    """The state of one run: for every particle its log-weight, the reward at its last scoring, the running maximum or sum, and the
    logarithm of the potentials already applied along its line."""

    def __init__(self, settings: FKSteering, run: Run) -> None:
        self.settings = settings
        self.schedule = resolve_schedule(settings.start, settings.end, settings.every, run.steps) if settings.particles > 1 else []
        if settings.particles > 1:
            require_noise(run, "FKSteering")
        super().__init__(run, settings.particles, str(settings), settings.select)
        self.strength = settings.lambda_ / (run.reward_std if settings.reward_std is None else settings.reward_std)
        shape = self.alive.shape
        self.log_weights = torch.zeros(shape, dtype=torch.float64)
        self.previous = torch.zeros(shape, dtype=torch.float64)
        self.running = torch.full(shape, -torch.inf if settings.potential == "max" else 0.0, dtype=torch.float64)
        self.applied = torch.zeros(shape, dtype=torch.float64)
        self.generators = [stream(run.seed, p, RESAMPLING) for p in range(run.prompts)]
        self.facts |= {"schedule": self.schedule, "ess": [], "resampled": 0}

    def cost(self, particles: int, after: int) -> Cost:
        scorings = sum(step > after for step in self.schedule) if particles > 1 else 0
        return self.run.cost(particles * (self.run.steps - 1 - after), particles * (scorings + 1))

    def scheduled(self, step: int) -> bool:
        return step in self.schedule

    def decide(self, step: int) -> StepAction:
        self._weigh(final=False)
        weights = normalised(self.log_weights.masked_fill(~self.alive, -torch.inf))
        sizes = effective_sample_size(weights)
        self.facts["ess"].append([round(size, 4) for size in sizes.tolist()])
        index = torch.arange(self.particles).repeat(self.run.prompts, 1)
        for p, generator in enumerate(self.generators):
            slots = self.alive[p].nonzero()[:, 0]
            if self.settings.ess is not None and sizes[p] >= self.settings.ess * len(slots):
                continue
            ancestors = SCHEMES[self.settings.resampling](weights[p, slots], len(slots), generator)
            index[p, slots] = slots[settled(ancestors)]
            self.log_weights[p] = 0.0
            self.facts["resampled"] += 1
        if torch.equal(index, torch.arange(self.particles).expand_as(index)):
            return StepAction()
        for state in (self.previous, self.running, self.applied, self.log_weights):
            state.copy_(state.gather(1, index))
        offset = self.particles * torch.arange(self.run.prompts)[:, None]
        return StepAction(index=(index + offset).flatten())

    def choose(self, rewards: Tensor) -> tuple[list[list[int]], Tensor]:
        self._weigh(final=True)
        weights = normalised(self.log_weights.masked_fill(~self.alive, -torch.inf)) * self.alive
        if self.settings.select == "sample":
            draws = zip(weights, self.generators, strict=True)
            return [SCHEMES["multinomial"](row / row.sum(), 1, generator).tolist() for row, generator in draws], weights
        chosen, _ = super().choose(rewards)
        return chosen, weights

    def _weigh(self, final: bool) -> None:
        """Multiplies the weights by the potential of `self.rewards`.

        A particle without a reward has no weight until it is replaced; where no particle of a prompt has one, nothing is learned.
        """
        scored = self.rewards.isfinite() & self.alive
        lost = self.alive & ~scored & scored.any(1, keepdim=True)
        reward = torch.where(scored, self.rewards, 0.0)
        potential = self.settings.potential
        if potential == "difference":
            gained = self.strength * (reward - self.previous)
        elif final:
            gained = self.strength * reward - self.applied
        elif potential == "max":
            gained = self.strength * torch.maximum(self.running, reward)
        elif potential == "sum":
            gained = self.strength * (self.running + reward)
        else:
            gained = self.strength * reward
        self.log_weights += torch.where(scored, gained, 0.0)
        self.log_weights[lost] = -torch.inf
        self.log_weights[(torch.isneginf(self.log_weights) | ~self.alive).all(1)] = 0.0
        self.applied += torch.where(scored, gained, 0.0)
        self.previous = torch.where(scored, reward, self.previous)
        ran = torch.maximum(self.running, reward) if potential == "max" else self.running + reward
        self.running = torch.where(scored, ran, self.running)
