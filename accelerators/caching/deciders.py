"""Carries out methods that look at activations before they decide: for every row of the batch by itself.

The first blocks run (or only the start of the first), the decider says which rows may reuse the offset of the blocks behind, and only the
other rows are computed: a sample's decision and result never depend on its batch-mates. Every decision is recorded, so that a run can be
replayed as a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor, nn

from hasten.accelerators.caching.ahead import Ahead, sent
from hasten.accelerators.caching.forward import CHANGED, Collector, Finite, Given, Recompute, Spare, argument, pass_on
from hasten.accelerators.caching.offsets import add_offsets
from hasten.accelerators.caching.plan import Action, Plan, PlanError
from hasten.accelerators.caching.segments import Span, breaks_of
from hasten.accelerators.caching.state import AS_IS, Kept, Packer, moved, probe, read
from hasten.accelerators.caching.trace import Block, Stream, Trace
from hasten.accelerators.dispatch import Call, Handler, intercept
from hasten.accelerators.fusing import fuses
from hasten.kernels import ops

Memory = dict[str, Tensor]
"""What a decider keeps between the steps of a branch: tensors whose first dimension is the batch."""


@runtime_checkable
class Decider(Protocol):
    """Says per row whether the blocks of the tail are reused.

    Attributes:
        front: Blocks at the start that are always computed.
        back: Blocks at the end that are always computed.
        proxy: What it looks at: "residual", the offset of the front blocks on the first stream; "modulated", what the first block's
            attention is given.
        ahead: Whether it judges the proxy that the two steps before lead to, while the later of them still runs.
    """

    @property
    def front(self) -> int: ...

    @property
    def back(self) -> int: ...

    @property
    def proxy(self) -> str: ...

    @property
    def ahead(self) -> bool: ...

    def plan(self, trace: Trace, steps: int) -> Plan:
        """What may be reused at most."""

    def open(self, step: int, steps: int) -> bool:
        """Whether any row may be reused at a step at all."""

    def reuse(self, step: int, proxy: Tensor, memory: Memory) -> Tensor:
        """[rows] bool: which may reuse. `memory` has what `learn` left there."""

    def learn(self, step: int, proxy: Tensor, computed: Tensor, memory: Memory) -> None:
        """Hears of the step's decision: `computed` is [rows] bool."""


def relative_l1(now: Tensor, before: Tensor) -> Tensor:
    """[rows] mean |now - before| over mean |before|, in fp32."""
    if now.dtype in ops.STREAMS and now.dtype == before.dtype and now[:1].numel() and fuses(now, before):
        change, size = (ops.drift(now, before, 0.0)[0] / now[0].numel()).unbind(1)
        return change / size.clamp_min(1e-12)
    now, before = now.flatten(1).float(), before.flatten(1).float()
    return (now - before).abs().mean(1) / before.abs().mean(1).clamp_min(1e-12)


class Recorded:
    """Replays what rows decided in an earlier run.

    Args:
        actions: [rows, steps, sites] of the recorded plan.

    Raises:
        PlanError: At some step a row reuses some of what it reuses elsewhere, but not all.
    """

    proxy = None
    ahead = False

    def __init__(self, actions: np.ndarray) -> None:
        reused = actions == Action.REUSE
        tail = reused.any((0, 1))
        at = np.flatnonzero(tail)
        self.front = int(at[0]) if len(at) else actions.shape[2]
        self.back = actions.shape[2] - 1 - int(at[-1]) if len(at) else 0
        self.rows = reused[:, :, self.front] if len(at) else np.zeros(actions.shape[:2], bool)
        if (reused[:, :, self.front : actions.shape[2] - self.back] != self.rows[:, :, None]).any():
            raise PlanError("a plan for single rows must reuse the same blocks at every step and in every row")


