"""CreditDecoding (arXiv 2510.06133): a prediction that persists from step to step gathers credit, which raises its probability.

Credit of a token is a decaying sum of p^gamma over the steps in which it was the most probable one; the logits become
z + alpha ln(1 + credit), and any rule is applied to what they say.

Only tokens that were once the most probable have credit, a handful for each position, and all other logits stay as they are. So the new
distribution follows exactly from the old log-probabilities of that handful: no buffer of the size of the vocabulary is kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.schedule import Memory, Needs, Parts, Schedule, Transform, View, merged
from hasten.accelerators.decoding.statistics import Statistics
from hasten.accelerators.decoding.threshold import ThresholdDecoding

_LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class CreditDecoding(Schedule):
    """Credit in front of a rule.

    It commits persistently predicted tokens sooner, the wrong ones too: where many answers are right it changes which of them wins.

    Attributes:
        threshold: Of the threshold rule that is used where `rule` is None; 0.9, as in Fast-dLLM.
        alpha: Weight of the credit, 0.7 in the paper's code; 0 is the rule alone. Lower it where a cache holds keys and values for long.
        beta: What is left of the credit after a step, 0.8.
        gamma: Power of the probability, 0.2: weak predictions gain almost as much as strong ones.
        slots: Credited tokens for each position. Exact while a position has had no more different best tokens in its block; beyond that the
            least credit is dropped. 8 is ours.
        rule: The schedule that sees the credited distribution.

    Raises:
        ValueError: A value is out of range, or `rule` rewrites the distribution already.
    """

    threshold: float = 0.9
    alpha: float = 0.7
    beta: float = 0.8
    gamma: float = 0.2
    slots: int = 8
    rule: Schedule | None = None

    def __post_init__(self) -> None:
        for name, most in (("alpha", float("inf")), ("beta", 1.0), ("gamma", float("inf"))):
            value = getattr(self, name)
            if not 0 <= value <= most or value == float("inf"):
                raise ValueError(f"{name} must be a number from 0{'' if most == float('inf') else f' to {most:g}'}, not {value!r}")
        check_whole(1, slots=self.slots)
        _ = self.parts  # refuses what does not go together

    @cached_property
    def parts(self) -> Parts:
        base = ThresholdDecoding(self.threshold) if self.rule is None else self.rule
        return merged(base, transform=Credit(self.alpha, self.beta, self.gamma, self.slots, second=base.needs.second))


@dataclass(frozen=True)
class Credit(Transform):
    """The distribution with credit. Memory: `ids` [R, W, slots], -1 where empty, and their `credit`.

    Attributes:
        alpha, beta, gamma, slots: As in `CreditDecoding`.
        second: Whether the second largest probability is wanted too. It may belong to a token without credit, so that more of the most
            probable tokens must be known than can have credit.
    """

    alpha: float
    beta: float
    gamma: float
    slots: int
    second: bool = False

    @property
    def wants(self) -> Needs:
        return Needs(top=self.slots + 1 if self.second else 0)

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        shape = (rows, length, self.slots)
        return {"ids": torch.full(shape, -1, dtype=torch.int64, device=device), "credit": torch.zeros(shape, device=device)}

    def asks(self, memory: Memory) -> Tensor:
        return memory["ids"]

    def transform(self, view: View, memory: Memory) -> tuple[Statistics, Memory]:
        s = view.statistics
        assert s.probe_log_p is not None  # `asks`
        ids, credit, new = self._credited(s, memory)
        log_p = torch.where(new, s.log_p1[..., None], s.probe_log_p)
        gain = self.alpha * credit.log1p()
        p = log_p.exp()
        total = 1 + (p * gain.expm1()).sum(-1)
        log_total = (p * gain.expm1()).sum(-1).log1p()
        credited = log_p + gain - log_total[..., None]
        largest = credited.amax(-1)
        best = torch.where(credited == largest[..., None], ids, torch.iinfo(ids.dtype).max).amin(-1)
        # p' = p g / total with g = exp(gain), and g = 1 for all that have no credit.
        surprise = (p * (gain.expm1() * log_p.clamp(min=_LOWEST) + gain.exp() * gain)).sum(-1)
        entropy = (log_total + (s.entropy - surprise) / total).clamp(min=0)
        tokens, token_log_p = best, largest
        if s.token_noise is not None and s.best_noise is not None and s.probe_noise is not None:
            # Noise belongs to tokens: the sample is where new log-probability and noise are largest, and without credit that is as before.
            noisy = credited + torch.where(new, s.best_noise[..., None], s.probe_noise)
            value, slot = noisy.max(-1, keepdim=True)
            taken = value[..., 0] >= s.log_p + s.token_noise - log_total
            tokens = torch.where(taken, ids.gather(-1, slot)[..., 0], s.tokens)
            token_log_p = torch.where(taken, credited.gather(-1, slot)[..., 0], s.log_p - log_total)
        found = {"tokens": tokens, "log_p": token_log_p, "best": best, "log_p1": largest, "entropy": entropy}
        if self.second and s.top_ids is not None and s.top_log_p is not None:
            without = ~(s.top_ids[..., None] == ids[..., None, :]).any(-1)
            rest = torch.where(without, s.top_log_p, -torch.inf).amax(-1) - log_total
            found["p2"] = torch.maximum(credited.masked_fill(ids == best[..., None], -torch.inf).amax(-1), rest).exp()
        rewritten = replace(s, **{name: torch.where(view.candidates, value, getattr(s, name)) for name, value in found.items()})
        return rewritten, {"ids": ids, "credit": credit}

    def _credited(self, s: Statistics, memory: Memory) -> tuple[Tensor, Tensor, Tensor]:
        """Ids and credit after this step, and which slot is that of the most probable token, all [R, W, slots]."""
        ids, credit = memory["ids"], self.beta * memory["credit"]
        known = ids == s.best[..., None]
        had = known.any(-1)
        # An empty slot has no credit, so it is taken before any other.
        slot = torch.where(had, known.int().argmax(-1), credit.argmin(-1))
        new = slot[..., None] == torch.arange(self.slots, device=slot.device)
        credit = torch.where(new, torch.where(known, credit, 0) + (self.gamma * s.log_p1).exp()[..., None], credit)
        return torch.where(new, s.best[..., None], ids), credit, new
