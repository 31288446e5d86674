"""Hierarchical decoding (dInfer, arXiv 2510.08666): what commits together is spread out, so that it depends less on each other.

The masks of a block fall into runs; every run gives its surest position. Runs halve each time, so the steps are logarithmic at best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.decoding.quota import rank
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.statistics import Score, check_probability_score


@dataclass(frozen=True)
class HierarchicalDecoding(Rule):
    """Commits the best position of each run of masks if it is above `low`, every position above `threshold`, and the best of all.

    Attributes:
        low: 0.4 by default in dInfer, 0.5 and 0.62 in its evaluation scripts.
        threshold: Ours to choose: 0.9, that of dInfer's threshold decoder.
        score: "low_confidence" or "margin".

    Raises:
        ValueError: A value is out of range, or the score is not comparable with a probability.
    """

    low: float = 0.4
    threshold: float = 0.9
    score: Score = "low_confidence"

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.threshold:
            raise ValueError(f"low must be from 0 to the threshold, {self.threshold!r}, not {self.low!r}")
        check_probability_score(self.score)

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin")

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        candidates, score = view.candidates, view.statistics.score(self.score)
        place = rank(score, candidates)
        begins = candidates & ~torch.nn.functional.pad(candidates, (1, 0))[:, :-1]
        run = begins.cumsum(-1)  # 0 only before the first run
        last = torch.full_like(place, place.shape[-1])
        # By place and not by score: of equal ones only the leftmost is the best of its run.
        best = torch.nn.functional.pad(last, (0, 1)).scatter_reduce(-1, run, torch.where(candidates, place, last), "amin")
        spread = (place == best.gather(-1, run)) & (score > self.low)
        return candidates & (spread | (score > self.threshold) | (place == 0)), memory
