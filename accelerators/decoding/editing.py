"""Token editing (LLaDA2.1, arXiv 2602.08676): tokens that the model has come to see otherwise are replaced, while the block is open.

Committed tokens whose position now predicts another one with enough confidence are overwritten in the same step in which masks are filled.
Once the block is full it is looked over again until a step changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.schedule import Decision, Memory, Parts, Revision, Schedule, View, merged
from hasten.accelerators.decoding.threshold import ThresholdDecoding


@dataclass(frozen=True)
class TokenEditing(Schedule):
    """Editing on top of a rule.

    Attributes:
        threshold: Confidence above which a token is replaced: 0.5, as in diffusers' LLaDA2Pipeline, whose documentation pairs it with a
            filling threshold of 0.7. None edits nothing and is the rule alone.
        rule: Fills the masks; `ThresholdDecoding(0.7)` unless told.
        max_post_steps: Steps after the block is full, at most; 16. The first that edits nothing is the last. (diffusers takes one more.)

    Raises:
        ValueError: A value is out of range, or `rule` revises already.
    """

    threshold: float | None = 0.5
    rule: Schedule = field(default_factory=lambda: ThresholdDecoding(0.7))
    max_post_steps: int = 16

    def __post_init__(self) -> None:
        if self.threshold is not None and not self.threshold >= 0:
            raise ValueError(f"threshold must be a number of at least 0 or None, not {self.threshold!r}")
        check_whole(0, max_post_steps=self.max_post_steps)
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        return self.rule.parts if self.threshold is None else merged(self.rule, revision=Edit(self.threshold, self.max_post_steps))


@dataclass(frozen=True)
class Edit(Revision):
    """Replaces tokens. Memory: `posts` [R], steps since the block was full."""

    threshold: float
    max_post_steps: int

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        return {"posts": torch.zeros(rows, dtype=torch.int64, device=device)}

    def revise(self, view: View, commits: Tensor, memory: Memory) -> tuple[Decision, Memory]:
        s = view.statistics
        edits = view.active & ~view.candidates & (s.tokens != s.current) & (s.p > self.threshold)
        was_full = view.left == 0
        full = commits.sum(-1) == view.left
        posts = torch.where(was_full, memory["posts"] + 1, 0)
        settled = full & (was_full & ~edits.any(-1) | (posts >= self.max_post_steps))
        return Decision(s.tokens, commits, edits, torch.zeros_like(edits), settled), {"posts": posts}
