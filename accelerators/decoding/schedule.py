"""The shape of a decoding schedule: logits' statistics and a state in, what to commit, edit and mask again out. Tensors only.

A schedule has up to three parts, one for each axis along which the methods differ: a transform rewrites the statistics (credit, averages
over the history), a rule chooses which masked positions commit (a quota, a threshold, a factor), a revision goes back on tokens that were
committed before (editing, remasking). Methods that stand on another schedule take it as an argument and are taken apart into these, in
any order of nesting; what does not go together is refused when it is put together.

Rows never see each other and nothing is read back to the host: no `.item()`, no `nonzero`, no loop over rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.decoding.statistics import Statistics

Memory = dict[str, Tensor]
"""What a part remembers of a row: tensors [R] or [R, W, ...], W aligned with the window whose statistics it sees."""


@dataclass(frozen=True)
class Needs:
    """What a schedule wants to be measured besides the statistics that are always there.

    Attributes:
        top: Length of the list of the most probable tokens.
        second: It reads p2.
        lots: It reads `uniform`.
        shadow: It reads `shadow`: the model must be run with a shadow block.
    """

    top: int = 0
    second: bool = False
    lots: bool = False
    shadow: bool = False

    def __or__(self, other: Needs) -> Needs:
        return Needs(max(self.top, other.top), self.second or other.second, self.lots or other.lots, self.shadow or other.shadow)


class Decision(NamedTuple):
    """What happens to each position, [R, W]; a position is in one of the three masks at most.

    Attributes:
        tokens: int64, what is written where `commits` or `edits` holds; never the mask.
        commits: bool, masked positions that get their token.
        edits: bool, positions whose token is replaced.
        remasks: bool, positions that are masked again.
        settled: bool [R], the active positions are final: a block that is settled is left.
    """

    tokens: Tensor
    commits: Tensor
    edits: Tensor
    remasks: Tensor
    settled: Tensor

    def apply(self, current: Tensor, mask_id: int) -> Tensor:
        """The tokens [R, W] after the decision."""
        return torch.where(self.commits | self.edits, self.tokens, current).masked_fill(self.remasks, mask_id)


class View(NamedTuple):
    """What a part sees in a step.

    Attributes:
        statistics: Of the window, as the model gave them or, after a transform, rewritten.
        active: bool [R, W], positions of the block that is being decoded: neither prompt nor padding.
        candidates: bool [R, W], the masked ones among them.
        step: int64 [R], steps of this block before this one.
    """

    statistics: Statistics
    active: Tensor
    candidates: Tensor
    step: Tensor

    @property
    def left(self) -> Tensor:
        """Masks in each row, int64 [R]."""
        return self.candidates.sum(-1)


@dataclass(frozen=True)
class State:
    """What is carried from step to step, row by row.

    Attributes:
        step: int64 [R], steps since the block began.
        transform, rule, revision: What these parts remember.
    """

    step: Tensor
    transform: Memory
    rule: Memory
    revision: Memory

    @property
    def width(self) -> int | None:
        """Positions of the window; None where nothing is remembered of positions."""
        return next((value.shape[1] for memory in self._memories for value in memory.values() if value.ndim > 1), None)

    def map(self, f: Callable[[Tensor], Tensor]) -> State:
        """The same with `f` of each tensor."""
        return State(f(self.step), *({name: f(value) for name, value in memory.items()} for memory in self._memories))

    def reindex(self, rows: Tensor) -> State:
        """The state of the given rows, int64 [n]: rows may be dropped, repeated or put in another order."""
        return self.map(lambda value: value.index_select(0, rows))

    def where(self, rows: Tensor, other: State) -> State:
        """This state where `rows`, bool [R], holds, the other one elsewhere."""

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *(1,) * (mine.ndim - 1)), mine, theirs)

        both = zip(self._memories, other._memories, strict=True)
        return State(pick(self.step, other.step), *({name: pick(mine[name], theirs[name]) for name in mine} for mine, theirs in both))

    @property
    def _memories(self) -> tuple[Memory, Memory, Memory]:
        return self.transform, self.rule, self.revision


class Part:
    """What the three kinds of parts have in common: what they need and what they remember."""

    @property
    def wants(self) -> Needs:
        """What must be measured for this part."""
        return Needs()

    def initial(self, rows: int, length: int, device: torch.device | None) -> Memory:
        """The memory at the beginning of a block."""
        return {}

    def asks(self, memory: Memory) -> Tensor | None:
        """Ids whose log-probability this part wants in the next step, int64 [R, W, J], -1 for none; J never changes."""
        return None


class Transform(Part, ABC):
    """Rewrites the statistics of masked positions before the rule sees them."""

    @abstractmethod
    def transform(self, view: View, memory: Memory) -> tuple[Statistics, Memory]:
        """The statistics in place of `view.statistics`, and the memory after this step."""


class Revision(Part, ABC):
    """Goes back on what was committed before."""

    @abstractmethod
    def revise(self, view: View, commits: Tensor, memory: Memory) -> tuple[Decision, Memory]:
        """The decision, given what the rule would commit.

        Over a block it must leave fewer masks after every step, or do so on the average as WINO does; and where nothing is masked it
        must settle after a bounded number of steps.
        """


@dataclass(frozen=True)
class Parts:
    """A schedule taken apart."""

    rule: Rule
    transform: Transform | None = None
    revision: Revision | None = None

    def __iter__(self) -> Iterator[Part]:
        return (part for part in (self.transform, self.rule, self.revision) if part is not None)


class Schedule(ABC):
    """Decides which tokens of a diffusion language model are committed at which step.

    For each forward of the model: `measure` with what `needs` and `probes` ask for, `select`, `Decision.apply`. At the start of a block
    `restart` the rows concerned. Instances are frozen and hold no state of their own.
    """

    @property
    @abstractmethod
    def parts(self) -> Parts:
        """What this schedule consists of.

        Raises:
            ValueError: The parts do not go together; the message says why.
        """

    @cached_property
    def needs(self) -> Needs:
        """What must be measured for this schedule."""
        found = Needs()
        for part in self.parts:
            found |= part.wants
        return found

    @property
    def revises(self) -> bool:
        """Whether tokens may change after they were committed."""
        return self.parts.revision is not None

    def init(self, rows: int, length: int, device: torch.device | str | None = None) -> State:
        """The state at the beginning of a block.

        Args:
            rows: R.
            length: W, positions of the window; at least the longest block.
            device: Where its tensors are.

        Raises:
            ValueError: A number is below 1.
        """
        if rows < 1 or length < 1:
            raise ValueError(f"rows and length must be at least 1, not {rows} and {length}")
        where = None if device is None else torch.device(device)
        parts = self.parts
        memories = ({} if part is None else part.initial(rows, length, where) for part in (parts.transform, parts.rule, parts.revision))
        return State(torch.zeros(rows, dtype=torch.int64, device=where), *memories)

    def probes(self, state: State) -> Tensor | None:
        """Ids whose log-probabilities the next `select` wants, int64 [R, W, J], or None."""
        wanted = [ids for ids in self._asked(state) if ids is not None]
        return torch.cat(wanted, -1) if wanted else None

    def restart(self, state: State, fresh: Tensor) -> State:
        """The state after the rows where `fresh`, bool [R], holds have entered a new block."""
        return self._blank(state).where(fresh, state)

    def rearrange(self, state: State, source: Tensor) -> State:
        """The state after positions of the window have moved.

        Args:
            source: int64 [R, W], for each position where it was before; -1 for a new one, which begins anew.
        """
        blank = self._blank(state)

        def moved(value: Tensor, initial: Tensor) -> Tensor:
            if value.ndim < 2:
                return value
            index = source.view(*source.shape, *(1,) * (value.ndim - 2)).expand_as(value)
            return torch.where(index < 0, initial, value.gather(1, index.clamp(min=0)))

        pairs = zip(state._memories, blank._memories, strict=True)
        return State(state.step, *({name: moved(value, initial[name]) for name, value in memory.items()} for memory, initial in pairs))

    def select(self, statistics: Statistics, state: State, active: Tensor | None = None) -> tuple[Decision, State]:
        """What happens in this step, and the state after it.

        Args:
            statistics: Of the window, measured with this schedule's `needs` and its `probes` of this state.
            state: Before this step.
            active: bool [R, W], the positions that may change; all of them unless told.

        Raises:
            ValueError: The statistics lack something that the schedule needs.
        """
        parts = self.parts
        self._check(statistics, state)
        if active is None:
            active = torch.ones_like(statistics.masked)
        view = View(statistics, active, statistics.masked & active, state.step)
        transform = state.transform
        if parts.transform is not None:
            mine, theirs = _split(statistics, self._asked(state)[0])
            rewritten, transform = parts.transform.transform(view._replace(statistics=mine), state.transform)
            view = view._replace(statistics=replace(rewritten, probe_log_p=theirs.probe_log_p, probe_noise=theirs.probe_noise))
        commits, rule = parts.rule.choose(view, state.rule)
        if parts.revision is None:
            none = torch.zeros_like(commits)
            decision = Decision(view.statistics.tokens, commits, none, none, ~(view.candidates & ~commits).any(-1))
            return decision, State(state.step + 1, transform, rule, state.revision)
        decision, revision = parts.revision.revise(view, commits, state.revision)
        after = State(state.step + 1, transform, rule, revision)
        return decision, self._forgotten(after, decision.edits | decision.remasks)

    def _blank(self, state: State) -> State:
        """A new state of the size of this one."""
        return self.init(len(state.step), state.width or 1, state.step.device)

    def _forgotten(self, state: State, positions: Tensor) -> State:
        """The state after transform and rule have forgotten the positions [R, W] whose tokens were revised.

        What was seen there belonged to another text: credit of a token that was taken back would soon commit it again.
        """
        blank = self._blank(state)

        def keep(value: Tensor, initial: Tensor) -> Tensor:
            return value if value.ndim < 2 else torch.where(positions.view(*positions.shape, *(1,) * (value.ndim - 2)), initial, value)

        transform = {name: keep(value, blank.transform[name]) for name, value in state.transform.items()}
        rule = {name: keep(value, blank.rule[name]) for name, value in state.rule.items()}
        return replace(state, transform=transform, rule=rule)

    def _asked(self, state: State) -> tuple[Tensor | None, Tensor | None]:
        """What the transform and the rule ask for."""
        parts = self.parts
        return None if parts.transform is None else parts.transform.asks(state.transform), parts.rule.asks(state.rule)

    def _check(self, statistics: Statistics, state: State) -> None:
        needs, name, shape = self.needs, type(self).__name__, statistics.masked.shape
        if len(state.step) != shape[0] or state.width not in (None, shape[1]):
            raise ValueError(
                f"the state of {name} is of {len(state.step)} rows and {state.width} positions, the statistics of {tuple(shape)}"
            )
        if needs.shadow and statistics.shadow is None:
            raise ValueError(f"{name} needs statistics of a shadow block: measure(shadow=...)")
        if needs.lots and statistics.uniform is None:
            raise ValueError(f"{name} ranks by lot: measure(lots=True)")
        have = 0 if statistics.top_ids is None else statistics.top_ids.shape[-1]
        if have < needs.top:
            raise ValueError(f"{name} needs the {needs.top} most probable tokens, and the statistics have {have}: measure(top=...)")
        wanted = sum(ids.shape[-1] for ids in self._asked(state) if ids is not None)
        have = 0 if statistics.probe_log_p is None else statistics.probe_log_p.shape[-1]
        if have != wanted:
            raise ValueError(f"{name} needs {wanted} probes a position, the statistics have {have}: measure(probes=schedule.probes(state))")


class Rule(Part, Schedule):
    """Chooses which masked positions commit; by itself a whole schedule."""

    @property
    def parts(self) -> Parts:
        return Parts(self)

    @abstractmethod
    def choose(self, view: View, memory: Memory) -> tuple[Tensor, Memory]:
        """bool [R, W], among the candidates, at least one in each row that has any; and the memory after this step."""


def _split(statistics: Statistics, first: Tensor | None) -> tuple[Statistics, Statistics]:
    """The statistics with the probes of the transform, which asked for `first`, and with those of the rule."""
    n = 0 if first is None else first.shape[-1]
    log_p, noise = statistics.probe_log_p, statistics.probe_noise
    if log_p is None:
        return statistics, statistics
    mine = replace(statistics, probe_log_p=log_p[..., :n], probe_noise=None if noise is None else noise[..., :n])
    return mine, replace(statistics, probe_log_p=log_p[..., n:], probe_noise=None if noise is None else noise[..., n:])


def merged(base: Schedule, *, transform: Transform | None = None, revision: Revision | None = None) -> Parts:
    """The parts of a schedule and one more of them.

    Raises:
        ValueError: The schedule has such a part already.
    """
    parts = base.parts
    if transform is not None and parts.transform is not None:
        raise ValueError(
            f"{_name(transform)} cannot stand on {_name(parts.transform)}: "
            "each rewrites the model's own distribution, and neither is defined on what the other makes of it"
        )
    if revision is not None and parts.revision is not None:
        raise ValueError(
            f"{_name(revision)} cannot stand on {_name(parts.revision)}: "
            "what one has just kept the other would take back, and neither could promise to end"
        )
    return Parts(parts.rule, transform or parts.transform, revision or parts.revision)


def _name(part: Part) -> str:
    return type(part).__name__
