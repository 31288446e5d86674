"""Confidence-threshold decoding (Fast-dLLM, arXiv 2505.22618): whatever the model is sure of commits, the best position in any case.

If n tokens each have a probability above 1 - e and (n + 1) e <= 1, committing them together picks the same tokens as one after another.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.statistics import Score, check_probability_score


@dataclass(frozen=True)
class ThresholdDecoding(Rule):
    """Commits every position whose score is at least the threshold.

    Attributes:
        threshold: 0.9 in the paper; LLaDA2's pipeline in diffusers has 0.7. Above 1 this is static decoding.
        minimum: Positions that commit in any case; diffusers' BlockRefinementScheduler has block_length / num_inference_steps here.
        score: "low_confidence", or "margin", which is a probability as well.

    Raises:
        ValueError: A value is out of range, or the score is not comparable with a probability.
    """

    threshold: float = 0.9
    minimum: int = 1
    score: Score = "low_confidence"

    def __post_init__(self) -> None:
        check_not_negative(threshold=self.threshold)
        check_whole(1, minimum=self.minimum)
        check_probability_score(self.score)

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin")

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score = view.statistics.score(self.score)
        return view.candidates & (score >= self.threshold) | top(score, view.candidates, self.minimum), memory