class DecidedState:
    """The offsets of the tail, for every row from the step at which that row was last computed.

    Args:
        denoiser: The network.
        trace: Its trace.
        decider: Who decides.
        steps: Of the run.
        finite: Whether an offset may be used.
        pack: What is done to an offset that is stored.
        compactable: By class of block, why single rows of it cannot be computed, or None where they can; shared by the run's branches.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trace: Trace,
        decider: Decider | Recorded,
        steps: int,
        finite: Finite,
        compactable: dict[type, str | None],
        pack: Packer = AS_IS,
    ) -> None:
        self.pack = pack
        self.denoiser, self.decider, self.steps, self.finite, self.compactable = denoiser, decider, steps, finite, compactable
        self.blocks: list[Block] = [trace.blocks[i] for i in trace.offered]
        self.modules = [denoiser.get_submodule(block.path) for block in self.blocks]
        tail = range(min(decider.front, len(self.blocks)), max(decider.front, len(self.blocks) - decider.back))
        self.tail = set(tail)
        breaks = breaks_of(trace, [s in self.tail for s in range(len(self.blocks))])
        cuts = [s for s in tail if s == tail.start or s in breaks] + [tail.stop]
        self.spans = [(a, b) for a, b in pairwise(cuts) if b > a]
        sizes = {(span, s.index): s.bytes for span in self.spans for block in self.blocks[slice(*span)] for s in block.streams}
        self.bytes_planned = sum(sizes.values())
        self.values: dict[tuple[int, int], dict[int, Kept]] = {}
        self.memory: Memory = {}
        self.ahead = Ahead()
        self.spare = Spare()
        self.called: list[int] = []

    @property
    def bytes(self) -> int:
        kept = [t for value in self.values.values() for t in value.values()] + list(self.memory.values())
        return sum(t.nbytes for t in kept) + self.ahead.bytes

    def start(self, step: int, doubt: str | None) -> DecidedForward | None:
        return DecidedForward(self, step, doubt) if self.spans else None

    def release(self, step: int) -> None:
        """Which steps reuse is not known beforehand: everything is kept."""

    def clear(self) -> None:
        self.values.clear()
        self.memory.clear()
        self.ahead.clear()

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        self.ahead.reindex(rows, batch)
        self.values, self.memory = moved(self.values, rows, batch), moved(self.memory, rows)

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        return {Span(*span, step): {i: read(t) for i, t in value.items()} for span, value in self.values.items()}


class _Stop(Exception):
    """Ends a block's call at its first attention, whose input is all that was asked for."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen


