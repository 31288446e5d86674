"""ReNO: reward-based noise optimisation of one-step generators (arXiv 2406.04312).

The starting noise of a one-step model climbs a weighted sum of differentiable rewards by gradient ascent, held near the sphere on which
Gaussian noise lies. The best image of all iterations is returned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.ascent import Ascent, Climb, check_ascent
from hasten.accelerators.search.task import Task
from hasten.accelerators.steering.mixes import RENO_REWARDS, WeightedSum
from hasten.accelerators.steering.verifiers import Verifier


@dataclass(frozen=True)
class ReNO:
    """Gradient ascent on the noise. Defaults are those of the published code; `mix` weighs its rewards.

    Attributes:
        iterations: 50.
        learning_rate: 5; 10 for Hyper-SD.
        momentum: 0.9, Nesterov's.
        clip: Largest norm of the gradient, 0.1, for every row on its own (the code has one row).
        clip_each: Largest norm of every reward's own gradient, None as published; CARINOX limits it to 0.1, which balances rewards of
            different scales.
        regularisation: 0.01, of the negative log-density of the noise's norm.
        candidates: Noises that climb side by side; 1.

    Raises:
        ValueError: A value is out of range.
    """

    iterations: int = 50
    learning_rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    clip_each: float | None = None
    regularisation: float = 0.01
    candidates: int = 1

    def __post_init__(self) -> None:
        each = {} if self.clip_each is None else {"clip_each": self.clip_each}
        check_ascent(self.iterations, learning_rate=self.learning_rate, clip=self.clip, **each)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum!r}")
        if not 0 <= self.regularisation < float("inf"):
            raise ValueError(f"regularisation must be at least 0 and finite, not {self.regularisation!r}")
        check_whole(1, candidates=self.candidates)

    def __str__(self) -> str:
        return f"ReNO, {self.iterations} iterations, rate {self.learning_rate:g}"

    def mix(self, named: Mapping[str, Verifier]) -> WeightedSum:
        """The published combination of rewards named "hps", "image_reward", "clip" and "pickscore", or some of them; others weigh 1."""
        return WeightedSum(tuple(named.values()), tuple(RENO_REWARDS.get(name, 1.0) for name in named))

    def climb(self, task: Task) -> Climb:
        """See `AscentMethod`."""
        ascent = Ascent(self.iterations, self.learning_rate, self.momentum, self.clip, self.clip_each, self.regularisation)
        return ascent.climb(task, task.fresh(self.candidates))
