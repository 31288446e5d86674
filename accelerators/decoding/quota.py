"""How many positions a step commits, and which: quotas and top-k selection with another k in every row, without a host synchronisation."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Curve = Literal["even", "linear", "cosine", "dream"]
"""How the masks of a block are spread over its steps.

even: LLaDA's, floor(N / S) a step and one more in the first N mod S. linear, cosine: MaskGIT's ceil(N (1 - r)) and ceil(N cos(pi r / 2))
masks are left after a share r of the steps. dream: Dream's floor(n (1 - t' / t)) of the n masks still there, with t running evenly from 1
to 0.001, and all of them in the last step.
"""

_LOWEST = torch.finfo(torch.float32).min
_DREAM_EPS = 1e-3
_ROUNDING = 1e-3  # float32 puts 31.000002 where 31 is meant, and its ceiling would be one too many


def rank(score: Tensor, eligible: Tensor) -> Tensor:
    """Place of each position among the eligible of its row, int64 [R, W]: 0 for the highest score, ties to the left, the others last."""
    key = torch.where(eligible, score.nan_to_num(nan=_LOWEST, neginf=_LOWEST), -torch.inf)
    order = key.sort(dim=-1, descending=True, stable=True).indices
    return torch.empty_like(order).scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))


def top(score: Tensor, eligible: Tensor, count: Tensor | int) -> Tensor:
    """The `count` eligible positions of highest score, bool [R, W]; all of them where there are fewer.

    Args:
        score: [R, W].
        eligible: bool [R, W].
        count: One number for all rows, or int64 [R].
    """
    limit = count[:, None] if isinstance(count, Tensor) else count
    return eligible & (rank(score, eligible) < limit)


def quota(left: Tensor, total: Tensor, step: Tensor, steps: int, curve: Curve = "even") -> Tensor:
    """Positions to commit in this step, int64 [R]: at least 1, so that a row always ends, and all that is left in the last step.

    What other rules committed before is made up for: the quota is what is missing to the number that should be done after this step.

    Args:
        left: int64 [R] masks that are there now.
        total: int64 [R] masks at the first step.
        step: int64 [R], from 0.
        steps: Steps in all.
        curve: How they are spread.
    """
    done = (step + 1).clamp(max=steps)
    if curve == "even":
        after = total - done * (total // steps) - torch.minimum(done, total % steps)
    elif curve == "dream":
        t, t_next = 1 - (1 - _DREAM_EPS) * step / steps, 1 - (1 - _DREAM_EPS) * done / steps
        after = left - (left * (1 - t_next / t) + _ROUNDING).floor().long()
    else:
        r = done / steps
        after = (total * (1 - r if curve == "linear" else (math.pi / 2 * r).cos()) - _ROUNDING).ceil().long()
    return torch.where(step + 1 < steps, left - after, left).clamp(min=1)
