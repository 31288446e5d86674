"""WINO, Wide-In, Narrow-Out (arXiv 2507.18578): drafts tokens at a low threshold and keeps those that bear a second look at a high one.

The second look comes from a shadow block: further mask tokens in the places of the block, each of which sees everything but the token in
its own place. Its probability of that token is what the model thinks of it when it cannot simply read it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Decision, Memory, Needs, Parts, Revision, Rule, Schedule, View, merged


@dataclass(frozen=True)
class WINO(Schedule):
    """Wide in, narrow out. The model must be run with a shadow block, whose logits go to `measure(shadow=...)`.

    Attributes:
        wide: Threshold for drafting; 0.6 to 0.7 in the published code.
        narrow: Threshold below which a committed token is masked again; 0.9.
        rule: Another schedule in place of the wide threshold.

    Raises:
        ValueError: A value is out of range, or `rule` revises already.
    """

    wide: float = 0.6
    narrow: float = 0.9
    rule: Schedule | None = None

    def __post_init__(self) -> None:
        check_not_negative(wide=self.wide, narrow=self.narrow)
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        return merged(WideIn(self.wide) if self.rule is None else self.rule, revision=NarrowOut(self.narrow))


@dataclass(frozen=True)
class WideIn(Rule):
    """Commits what is above the threshold, at most max(5, min(20, 0.7 of the masks)), at least the best position."""

    threshold: float

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score = view.statistics.score("low_confidence")
        most = (view.left * 7 // 10).clamp(5, 20)
        return top(score, view.candidates & (score > self.threshold), most) | top(score, view.candidates, 1), memory


@dataclass(frozen=True)
class NarrowOut(Revision):
    """Masks doubtful tokens again, fewer than were committed in the step before, and only where this step commits more than one.

    A step may take back more than it commits, but a block of W masks is filled after W steps: all that was ever taken back is less, by one
    for each step, than what had been committed.

    Memory: `accepted` [R], positions that were committed in the step before.
    """

    threshold: float

    @property
    def wants(self) -> Needs:
        return Needs(shadow=True)

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {"accepted": torch.ones(rows, dtype=torch.int64, device=device)}

    def revise(self, view: View, commits: Tensor, memory: Memory) -> tuple[Decision, Memory]:
        s = view.statistics
        assert s.shadow is not None  # `wants`
        accepted = commits.sum(-1)
        # What is not a number is no reason to trust a token.
        doubtful = view.active & ~view.candidates & ~(s.shadow >= self.threshold)
        count = torch.where(accepted > 1, memory["accepted"] - 1, 0)
        remasks = top(-s.shadow.nan_to_num(nan=-1.0), doubtful, count)
        settled = (accepted == view.left) & ~remasks.any(-1)
        return Decision(s.tokens, commits, torch.zeros_like(commits), remasks, settled), {"accepted": accepted}
