"""Carries out plans for parts of blocks: an attention or feed-forward module is answered with its stored output.

What is stored is the module's output before the block's gate, so that the present gate applies. Where a block has no gate and nothing
else beside its parts, a block whose parts are all reused need not run at all: the outputs of a whole run of such blocks are added up once,
and one addition stands for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.deep import tensors_in
from hasten.accelerators.caching.forward import CHANGED, Finite, Recompute, pass_on
from hasten.accelerators.caching.plan import Action, PlanError
from hasten.accelerators.caching.segments import Span, breaks_of
from hasten.accelerators.caching.state import AS_IS, Packer, kept_in, mapped, moved, probe, unpacked
from hasten.accelerators.caching.trace import Block, Stream, Trace, version_of
from hasten.accelerators.dispatch import Call, Handler, compiled_whole


@dataclass(frozen=True)
class PartRow:
    """One step of the plan, compiled.

    Attributes:
        reuse: Parts that are answered one by one, with the step that their value comes from.
        keep: Parts that are computed now and read later.
        runs: Runs of blocks that need not be called: numbers of the blocks, and (part, source step) of all that is added for them.
    """

    reuse: dict[int, int] = field(default_factory=dict)
    keep: frozenset[int] = frozenset()
    runs: tuple[tuple[tuple[int, ...], tuple[tuple[int, int], ...]], ...] = ()


def part_program(trace: Trace, sites: Sequence[str], actions: np.ndarray, *, force_store: bool = False) -> tuple[list[PartRow], list[str]]:
    """Compiles the actions [steps, sites] of one branch; also the reasons for cells that cannot be reused.

    Raises:
        PlanError: The plan forecasts.
    """
    if (actions == Action.FORECAST).any():
        raise PlanError("parts of blocks are computed or reused; a plan that forecasts needs whole blocks")
    steps = len(actions)
    offered = [trace.blocks[i] for i in trace.offered]
    number = {site: i for i, site in enumerate(sites)}
    inside = [[number[part.path] for part in block.parts if part.path in number] for block in offered]
    whole = [block.additive and bool(block.parts) and len(own) == len(block.parts) for block, own in zip(offered, inside, strict=True)]
    last = [-1] * len(sites)
    rows: list[PartRow] = []
    reasons: list[str] = []
    for k in range(steps):
        reuse: dict[int, int] = {}
        for i in range(len(sites)):
            if actions[k, i] == Action.COMPUTE:
                last[i] = k
            elif last[i] < 0:
                reasons.append(f"step {k}, {sites[i]}: computed, since it was never computed before")
                last[i] = k
            else:
                reuse[i] = last[i]
        resting = [w and all(i in reuse for i in own) for w, own in zip(whole, inside, strict=True)]
        breaks = breaks_of(trace, resting)
        runs: list[list[int]] = []
        for s in np.flatnonzero(resting):
            if runs and runs[-1][-1] == s - 1 and s not in breaks:
                runs[-1].append(int(s))
            else:
                runs.append([int(s)])
        merged = tuple((tuple(run), tuple((i, reuse[i]) for s in run for i in inside[s])) for run in runs)
        single = {i: source for i, source in reuse.items() if not any(i == j for _, parts in merged for j, _ in parts)}
        rows.append(PartRow(single, frozenset(), merged))
    read = {(i, source) for row in rows for i, source in row.reuse.items()}
    read |= {pair for row in rows for _, parts in row.runs for pair in parts}
    computed = [set(range(len(sites))) - set(row.reuse) - {i for _, parts in row.runs for i, _ in parts} for row in rows]
    keep = [frozenset(i for i in computed[k] if force_store or (i, k) in read) for k in range(steps)]
    return [PartRow(row.reuse, kept, row.runs) for row, kept in zip(rows, keep, strict=True)], reasons


class PartState:
    """The stored outputs of parts.

    Args:
        denoiser: The network.
        trace: Its trace.
        sites: Paths of the parts.
        rows: From `part_program`.
        finite: Whether a value may be used.
        corrections: For each site, for each step, what its stored value is corrected with.
        pack: What is done to a value that is stored.

    Raises:
        PlanError: A block was compiled after it was traced.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        trace: Trace,
        sites: Sequence[str],
        rows: Sequence[PartRow],
        finite: Finite,
        corrections: Sequence[list[Affine | None] | None] | None = None,
        pack: Packer = AS_IS,
    ) -> None:
        self.pack = pack
        self.sites, self.rows, self.finite = tuple(sites), rows, finite
        self.modules = [denoiser.get_submodule(path) for path in sites]
        self.blocks: list[Block] = [trace.blocks[i] for i in trace.offered]
        self.block_modules = [denoiser.get_submodule(block.path) for block in self.blocks]
        for block, module in zip(self.blocks, self.block_modules, strict=True):
            if compiled_whole(module) and any(part.path in self.sites for part in block.parts):
                raise PlanError(
                    f"{block.path} is compiled, so the calls of its parts cannot be seen: cache whole blocks (Forecast, DeltaDiT), or "
                    "compile the parts instead"
                )
        self.corrections = corrections
        size = {part.path: part.bytes for part in trace.parts}
        self.bytes_planned = sum(size[path] for i, path in enumerate(sites) if any(i in row.keep for row in rows))
        self.values: dict[int, Any] = {}
        self.sources: dict[int, int] = {}
        self.untested: set[int] = set()
        in_place = {part.path for part in trace.parts if part.in_place}
        self.fragile = {i for i, path in enumerate(sites) if path in in_place}
        self.merged: dict[tuple[tuple[int, int], ...], Tensor] = {}
        self.last_read = {}
        self.last_run = {parts: k for k, row in enumerate(rows) for _, parts in row.runs}
        for k, row in enumerate(rows):
            for i in (*row.keep, *row.reuse, *(i for _, parts in row.runs for i, _ in parts)):
                self.last_read[i] = k

    @property
    def bytes(self) -> int:
        kept = [t for value in self.values.values() for t in kept_in(value)] + list(self.merged.values())
        return sum(t.nbytes for t in kept)

    def start(self, step: int, doubt: str | None) -> PartForward | None:
        row = self.rows[step]
        return PartForward(self, step, row, doubt) if row.reuse or row.runs or row.keep else None

    def release(self, step: int) -> None:
        for i in [i for i in self.values if self.last_read.get(i, -1) < step]:
            del self.values[i], self.sources[i]
        for parts in [parts for parts in self.merged if self.last_run[parts] < step]:
            del self.merged[parts]

    def clear(self) -> None:
        self.values.clear()
        self.sources.clear()
        self.merged.clear()

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        self.values, self.merged = moved((self.values, self.merged), rows, batch)

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        now = [i for i, source in self.sources.items() if source == step]
        return {Span(i, i + 1, step): dict(enumerate(tensors_in(unpacked(self.values[i])))) for i in now}

    def unusable(self, i: int, source: int) -> str | None:
        """Why a part's stored value cannot be used, or None."""
        if self.sources.get(i) != source:
            return "nothing is stored for it yet"
        if i in self.untested:
            self.untested.remove(i)
            if not all(self.finite(probe(kept)) for kept in kept_in(self.values[i])):
                del self.values[i], self.sources[i]
                return "its stored value is not finite"
        return None


