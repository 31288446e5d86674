"""What the decoding tests share: every schedule by name, a model whose logits are exact, episodes by lot, a probe for synchronisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hasten.accelerators.decoding.ccd import CCD
from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.entropy_bound import EntropyBoundDecoding
from hasten.accelerators.decoding.factor import FactorDecoding
from hasten.accelerators.decoding.hierarchical import HierarchicalDecoding
from hasten.accelerators.decoding.klass import KLASS
from hasten.accelerators.decoding.noise import Key
from hasten.accelerators.decoding.rcr import RCR
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.schedule import Decision, Schedule, State
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling, Statistics, measure
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO

VOCABULARY, MASK, EOS = 12, 11, 10
SAMPLING = Sampling(MASK)

STEADY: dict[str, Schedule] = {
    "static": StaticDecoding(),
    "static-3-steps": StaticDecoding(steps=3),
    "margin-cosine": StaticDecoding("margin", steps=5, curve="cosine"),
    "entropy-dream": StaticDecoding("entropy", steps=5, curve="dream"),
    "random": StaticDecoding("random", tokens_per_step=2),
    "threshold": ThresholdDecoding(0.4),
    "threshold-margin": ThresholdDecoding(0.3, minimum=2, score="margin"),
    "factor": FactorDecoding(1.2),
    "hierarchical": HierarchicalDecoding(0.2, 0.5),
    "entropy-bound": EntropyBoundDecoding(1.5),
    "klass": KLASS(threshold=0.3, divergence=0.3, window=1),
    "ccd": CCD(history=3, tokens_per_step=2),
    "ccd-ds": CCD(history=2, dynamic=True, bound=2.0),
    "ccd-threshold": CCD(rule=ThresholdDecoding(0.4)),
    "credit": CreditDecoding(0.5),
    "credit-margin": CreditDecoding(rule=StaticDecoding("margin", tokens_per_step=2)),
    "credit-entropy-bound": CreditDecoding(rule=EntropyBoundDecoding(1.0)),
    "credit-klass": CreditDecoding(rule=KLASS(threshold=0.3, divergence=0.3, window=1)),
    "saber-without-backtracking": Saber(backtrack=False),
}
"""Schedules that leave tokens as they are."""

REVISING: dict[str, Schedule] = {
    "saber": Saber(n=3, mu=2),
    "saber-committed": Saber(signal="committed"),
    "saber-credit-threshold": Saber(rule=CreditDecoding(0.4)),
    "rcr": RCR(rule=StaticDecoding(tokens_per_step=2)),
    "rcr-margin": RCR(score="margin", rule=ThresholdDecoding(0.4)),
    "wino": WINO(0.3, 0.6),
    "wino-ccd": WINO(0.3, 0.6, rule=CCD(tokens_per_step=3)),
    "editing": TokenEditing(0.3, ThresholdDecoding(0.4), max_post_steps=3),
    "editing-credit": CreditDecoding(rule=TokenEditing(0.3, FactorDecoding())),
    "editing-klass": TokenEditing(0.3, KLASS(threshold=0.3, divergence=0.3, window=1)),
}
"""Schedules that may change tokens after they were committed."""

SCHEDULES = STEADY | REVISING


@dataclass
class Model:
    """Logits that are sums of small whole numbers over eight: exact in float32 in whatever order they are added, so full of ties.

    A position gets an entry of a table for each token that it sees, by the token and its distance, and one for its own distance from the
    row's first token, so that left padding does not matter. `sharpness` scales the logits.
    """

    seed: int = 0
    reach: int = 4
    sharpness: float = 1.0
    forwards: int = 0

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.table = torch.randint(-6, 7, (VOCABULARY, 2 * self.reach + 1, VOCABULARY), generator=generator).float()
        self.place = torch.randint(-12, 13, (512, VOCABULARY), generator=generator).float()
        self.table[MASK] *= 0.5

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor, blind: bool = False) -> Tensor:
        self.forwards += 1
        offset = torch.arange(-self.reach, self.reach + 1)
        seen = columns[..., None] + offset
        inside = (seen >= 0) & (seen < tokens.shape[1])
        seen = seen.clamp(0, tokens.shape[1] - 1).flatten(1)
        token = tokens.gather(1, seen).view_as(inside)
        if blind:
            token = token.masked_fill(offset == 0, MASK)
        visible = (inside & valid.gather(1, seen).view_as(inside))[..., None]
        logits = self.place[columns - valid.int().argmax(-1, keepdim=True)]
        logits = logits + torch.where(visible, self.table[token, offset + self.reach], 0).sum(-2)
        return logits * self.sharpness / 8

    def shadow(self, tokens: Tensor, valid: Tensor, columns: Tensor) -> Tensor:
        """The same where every column of the window is blind to its own token."""
        return self(tokens, valid, columns, blind=True)


def drawn(generator: torch.Generator, rows: int, width: int, coarse: bool = True) -> Tensor:
    """Logits [rows, width, VOCABULARY] by lot; coarse ones have ties, between tokens and between positions."""
    if coarse:
        few = torch.randint(-3, 4, (4, VOCABULARY), generator=generator).float()
        return few[torch.randint(0, 4, (rows, width), generator=generator)]
    return 2.5 * torch.randn(rows, width, VOCABULARY, generator=generator)


def measured(schedule: Schedule, state: State, logits: Tensor, current: Tensor, shadow: Tensor, key: Key, sampling: Sampling) -> Statistics:
    """The statistics that a schedule asks for."""
    needs = schedule.needs
    return measure(
        logits,
        current,
        sampling,
        key=key,
        probes=schedule.probes(state),
        top=needs.top,
        lots=needs.lots,
        shadow=shadow if needs.shadow else None,
    )


@dataclass
class Episode:
    """A block that is decoded on logits by lot: nothing that is committed has any influence on what comes.

    Attributes:
        current: [R, W], tokens before the first step: masks, and some others where `active` does not hold.
        active: [R, W].
        logits, shadows: One tensor [R, W, VOCABULARY] for each step.
    """

    current: Tensor
    active: Tensor
    logits: list[Tensor]
    shadows: list[Tensor]
    key: Key

    @staticmethod
    def of(seed: int, rows: int = 3, width: int = 8, steps: int = 24, coarse: bool = True, alike: float = 0.0) -> Episode:
        """An episode by lot. `alike` makes the logits of consecutive steps similar: 0 not at all, 1 the same."""
        generator = torch.Generator().manual_seed(seed)
        active = torch.rand(rows, width, generator=generator) < 0.85
        prompt = torch.randint(0, EOS, (rows, width), generator=generator)
        logits = [drawn(generator, rows, width, coarse)]
        for _ in range(steps - 1):
            logits.append(alike * logits[-1] + (1 - alike) * drawn(generator, rows, width, coarse))
        shadows = [drawn(generator, rows, width, coarse) for _ in range(steps)]
        key = Key(torch.arange(rows) + seed, torch.arange(width), torch.zeros(rows, dtype=torch.int64))
        return Episode(torch.where(active, MASK, prompt), active, logits, shadows, key)

    def rows(self, rows: Tensor) -> Episode:
        """Some rows of it."""
        key = Key(self.key.seeds[rows], self.key.positions, self.key.steps[rows])
        return Episode(self.current[rows], self.active[rows], [z[rows] for z in self.logits], [z[rows] for z in self.shadows], key)

    def run(self, schedule: Schedule, sampling: Sampling = SAMPLING) -> list[tuple[Statistics, Decision, Tensor]]:
        """Statistics, decision and the tokens before it, step by step, until every row is settled."""
        state = schedule.init(*self.current.shape)
        current, trace = self.current, []
        for step, (logits, shadow) in enumerate(zip(self.logits, self.shadows, strict=True)):
            statistics = measured(schedule, state, logits, current, shadow, self.key._replace(steps=self.key.steps + step), sampling)
            decision, state = schedule.select(statistics, state, self.active)
            trace.append((statistics, decision, current))
            current = decision.apply(current, MASK)
            if decision.settled.all():
                break
        return trace


class Synchronised(AssertionError):
    """Something was read back to the host."""


class NoSync(TorchDispatchMode):
    """Refuses every operation that would make a GPU wait for the host, or have a size that depends on values."""

    REFUSED = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "repeat_interleave.Tensor", "bincount")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if any(name.startswith(f"aten.{refused}") for refused in self.REFUSED):
            raise Synchronised(name)
        if name.startswith(("aten.index.", "aten.index_put")) and any(t is not None and t.dtype == torch.bool for t in args[1]):
            raise Synchronised(f"{name} with a mask")
        return func(*args, **(kwargs or {}))
