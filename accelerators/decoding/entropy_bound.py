"""EB-sampler (arXiv 2505.24857): positions commit together as long as the entropy at stake stays within a bound.

Of the positions in order, the longest prefix whose summed entropy less its largest one is at most the bound: that difference bounds the
mutual information which is ignored by committing them at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative
from hasten.accelerators.decoding.quota import rank, top
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.statistics import Score, check_score


@dataclass(frozen=True)
class EntropyBoundDecoding(Rule):
    """Commits the longest prefix of the ranking with sum(H) - max(H) <= bound; it has at least one position.

    Attributes:
        bound: In nats. 0.1 as in diffusers' EntropyBoundScheduler; sglang has 0.15, d2Cache 0.001. At 0 only positions without any entropy
            join the first.
        score: What the ranking is by: "entropy", or any other score.

    Raises:
        ValueError: A value is out of range.
    """

    bound: float = 0.1
    score: Score = "entropy"

    def __post_init__(self) -> None:
        check_not_negative(bound=self.bound)
        check_score(self.score)

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin", lots=self.score == "random")

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score = view.statistics.score(self.score)
        place = rank(score, view.candidates)
        entropy = view.statistics.entropy.nan_to_num(nan=torch.inf, posinf=torch.inf).masked_fill(~view.candidates, torch.inf)
        ordered = torch.empty_like(entropy).scatter_(-1, place, entropy)
        ignored = ordered.cumsum(-1) - ordered.cummax(-1).values
        # The sum only grows; inf - inf, where nothing is known of the rest, is no number and fits nowhere.
        count = (ignored <= self.bound).int().cumprod(-1).sum(-1)
        return top(score, view.candidates, count.clamp(min=1)), memory