class PartForward:
    """One call of the network: a `Pass`."""

    def __init__(self, branch: PartState, step: int, row: PartRow, doubt: str | None) -> None:
        self.branch, self.step = branch, step
        self.reasons: list[str] = []
        self.keep = set(row.keep)
        self.reuse: set[int] = set()
        self.runs: list[tuple[tuple[int, ...], tuple[tuple[int, int], ...]]] = []
        self.called: set[int] = set()
        self.found: dict[int, Any] = {}
        self.versions: dict[int, list[int | None]] = {}
        asked = [({i: source}, None) for i, source in row.reuse.items()]
        asked += [(dict(run[1]), run) for run in row.runs]  # type: ignore[misc]
        for parts, run in asked:
            faults = {i: doubt or branch.unusable(i, source) for i, source in parts.items()}
            broken = {i: why for i, why in faults.items() if why is not None}
            self.reasons += [f"{branch.sites[i]}: {why}" for i, why in broken.items()]
            self.keep |= set(broken)
            if run is not None and not broken:
                self.runs.append(run)
            self.reuse |= set(parts) - set(broken) if run is None or broken else set()

    def handlers(self) -> dict[nn.Module, Handler]:
        branch = self.branch
        made: dict[nn.Module, Handler] = {branch.modules[i]: self._answer(i) for i in self.reuse}
        made |= {branch.modules[i]: self._watch(i) for i in self.keep}
        for run in self.runs:
            made |= {branch.block_modules[s]: self._rest(s, run) for s in run[0]}
        return made

    def _fix(self, i: int) -> Affine | None:
        table = self.branch.corrections[i] if self.branch.corrections is not None else None
        return table[self.step] if table is not None else None

    def _value(self, i: int) -> Any:
        fix = self._fix(i)
        value = unpacked(self.branch.values[i])
        return value if fix is None else mapped(value, lambda tensor: fix.apply(tensor, -1))

    def _answer(self, i: int) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            value = self._value(i)
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            first = tensors_in(value)[0]
            if given is not None and given.shape[:-1] != first.shape[:-1]:
                raise Recompute(CHANGED)
            return mapped(value, torch.clone) if self._fragile(i, value) else value

        return handle

    def _fragile(self, i: int, value: Any) -> bool:
        """Whether the block may work in place on what the part returned. In inference mode nobody can tell, so it is assumed."""
        return i in self.branch.fragile or any(tensor.is_inference() for tensor in tensors_in(value))

    def _watch(self, i: int) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = call(*args, **kwargs)
            self.found[i] = mapped(out, torch.clone) if self._fragile(i, out) else out
            self.versions[i] = [version_of(tensor) for tensor in tensors_in(self.found[i])]
            return out

        return handle

    def _rest(self, s: int, run: tuple[tuple[int, ...], tuple[tuple[int, int], ...]]) -> Handler:
        block = self.branch.blocks[s]
        last = s == run[0][-1]

        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.called.add(s)

            def made(stream: Stream, tensor: Tensor) -> Tensor:
                if not last or stream.index != block.streams[0].index:
                    return tensor
                total = self._merged(run[1])
                if total.shape != tensor.shape:
                    raise Recompute(CHANGED)
                if stream.aliased and block.in_place:
                    return tensor.add_(total)
                return tensor + total

            return pass_on(block, args, kwargs, made)

        return handle

    def _merged(self, parts: tuple[tuple[int, int], ...]) -> Tensor:
        """The sum of the parts' outputs; kept while a later step adds the very same."""
        known = self.branch.merged
        corrected = any(self._fix(i) is not None for i, _ in parts)
        if parts not in known or corrected:
            values = [tensors_in(self._value(i))[0] for i, _ in parts]
            total = values[0].clone()
            for value in values[1:]:
                total.add_(value)
            if corrected:
                return total
            known[parts] = total
        return known[parts]

    def finish(self) -> None:
        if any(s not in self.called for run in self.runs for s in run[0]):
            raise Recompute("the model called other blocks than in the steps before")
        for i, value in self.found.items():
            if [version_of(tensor) for tensor in tensors_in(value)] != self.versions[i]:
                self.branch.fragile.add(i)  # from the next step on a copy is stored
                self.reasons.append(f"{self.branch.sites[i]}: the block changes it in place; it is stored from the next computed step on")
                continue
            self.branch.values[i], self.branch.sources[i] = mapped(value, self.branch.pack), self.step
            self.branch.untested.add(i)

    def executed(self, planned: np.ndarray) -> np.ndarray:
        at = self.reuse.union(*({i for i, _ in run[1]} for run in self.runs))
        if len(at) == len(planned):
            return planned
        row = np.full(len(planned), Action.COMPUTE, np.uint8)
        row[sorted(at)] = planned[sorted(at)]
        return row
