"""Best-of-N with early pruning: at a few steps the estimates are scored and only the best candidates go on (successive halving,
arXiv 1502.07943, on denoising; compare TTSnap and the verifier threshold of noise search).

No particle is ever copied, so deterministic samplers will do. It saves only where the denoiser computes the rows that are alive alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from hasten.accelerators.steering.budget import Cost
from hasten.accelerators.steering.controller import Population, Run, SteeringError, StepAction


@dataclass(frozen=True)
class SuccessiveHalving:
    """Candidates that are dropped rung by rung.

    Attributes:
        candidates: At the start; fewer where the budget says so.
        rungs: (fraction of the steps done, candidates that go on). The default keeps 4 of 8 at 35%, 2 at 60% and 1 at 80%: the steps
            of 4.4 samples in place of 8. A design of ours, not a published one.
        threshold: Candidates whose estimate scores below it are dropped at a rung too, but never the best; None for no threshold.

    Raises:
        ValueError: A value is out of range, or the rungs do not ascend to fewer candidates.
    """

    candidates: int = 8
    rungs: tuple[tuple[float, int], ...] = ((0.35, 4), (0.6, 2), (0.8, 1))
    threshold: float | None = None

    def __post_init__(self) -> None:
        if type(self.candidates) is not int or self.candidates < 1:
            raise ValueError(f"candidates must be a whole number of at least 1, not {self.candidates!r}")
        object.__setattr__(self, "rungs", tuple((fraction, keep) for fraction, keep in self.rungs))
        fractions, kept = [0.0, *(f for f, _ in self.rungs), 1.0], [k for _, k in self.rungs]
        if not self.rungs or any(a >= b for a, b in pairwise(fractions)):
            raise ValueError(f"rungs must lie at ascending fractions between 0 and 1, not {self.rungs!r}")
        if any(type(k) is not int or k < 1 for k in kept) or any(a <= b for a, b in pairwise(kept)):
            raise ValueError(f"rungs must keep fewer and fewer candidates, at least 1, not {self.rungs!r}")

    def __str__(self) -> str:
        return f"successive halving {self.candidates}, " + ", ".join(f"{keep} at {fraction:.0%}" for fraction, keep in self.rungs)

    @property
    def needs_noise(self) -> bool:
        return False

    def begin(self, run: Run) -> HalvingPopulation:
        """The controller of one run; see `SteeringMethod`.

        Raises:
            SteeringError: There are too few steps to have every rung at one of its own.
        """
        return HalvingPopulation(self, run)


class HalvingPopulation(Population):
    """Knows at which steps the rungs are. A rung at fraction f is asked after round(f * steps) steps' worth of denoiser calls."""

    def __init__(self, settings: SuccessiveHalving, run: Run) -> None:
        self.settings = settings
        self.keep: dict[int, int] = {}
        self.particles = settings.candidates
        for fraction, keep in settings.rungs:
            step = int(fraction * run.steps + 0.5) - 1
            if step in self.keep or not 0 <= step < run.steps - 1:
                raise SteeringError(
                    f"{run.steps} steps are too few for rungs at {[f for f, _ in settings.rungs]}; take more steps or fewer rungs"
                )
            self.keep[step] = keep
        super().__init__(run, settings.candidates, str(settings))
        self.facts["rungs"] = {str(step): keep for step, keep in self.keep.items()}

    def cost(self, particles: int, after: int) -> Cost:
        calls = scored = 0
        for step in range(after + 1, self.run.steps):
            calls += particles
            if particles > self._goes_on(step):
                scored += particles
                particles = min(particles, self.keep[step])
        return self.run.cost(calls, scored + particles)

    def _goes_on(self, step: int) -> int:
        """The number of candidates at or below which nobody is dropped at a step."""
        if step not in self.keep:
            return self.particles
        return self.keep[step] if self.settings.threshold is None else 1

    def scheduled(self, step: int) -> bool:
        return int(self.alive.sum(1).max()) > self._goes_on(step)

    def decide(self, step: int) -> StepAction:
        counts = [self.keep[step]] * self.run.prompts
        if self.settings.threshold is not None:
            above = (self.alive & (self.rewards >= self.settings.threshold)).sum(1).tolist()
            counts = [max(1, min(count, passed)) for count, passed in zip(counts, above, strict=True)]
        return self.keep_best(counts)
