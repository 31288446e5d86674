"""Best-of-N: all particles run to the end, and the verifier picks one (random search in arXiv 2501.09732).

Under equal seconds, verifier and decoding included, it equals or beats several guided searches (Flash-BoN, arXiv 2607.04461): it is what
every other method is to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.accelerators.steering.budget import Cost
from hasten.accelerators.steering.controller import Population, Run


@dataclass(frozen=True)
class BestOfN:
    """N samples of each prompt, the best of which is returned. Any sampler will do.

    Attributes:
        candidates: N; fewer where the budget says so. 4 is ours; the paper on noise search goes from 2 to 256.
        select: "best", or "all", sorted by reward.

    Raises:
        ValueError: A value is out of range.
    """

    candidates: int = 4
    select: str = "best"

    def __post_init__(self) -> None:
        if type(self.candidates) is not int or self.candidates < 1:
            raise ValueError(f"candidates must be a whole number of at least 1, not {self.candidates!r}")
        if self.select not in ("best", "all"):
            raise ValueError(f"select must be best or all, not {self.select!r}")

    def __str__(self) -> str:
        return f"best of {self.candidates}"

    @property
    def needs_noise(self) -> bool:
        return False

    def begin(self, run: Run) -> BestOfNPopulation:
        """The controller of one run; see `SteeringMethod`."""
        return BestOfNPopulation(self, run)


class BestOfNPopulation(Population):
    """Waits for the end."""

    def __init__(self, settings: BestOfN, run: Run) -> None:
        super().__init__(run, settings.candidates, str(settings), select=settings.select)

    def cost(self, particles: int, after: int) -> Cost:
        return self.run.cost(particles * (self.run.steps - 1 - after), particles)
