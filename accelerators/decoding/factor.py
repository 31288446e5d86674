"""Factor-based decoding (Fast-dLLM, arXiv 2505.22618, later version): the more tokens commit at once, the surer each must be.

Looser than a fixed threshold where few positions qualify and stricter where many do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.decoding.quota import rank, top
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.statistics import Score, check_probability_score


@dataclass(frozen=True)
class FactorDecoding(Rule):
    """Commits the n best positions for the largest n such that (j + 1)(1 - c_j) < factor holds for each of them, c_j being the j-th best.

    The best one commits in any case.

    Attributes:
        factor: 1.0 in the paper's code; more is more parallel, 0 is one token a step.
        score: "low_confidence" or "margin".

    Raises:
        ValueError: A value is out of range, or the score is not comparable with a probability.
    """

    factor: float = 1.0
    score: Score = "low_confidence"

    def __post_init__(self) -> None:
        if not 0 <= self.factor < float("inf"):
            raise ValueError(f"factor must be a number of at least 0, not {self.factor!r}")
        check_probability_score(self.score)

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin")

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score = view.statistics.score(self.score)
        place = rank(score, view.candidates)
        # A position fits by its own place; it commits if all better ones fit as well.
        misfit = view.candidates & ((place + 2) * (1 - score) >= self.factor) & (place > 0)
        first_misfit = torch.where(misfit, place, place.shape[-1]).amin(-1)
        return top(score, view.candidates, first_misfit), memory
