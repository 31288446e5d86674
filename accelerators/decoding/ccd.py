"""CCD, Coherent Contextual Decoding (arXiv 2512.02044): a position is judged by what it predicted in the last steps, not in this one alone.

The distributions of the last steps are averaged. The entropy of the average is the mean entropy plus how much the distributions disagree,
so that a position whose prediction wavers with its context waits. CCD-DS also commits, at once, all positions that have been coherent long
enough.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.schedule import Memory, Needs, Parts, Rule, Schedule, Transform, View, merged
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Statistics


@dataclass(frozen=True)
class CCD(Schedule):
    """Averages over the history in front of a rule.

    This is the paper's formulation. The released code has a simpler check, on how the best positions of consecutive steps overlap, instead.
    The paper buffers the distributions of a few positions; here every position has a history, of its most probable tokens.

    Attributes:
        history: Steps that are averaged, this one included: 2 for LLaDA, 3 for Dream.
        tokens_per_step: u, the positions that commit in a step: generated tokens over steps.
        dynamic: CCD-DS.
        positions: V, the places of the buffer that CCD-DS looks at: 4.
        bound: Largest entropy, in nats, of what CCD-DS commits beyond u. The paper's value is not known to us; 0.1 is ours.
        support: Most probable tokens that are kept for each position and step; 32 is ours. The average is exact if they are the vocabulary.
        rule: Another schedule that sees the averaged distribution, in place of the u positions of least entropy.

    Raises:
        ValueError: A value is out of range, `dynamic` comes with a rule, or `rule` rewrites the distribution already.
    """

    history: int = 2
    tokens_per_step: int = 1
    dynamic: bool = False
    positions: int = 4
    bound: float = 0.1
    support: int = 32
    rule: Schedule | None = None

    def __post_init__(self) -> None:
        check_whole(1, history=self.history, tokens_per_step=self.tokens_per_step, positions=self.positions)
        check_whole(2, support=self.support)
        check_not_negative(bound=self.bound)
        if self.dynamic and self.rule is not None:
            raise ValueError("dynamic=True is a rule of its own: leave it False, or rule at None")
        _ = self.parts

    @cached_property
    def parts(self) -> Parts:
        base = self.rule
        if base is None and self.dynamic:
            base = CoherentBuffer(self.history, self.tokens_per_step, self.positions, self.bound)
        elif base is None:
            base = StaticDecoding(score="entropy", tokens_per_step=self.tokens_per_step)
        return merged(base, transform=HistoryAverage(self.history, self.support))


@dataclass(frozen=True)
class HistoryAverage(Transform):
    """The mean distribution of the last steps. Memory: `ids` and `p` [R, W, history - 1, support], the newest first; -1 where none.

    Sampled tokens (temperature above 0) stay those of this step.

    Attributes:
        history, support: As in `CCD`.
    """

    history: int
    support: int

    @property
    def wants(self) -> Needs:
        return Needs(top=self.support)

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        shape = (rows, length, self.history - 1, self.support)
        return {"ids": torch.full(shape, -1, dtype=torch.int64, device=device), "p": torch.zeros(shape, device=device)}

    def asks(self, memory: Memory) -> Tensor:
        return memory["ids"].flatten(2)

    def transform(self, view: View, memory: Memory) -> tuple[Statistics, Memory]:
        s = view.statistics
        assert s.probe_log_p is not None and s.top_ids is not None and s.top_log_p is not None  # `asks` and `wants`
        now_ids, now_p = s.top_ids[..., : self.support], s.top_log_p[..., : self.support].exp()
        past = memory["ids"].flatten(2)
        ids = torch.cat([now_ids, past], -1)  # [R, W, N]
        steps = 1 + (memory["ids"] >= 0).any(-1).sum(-1)  # [R, W]
        same = ids[..., :, None] == ids[..., None, :]
        first = ids >= 0
        first &= ~(same & torch.ones_like(same).tril(-1)).any(-1)
        before = (same[..., now_ids.shape[-1] :] * memory["p"].flatten(2)[..., None, :]).sum(-1)
        p = (torch.cat([now_p, s.probe_log_p.exp()], -1) + before) / steps[..., None]
        p = p.masked_fill(~first, 0)
        rest = (1 - p.sum(-1)).clamp(min=0)
        entropy = -(torch.xlogy(p, p).sum(-1) + torch.xlogy(rest, rest))
        p1 = p.amax(-1)
        best = torch.where(first & (p == p1[..., None]), ids, torch.iinfo(ids.dtype).max).amin(-1)
        found = {"best": best, "log_p1": p1.log(), "p2": p.masked_fill(ids == best[..., None], 0).amax(-1), "entropy": entropy}
        if s.token_noise is None:
            found |= {"tokens": best, "log_p": p1.log()}
        else:
            found["log_p"] = torch.where(ids == s.tokens[..., None], p, 0).amax(-1).log()
        # Without a history the statistics themselves are the average, and are not cut off at the support.
        apply = view.candidates & (steps > 1)
        rewritten = replace(s, **{name: torch.where(apply, value, getattr(s, name)) for name, value in found.items()})
        kept = {"ids": (now_ids, memory["ids"]), "p": (now_p, memory["p"])}
        return rewritten, {name: torch.cat([new[..., None, :], old], 2)[..., : self.history - 1, :] for name, (new, old) in kept.items()}


@dataclass(frozen=True)
class CoherentBuffer(Rule):
    """CCD-DS: commits all that stayed in the buffer for `history` steps with one best token and little entropy; if none did, the best u.

    Memory: `token` [R, W], the best token of the step before, and `streak` [R, W], steps in the buffer with that token.

    Attributes:
        history, tokens_per_step, positions, bound: As in `CCD`.
    """

    history: int
    tokens_per_step: int
    positions: int
    bound: float

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        shape = (rows, length)
        return {
            "token": torch.full(shape, -1, dtype=torch.int64, device=device),
            "streak": torch.zeros(shape, dtype=torch.int64, device=device),
        }

    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        s = view.statistics
        score = s.score("entropy")
        inside = top(score, view.candidates, self.positions)
        streak = torch.where(inside, torch.where(s.best == memory["token"], memory["streak"], 0) + 1, 0)
        coherent = view.candidates & (streak >= self.history) & (s.entropy < self.bound)
        fallback = top(score, view.candidates, self.tokens_per_step) & ~coherent.any(-1, keepdim=True)
        return coherent | fallback, {"token": s.best, "streak": streak}