class DecidedForward:
    """One call of the network: a `Pass`."""

    def __init__(self, branch: DecidedState, step: int, doubt: str | None) -> None:
        self.branch, self.step, self.doubt = branch, step, doubt
        self.reasons: list[str] = []
        self.called: list[int] = []
        self.rows: list[bool] | None = None
        """Which rows are reused, once that is known."""
        self.index: tuple[Tensor, Tensor] | None = None
        """Rows that are computed and rows that are reused, where they differ."""
        self.front = Collector(Span(0, branch.decider.front, step))
        self.collectors: dict[tuple[int, int], Collector] = {}
        self.sums: dict[tuple[int, int], dict[int, Tensor]] = {}
        self.ends = {}
        for span in branch.spans:
            inside = [site for site in branch.called if span[0] <= site < span[1]]
            self.ends[span] = inside[-1] if inside else span[1] - 1

    def handlers(self) -> dict[nn.Module, Handler]:
        return {module: self._handler(site) for site, module in enumerate(self.branch.modules)}

    def _handler(self, site: int) -> Handler:
        block, decider = self.branch.blocks[site], self.branch.decider
        span = next((span for span in self.branch.spans if span[0] <= site < span[1]), None)

        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.called.append(site)
            if site < decider.front:
                if decider.proxy != "residual" or self.front.broken is not None:
                    return call(*args, **kwargs)
                given = Given.all(block, args, kwargs)
                out = call(*args, **kwargs)
                self.front.take(site, block, given, out, self.branch.spare)
                return out
            if span is None:
                return call(*args, **kwargs)
            if self.rows is None:
                self._decide(block, call, args, kwargs)
            assert self.rows is not None
            if all(self.rows):
                return pass_on(block, args, kwargs, lambda stream, tensor: self._added(span, site, stream, tensor, None))
            if not any(self.rows):
                given = Given.all(block, args, kwargs)
                out = call(*args, **kwargs)
                collector = self.collectors.setdefault(span, Collector(Span(*span, self.step), self.branch.pack))
                if collector.broken is None:
                    collector.take(site, block, given, out, self.branch.spare)
                return out
            return self._some(span, site, block, call, args, kwargs)

        return handle

    def _decide(self, block: Block, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        branch, decider = self.branch, self.branch.decider
        entered = argument(block.streams[0].position, args, kwargs)
        if entered is None:
            raise Recompute(CHANGED)
        count = entered.shape[0]
        if isinstance(decider, Recorded):
            if len(decider.rows) != count:
                raise PlanError(f"the plan was recorded for a batch of {len(decider.rows)} rows, this run has {count}")
            wanted = [bool(row) for row in decider.rows[:, self.step]]
            self._settle(wanted, entered)
            return
        proxy = self._residual() if decider.proxy == "residual" else self._modulated(block, call, args, kwargs, entered)
        if proxy is None or proxy.shape[0] != count:
            self._settle([False] * count, entered)
            return
        known = bool(branch.values) and all(value[0].shape[0] == count for value in ([*v.values()] for v in branch.values.values()))
        wanted = [False] * count
        if decider.open(self.step, branch.steps) and known and branch.memory and self.doubt is None:
            if decider.ahead:
                wanted = branch.ahead.verdict(self.step, count)
            else:
                wanted = decider.reuse(self.step, proxy, branch.memory).tolist()  # here the host waits for the device
        elif self.doubt is not None and known:
            self.reasons.append(f"{block.path}: {self.doubt}")
        if any(m.shape[0] != count for m in branch.memory.values()):
            branch.memory.clear()
        if any(wanted) and not all(branch.finite(probe(t)) for value in branch.values.values() for t in value.values()):
            self.reasons.append(f"{block.path}: its stored offset is not finite")
            wanted = [False] * count
            branch.clear()
        self._settle(wanted, entered)
        self._learn(decider, proxy.detach())

    def _learn(self, decider: Decider, proxy: Tensor) -> None:
        """Now, and not at the end of the step: a verdict ahead is then on its way while the blocks that follow keep the device busy."""
        assert self.rows is not None
        memory, following = self.branch.memory, self.step + 1
        decider.learn(self.step, proxy, sent([not row for row in self.rows], proxy.device), memory)
        if decider.ahead:
            self.branch.ahead.foretell(following, proxy, lambda expected: decider.reuse(following, expected, memory))

    def _settle(self, wanted: list[bool], entered: Tensor) -> None:
        if any(wanted) and any(span not in self.branch.values for span in self.branch.spans):
            self.reasons.append(f"{self.branch.blocks[self.branch.spans[0][0]].path}: nothing is stored for it yet")
            wanted = [False] * len(wanted)
        self.rows = wanted
        if any(wanted) and not all(wanted):
            rows = [[i for i, reused in enumerate(wanted) if reused == kind] for kind in (False, True)]
            self.index = sent(rows[0], entered.device), sent(rows[1], entered.device)

    def _residual(self) -> Tensor | None:
        """The offset of the front blocks on their first stream."""
        broken = self.front.broken or self.front.close()
        if broken is not None:
            self.reasons.append(f"the front blocks' offset cannot be told ({broken}): everything is computed")
            return None
        found = next(iter(self.front.value().values()), None)
        return None if found is None else read(found)

    def _modulated(self, block: Block, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], entered: Tensor) -> Tensor:
        """What the first block's attention is given: its normed and modulated input, which knows the noise level."""
        part = next((part for part in block.parts if part.kind != "feed-forward"), None)
        if part is None or block.in_place:
            return entered.clone() if block.in_place else entered

        def stop(inner: Call, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            raise _Stop(next(v for v in (*given, *named.values()) if isinstance(v, Tensor) and v.is_floating_point()))

        try:
            with intercept({self.branch.denoiser.get_submodule(part.path): stop}):
                call(*args, **kwargs)
        except _Stop as stopped:
            return stopped.seen
        return entered

    def _added(self, span: tuple[int, int], site: int, stream: Stream, tensor: Tensor, rows: Tensor | None) -> Tensor:
        offset = self.branch.values[span].get(stream.index)
        if offset is None or offset.shape != tensor.shape or offset.dtype != tensor.dtype:
            raise Recompute(CHANGED)
        if site != self.ends[span]:
            return tensor
        in_place = stream.aliased and self.branch.blocks[site].in_place
        if rows is None:
            return add_offsets(tensor, [(offset, 1.0)], in_place=in_place)
        offset = read(offset).to(tensor.device)
        made = tensor.index_add(0, rows, offset.index_select(0, rows))
        return tensor.copy_(made) if in_place else made

    def _sum(self, span: tuple[int, int], stream: Stream, part: Tensor) -> None:
        sums = self.sums.setdefault(span, {})
        sums[stream.index] = sums[stream.index] + part if stream.index in sums else part

    def _some(self, span: tuple[int, int], site: int, block: Block, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The block on the rows that compute; the others pass, and get their offset at the span's end."""
        assert self.index is not None and self.rows is not None
        computed, reused = self.index
        given = {s.index: argument(s.position, args, kwargs) for s in block.streams}
        if any(t is None or t.shape[0] != len(self.rows) for t in given.values()):
            raise Recompute(CHANGED)
        whole = {i: t.clone() if block.in_place and t is not None else t for i, t in given.items()}
        out = self._compact(site, call, args, kwargs, len(self.rows), computed)
        made = {s.index: out if s.slot is None else out[s.slot] for s in block.streams}

        def mixed(stream: Stream, tensor: Tensor) -> Tensor:
            before, after = whole[stream.index], made[stream.index]
            assert before is not None
            if after.shape[0] == len(self.rows or ()):
                after = after.index_select(0, computed)
            self._sum(span, stream, after - before.index_select(0, computed))
            return self._added(span, site, stream, before.index_copy(0, computed, after), reused)

        return pass_on(block, args, kwargs, mixed)

    def _compact(self, site: int, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any], count: int, rows: Tensor) -> Any:
        """The block's output on `rows`; on all rows where its arguments cannot be sliced, as a trial on each class of block tells."""
        kind = type(self.branch.modules[site])
        known = self.branch.compactable
        if known.get(kind, "untried") is None:
            return call(*_sliced(args, count, rows), **_sliced(kwargs, count, rows))
        if kind in known:
            return call(*args, **kwargs)
        block = self.branch.blocks[site]
        if block.in_place:
            known[kind] = f"{block.path} works in place: its rows are not computed apart"
            self.reasons.append(str(known[kind]))
            return call(*args, **kwargs)
        full = call(*args, **kwargs)
        try:
            some = call(*_sliced(args, count, rows), **_sliced(kwargs, count, rows))
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            known[kind] = (
                f"{block.path}: single rows cannot be computed ({str(error).splitlines()[0][:80]}); all rows are, and the others dropped"
            )
        else:
            same = all(_close(b, a.index_select(0, rows)) for a, b in zip(_tensors(full), _tensors(some), strict=True))
            known[kind] = None if same else f"{block.path}: single rows come out otherwise; all rows are computed, and the others dropped"
        if known[kind] is not None:
            self.reasons.append(str(known[kind]))
        return full

    def finish(self) -> None:
        branch = self.branch
        if branch.called and self.called != branch.called and self.rows is not None and any(self.rows):
            raise Recompute("the model called other blocks than in the steps before")
        branch.called = self.called
        if self.rows is None:
            return
        for span, collector in self.collectors.items():
            broken = collector.broken or collector.close()
            branch.values.pop(span, None)
            if broken is None:
                branch.values[span] = {stream: branch.pack(t) for stream, t in collector.value().items()}
            else:
                self.reasons.append(f"{branch.blocks[span[0]].path}: {broken}")
        for span, sums in self.sums.items():
            assert self.index is not None
            old = branch.values[span]
            mixed = {stream: read(old[stream]).index_copy(0, self.index[0], part) for stream, part in sums.items()}
            branch.values[span] = {stream: branch.pack(t) for stream, t in mixed.items()}

    def executed(self, planned: np.ndarray) -> np.ndarray:
        """[sites], or [sites, rows] where rows decided differently."""
        rows = np.array(self.rows if self.rows is not None else [False])
        tail = np.array([site in self.branch.tail for site in range(len(planned))])
        cells = np.where(tail[:, None] & rows[None], Action.REUSE, Action.COMPUTE).astype(np.uint8)
        return cells[:, 0] if (rows == rows[0]).all() else cells


def _sliced(value: Any, count: int, rows: Tensor) -> Any:
    """Arguments with every batch-leading tensor cut to `rows`."""
    if isinstance(value, Tensor):
        return value.index_select(0, rows.to(value.device)) if value.ndim and value.shape[0] == count else value
    if type(value) in (tuple, list):
        return type(value)(_sliced(entry, count, rows) for entry in value)
    if type(value) is dict:
        return {key: _sliced(entry, count, rows) for key, entry in value.items()}
    return value


def _tensors(out: Any) -> Sequence[Tensor]:
    return [out] if isinstance(out, Tensor) else [entry for entry in out if isinstance(entry, Tensor)]


def _close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= 1e-2 * b.abs().max().clamp_min(1e-12))


def tail_plan(trace: Trace, steps: int, decider: Any, open_at: Callable[[int], bool]) -> Plan:
    """What a decider may reuse at most: its tail at every step that is open."""
    actions = np.zeros((steps, len(trace.sites)), np.uint8)
    for k in range(1, steps):
        if open_at(k):
            actions[k, decider.front : len(trace.sites) - decider.back] = Action.REUSE
    return Plan(actions, trace.sites, facts={"model": trace.model, "config": trace.config_hash, "method": str(decider)})
