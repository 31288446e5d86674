"""RCR, running-confidence remasking (MDPO, arXiv 2508.13148): how many tokens stand follows the schedule, which ones is open to the end.

In each step everything that is masked would be filled; of all tokens of the block, those with the highest confidence at the time they were
filled stay. A token that was kept early with little confidence can so be displaced by a later, surer one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Decision, Memory, Needs, Parts, Revision, Schedule, View, merged
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Score, check_score


@dataclass(frozen=True)
class RCR(Schedule):
    """Remasking by running confidence, within the block that is being decoded.

    The published form may open tokens of earlier blocks again, which no cache of a prefix survives; that form is not offered.

    Attributes:
        score: Confidence that is remembered: "low_confidence", "margin" or "entropy".
        rule: Says how many positions commit in a step; which ones is RCR's. A quota in the paper; one token a step unless told.

    Raises:
        ValueError: A value is out of range, or `rule` revises already.
    """

    score: Score = "low_confidence"
    rule: Schedule = field(default_factory=StaticDecoding)

    def __post_init__(self) -> None:
        check_score(self.score)
        if self.score == "random":
            raise ValueError("score='random' remembers nothing about a token; use low_confidence, margin or entropy")
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        return merged(self.rule, revision=RunningConfidence(self.score))


@dataclass(frozen=True)
class RunningConfidence(Revision):
    """Keeps the most confident tokens of the block, as many as there were and the rule adds.

    Memory: `confidence` [R, W] at which the present token was filled in; +inf where that was not seen.
    """

    score: Score

    @property
    def wants(self) -> Needs:
        return Needs(second=self.score == "margin")

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {"confidence": torch.full((rows, length), torch.inf, device=device)}

    def revise(self, view: View, commits: Tensor, memory: Memory) -> tuple[Decision, Memory]:
        candidates, standing = view.candidates, view.active & ~view.candidates
        confidence = torch.where(candidates, view.statistics.score(self.score), memory["confidence"])
        kept = top(confidence, view.active, standing.sum(-1) + commits.sum(-1))
        decision = Decision(
            tokens=view.statistics.tokens,
            commits=candidates & kept,
            edits=torch.zeros_like(kept),
            remasks=standing & ~kept,
            settled=(kept | ~view.active).all(-1),
        )
        return decision, {"confidence": confidence}
