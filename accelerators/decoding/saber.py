"""Saber (arXiv 2510.18165): commit what is surer than what was committed so far, and take back what has become doubtful since.

The threshold adapts: it is the mean confidence at which the tokens so far were committed, so that steps grow as the text takes shape. A few
of the committed tokens, those whose confidence fell most in the light of the new context, are masked again.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Decision, Memory, Parts, Revision, Rule, Schedule, View, merged

Signal = Literal["largest", "committed"]
"""Whose probability tells of doubt at a committed position: the most probable token's, or the committed token's own."""


@dataclass(frozen=True)
class Saber(Schedule):
    """Adaptive acceleration with backtracking. Published for code, in one block of 256.

    Attributes:
        n: Positions that commit at least; 2. Half of it is the least that is taken back.
        mu: One position is taken back for each `mu` committed, rounded up; 8.
        backtrack: Whether anything is taken back.
        signal: "largest" as released; "committed" is the better founded, as the largest probability at a position that shows its token says
            little about that token.
        rule: Another schedule in place of the adaptive threshold.

    Raises:
        ValueError: A value is out of range, or `rule` revises already.
    """

    n: int = 2
    mu: int = 8
    backtrack: bool = True
    signal: Signal = "largest"
    rule: Schedule | None = None

    def __post_init__(self) -> None:
        check_whole(1, n=self.n, mu=self.mu)
        if self.signal not in get_args(Signal):
            raise ValueError(f"signal must be one of {', '.join(get_args(Signal))}, not {self.signal!r}")
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        base = AdaptiveThreshold(self.n) if self.rule is None else self.rule
        return merged(base, revision=Backtrack(self.n, self.mu, self.signal)) if self.backtrack else base.parts


@dataclass(frozen=True)
class AdaptiveThreshold(Rule):
    """Commits what is above the mean confidence of the tokens that stand, at least the n best. While none stands, nothing is above.

    Memory: `confidence` [R, W] at which a position was committed, -inf where it was not.
    """

    n: int

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {"confidence": torch.full((rows, length), -torch.inf, device=device)}

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        score, confidence = view.statistics.score("low_confidence"), memory["confidence"]
        standing = view.active & ~view.candidates & confidence.isfinite()
        number = standing.sum(-1)
        mean = torch.where(number > 0, torch.where(standing, confidence, 0).sum(-1) / number.clamp(min=1), 1)
        commits = view.candidates & (score > mean[:, None]) | top(score, view.candidates, self.n)
        return commits, {"confidence": torch.where(commits, score, confidence)}


@dataclass(frozen=True)
class Backtrack(Revision):
    """Masks again the committed positions whose confidence fell most since the step before, fewer than were committed in this step.

    Where this step fills the block, nothing is taken back. Tokens of this very step are not taken back either: at them nothing was seen
    yet.

    Memory: `confidence` [R, W] of the step before.

    Attributes:
        n, mu, signal: As in `Saber`.
    """

    n: int
    mu: int
    signal: Signal

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {"confidence": torch.zeros(rows, length, device=device)}

    def revise(self, view: View, commits: Tensor, memory: Memory) -> tuple[Decision, Memory]:
        s = view.statistics
        confidence = s.p1 if self.signal == "largest" else torch.where(s.masked, s.p1, s.p_current)
        number = commits.sum(-1)
        settled = number == view.left
        count = (-(-number // self.mu)).clamp(min=self.n // 2)
        count = torch.where(settled, 0, torch.minimum(count, number - 1))
        remasks = top(memory["confidence"] - confidence, view.active & ~view.candidates, count)
        return Decision(s.tokens, commits, torch.zeros_like(commits), remasks, settled), {"confidence": confidence}
