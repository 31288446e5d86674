"""KLASS (arXiv 2511.05664): a position commits once its distribution has stopped moving and is sure of its token.

The distance of a position's distribution from the one a step before is their Kullback-Leibler divergence. Where it was small for some steps
in a row and the confidence is high, the position commits; where there is none such, the most confident ones do.

The published code keeps whole distributions in float64, hundreds of megabytes for each row. Here only the most probable tokens are kept,
and everything else counts as one token more: that divergence is at most the true one, and equal to it if the list holds the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Memory, Needs, Rule, View

_LEAST = 1e-12  # of the mass outside the list, which is a difference of numbers near 1


@dataclass(frozen=True)
class KLASS(Rule):
    """Commits stable and confident positions. Stability is that of the model's own distribution, whatever a transform makes of it.

    Memory: `ids` and `log_p` [R, W, support] of the step before, `stable` [R, W], steps for which the divergence was small.

    Attributes:
        threshold: Least confidence; 0.9 is typical.
        divergence: Largest divergence of a stable position, in nats; 0.01.
        window: Steps in a row for which it must be so; 2. A block's first step has nothing to compare with.
        minimum: Positions that commit where none is stable and confident; 1.
        support: Most probable tokens that are kept for each position; 64 is ours.

    Raises:
        ValueError: A value is out of range.
    """

    threshold: float = 0.9
    divergence: float = 0.01
    window: int = 2
    minimum: int = 1
    support: int = 64

    def __post_init__(self) -> None:
        check_not_negative(threshold=self.threshold, divergence=self.divergence)
        check_whole(1, window=self.window, minimum=self.minimum, support=self.support)

    @property
    def wants(self) -> Needs:
        return Needs(top=self.support)

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        shape = (rows, length, self.support)
        return {
            "ids": torch.full(shape, -1, dtype=torch.int64, device=device),
            "log_p": torch.full(shape, -torch.inf, device=device),
            "stable": torch.zeros(shape[:2], dtype=torch.int64, device=device),
        }

    def asks(self, memory: Memory) -> Tensor:
        return memory["ids"]

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        s = view.statistics
        assert s.probe_log_p is not None and s.top_ids is not None and s.top_log_p is not None  # `asks` and `wants`
        seen = (memory["ids"] >= 0).any(-1)
        small = seen & (divergence(s.probe_log_p, memory["log_p"]) < self.divergence)
        stable = torch.where(small, memory["stable"] + 1, 0)
        score = s.score("low_confidence")
        ready = view.candidates & (stable >= self.window) & (score >= self.threshold)
        fallback = top(score, view.candidates, self.minimum) & ~ready.any(-1, keepdim=True)
        memory = {"ids": s.top_ids[..., : self.support], "log_p": s.top_log_p[..., : self.support], "stable": stable}
        return ready | fallback, memory


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) [...] of two distributions whose log-probabilities [..., K] are known for the same K tokens; the others count as one."""
    p, q = log_p.exp(), log_q.exp()
    listed = torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)
    p_rest, q_rest = ((1 - mass.sum(-1)).clamp(min=_LEAST) for mass in (p, q))
    # Between equals rounding leaves a little on either side of 0.
    return (listed + p_rest * (p_rest / q_rest).log()).clamp(min=0)
