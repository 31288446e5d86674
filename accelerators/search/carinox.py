"""CARINOX (arXiv 2509.17458): gradient noise optimisation from several seeds, with rewards chosen by what the prompt asks for.

Every reward's gradient is clipped before they are added, so that none drowns the others. Rewards are weighed by how well they agreed with
people on prompts of that category: colours, shapes, relations, counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from hasten.accelerators.search.ascent import Ascent, Climb, check_ascent
from hasten.accelerators.search.task import Task
from hasten.accelerators.steering.mixes import CARINOX_REWARDS, CategoryMix, WeightedSum
from hasten.accelerators.steering.verifiers import Verifier


@dataclass(frozen=True)
class CARINOX:
    """Ascent from several seeds. Defaults are those of the published code.

    Attributes:
        seeds: Of the starting noises: 0, 94, 58, 45 and 15. They do not depend on the seed of the call.
        iterations: 50 for each seed.
        learning_rate: 5.
        momentum: 0.9, Nesterov's, as in ReNO, whose code it extends (inferred).
        clip: Largest norm of the summed gradient, 0.1.
        clip_each: Largest norm of every reward's gradient, 0.1.
        regularisation: 0.01, as in ReNO (inferred).
        category: From a prompt to a category of `mixes.CARINOX_CATEGORIES`, for `mix`. None uses the fixed weights, as the published
            optimiser does: it comes with the table but does not read it.

    Raises:
        ValueError: A value is out of range.
    """

    seeds: tuple[int, ...] = (0, 94, 58, 45, 15)
    iterations: int = 50
    learning_rate: float = 5.0
    momentum: float = 0.9
    clip: float = 0.1
    clip_each: float = 0.1
    regularisation: float = 0.01
    category: Callable[[str], str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or any(type(seed) is not int or seed < 0 for seed in self.seeds):
            raise ValueError(f"seeds must be different whole numbers of at least 0, not {self.seeds!r}")
        check_ascent(self.iterations, learning_rate=self.learning_rate, clip=self.clip, clip_each=self.clip_each)
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be at least 0 and below 1, not {self.momentum!r}")
        if not 0 <= self.regularisation < float("inf"):
            raise ValueError(f"regularisation must be at least 0 and finite, not {self.regularisation!r}")

    def __str__(self) -> str:
        return f"CARINOX, {len(self.seeds)} seeds, {self.iterations} iterations"

    def mix(self, named: Mapping[str, Verifier]) -> CategoryMix | WeightedSum:
        """The published combination of rewards named "hps", "image_reward", "da" and "vqa", or some of them.

        Raises:
            VerifierError: `category` is given and the table lacks a name.
        """
        if self.category is not None:
            return CategoryMix(named, self.category)
        return WeightedSum(tuple(named.values()), tuple(CARINOX_REWARDS.get(name, 1.0) for name in named))

    def climb(self, task: Task) -> Climb:
        """See `AscentMethod`."""
        noises = torch.stack([torch.randn(task.shape, generator=torch.Generator().manual_seed(seed)) for seed in self.seeds])
        ascent = Ascent(self.iterations, self.learning_rate, self.momentum, self.clip, self.clip_each, self.regularisation)
        return ascent.climb(task, task.path.start_scale * noises)
