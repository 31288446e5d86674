"""Static schedules (LLaDA, arXiv 2502.09992; Dream, arXiv 2508.15487): so many tokens a step, the best-ranked first.

A quota says how many positions commit, a score says which. One token a step is the reference that all faster schedules are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.quota import Curve, quota, top
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View
from hasten.accelerators.decoding.statistics import Score, check_score


@dataclass(frozen=True)
class StaticDecoding(Rule):
    """Commits a fixed number of positions in every step.

    Attributes:
        score: "low_confidence" (LLaDA's default; Dream's maskgit_plus), "margin" (Dream's topk_margin), "entropy", or "random".
        steps: Steps for each block, over which its masks are spread; None commits `tokens_per_step` instead. LLaDA's default is one step a
            token (128 steps for 128 tokens); half as many is its usual faster setting.
        tokens_per_step: Where `steps` is None.
        curve: How masks are spread over `steps`: "even" (LLaDA), "linear" or "cosine" (MaskGIT), "dream".

    Raises:
        ValueError: A value is out of range.
    """

    score: Score = "low_confidence"
    steps: int | None = None
    tokens_per_step: int = 1
    curve: Curve = "even"

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"steps must be a whole number of at least 1 or None, not {self.steps!r}")
        check_whole(1, tokens_per_step=self.tokens_per_step)
        if self.steps is not None and self.tokens_per_step != 1:
            raise ValueError(f"steps={self.steps} already says how many tokens a step commits; leave tokens_per_step at 1")
        if self.curve not in get_args(Curve):
            raise ValueError(f"curve must be one of {', '.join(get_args(Curve))}, not {self.curve!r}")

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin", lots=self.score == "random")

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {} if self.steps is None else {"total": torch.zeros(rows, dtype=torch.int64, device=device)}

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score = view.statistics.score(self.score)
        if self.steps is None:
            return top(score, view.candidates, self.tokens_per_step), memory
        total = torch.where(view.step == 0, view.left, memory["total"])
        count = quota(view.left, total, view.step, self.steps, self.curve)
        return top(score, view.candidates, count), {"total": total}
