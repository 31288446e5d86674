"""One denoiser call under a row of a plan.

Every block of a reused span stays in the model's own loop and hands its input on unchanged; the last one called adds the span's
offset. The offset is the sum of the blocks' own offsets, so whatever the model adds between two blocks (control residuals) is neither
frozen nor doubled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.offsets import add_offsets
from hasten.accelerators.caching.plan import Action
from hasten.accelerators.caching.segments import Row, Span, Use
from hasten.accelerators.caching.state import AS_IS, Kept, Packer, moved, probe, read
from hasten.accelerators.caching.trace import Block, Position, Stream, version_of
from hasten.accelerators.dispatch import Call, Handler


class Spare:
    """Memory of offsets that are needed no more, for the next ones.

    The CPU's allocator hands tensors of this size back to the system, and every page of a new one costs a fault: more than the
    subtraction. CUDA's allocator keeps them itself.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def give(self, value: Mapping[int, Kept]) -> None:
        """Takes in a value that nothing reads any more."""
        tensors = [tensor for tensor in value.values() if isinstance(tensor, Tensor)]
        self.tensors += [tensor for tensor in tensors if tensor.device.type == "cpu" and not tensor.requires_grad]

    def subtract(self, after: Tensor, before: Tensor) -> Tensor:
        """`after - before`, in spare memory where some fits."""
        if self.tensors and not (torch.is_grad_enabled() and (after.requires_grad or before.requires_grad)):
            # The latest first: it is most likely still in the processor's cache.
            for i in reversed(range(len(self.tensors))):
                kept = self.tensors[i]
                if (kept.shape, kept.dtype, kept.device) == (
                    after.shape,
                    after.dtype,
                    after.device,
                ) and kept.is_inference() == after.is_inference():
                    return torch.sub(after, before, out=self.tensors.pop(i))
        return after - before


class _Sum:
    """Collects the offset of one stream over a span.

    While a block receives the very object the one before returned, unchanged, the offsets telescope and nothing is computed; where
    something was added in between, the part so far is taken off before it.
    """

    def __init__(self, spare: Spare, pack: Packer) -> None:
        self.spare, self.pack = spare, pack
        self.total: Tensor | None = None
        self.packed: Kept | None = None
        self.part: tuple[Tensor, Tensor] | None = None
        self.versions: tuple[int | None, int | None] = (None, None)

    def extend(self, before: Tensor, entered: Tensor, version: int | None, after: Tensor) -> str | None:
        """One more block.

        Args:
            before: What it was given (a copy where the block works in place).
            entered: The object it was given, at `version` when the block was called.
            after: What it returned.

        Returns:
            Why the offset cannot be told, or None.
        """
        if self.part is not None and entered is self.part[1]:
            if version != self.versions[1]:
                return "the model changes the stream in place between two blocks"
            before = self.part[0]
            versions = self.versions[0], version_of(after)
        else:
            if (reason := self.close()) is not None:
                return reason
            if self.total is not None and (before.shape, before.dtype) != (self.total.shape, self.total.dtype):
                return "the stream changes its shape between two blocks"
            versions = version_of(before), version_of(after)
        self.part, self.versions = (before, after), versions
        # In inference mode nobody can tell whether a tensor was changed since: there every block's offset is taken at once.
        return self.close() if versions[1] is None else None

    def close(self, last: bool = False) -> str | None:
        """Takes the offset of the open part; the reason if that is no longer possible.

        Args:
            last: Whether no part follows, so that it may be packed at once.
        """
        if self.part is not None:
            before, after = self.part
            if (version_of(before), version_of(after)) != self.versions:
                return "the model changes the stream in place between two blocks"
            if last and self.total is None and (packed := self.pack.difference(after, before)) is not None:
                self.packed, self.part = packed, None
                return None
            offset = self.spare.subtract(after, before)
            self.total = offset if self.total is None else self.total + offset
            self.part = None
        return None


class Given(NamedTuple):
    """A stream on its way into a block: its value before the call, the object itself, and its version."""

    before: Tensor | None
    entered: Tensor | None
    version: int | None

    @classmethod
    def all(cls, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Given]:
        """All streams of a block that is about to be called."""
        tensors = [argument(stream.position, args, kwargs) for stream in block.streams]
        return [cls(None, None, None) if t is None else cls(t.clone() if block.in_place else t, t, version_of(t)) for t in tensors]


@dataclass
class Collector:
    """Collects a span's offsets during one forward.

    Attributes:
        span: Which blocks.
        pack: Takes and packs an offset in one pass, where it can; others are left to whoever stores them.
    """

    span: Span
    pack: Packer = AS_IS
    sums: dict[int, _Sum] = field(default_factory=dict)
    taken: dict[int, Kept] = field(default_factory=dict)
    broken: str | None = None

    def take(self, site: int, block: Block, given: Sequence[Given], out: Any, spare: Spare) -> None:
        """One more block of the span: what it was given and what it returned."""
        for stream, entry in zip(block.streams, given, strict=True):
            after = out if stream.slot is None else out[stream.slot]
            if entry.before is None or entry.entered is None or not isinstance(after, Tensor) or after.shape != entry.before.shape:
                self.broken = f"{block.path} was not called as it was when the model was traced"
                return
            if self.span.stop - self.span.start == 1:  # nothing to telescope: its offset is taken at once
                packed = self.pack.difference(after, entry.before)
                self.taken[stream.index] = packed if packed is not None else spare.subtract(after, entry.before)
                continue
            total = self.sums.setdefault(stream.index, _Sum(spare, self.pack))
            reason = total.extend(entry.before, entry.entered, entry.version, after)
            if reason is not None:
                self.broken = f"no link: {reason}"
                return
        if self.sums and site == self.span.stop - 1:
            self.broken = self.close()

    def value(self) -> dict[int, Kept]:
        """The offset of each stream, once closed."""
        if self.taken:
            return self.taken
        found = {stream: total.packed if total.packed is not None else total.total for stream, total in self.sums.items()}
        return {stream: offset for stream, offset in found.items() if offset is not None}

    def close(self) -> str | None:
        """Takes the offsets of what is still open; the reason if they cannot be told."""
        return next((reason for total in self.sums.values() if (reason := total.close(last=True)) is not None), None)


class Pass(Protocol):
    """One denoiser call while it runs."""

    reasons: list[str]
    """Why sites are computed that the plan wanted reused."""

    def handlers(self) -> dict[nn.Module, Handler]:
        """What replaces the calls of the denoiser's modules."""

    def finish(self) -> None:
        """Stores what was collected.

        Raises:
            Recompute: The call did not go as foreseen.
        """

    def executed(self, planned: np.ndarray) -> np.ndarray:
        """The actions taken, [sites] or [sites, rows], given those planned."""


class BranchState(Protocol):
    """What one guidance branch keeps during a run; one class for each kind of site."""

    bytes_planned: int

    @property
    def bytes(self) -> int:
        """Bytes stored now."""

    def start(self, step: int, doubt: str | None) -> Pass | None:
        """The call of a step, or None where there is nothing to do in it.

        Args:
            doubt: Why nothing may be reused in this call, or None.
        """

    def release(self, step: int) -> None:
        """Drops what no step from `step` on reads. A step may be evaluated several times, so nothing is dropped within one."""

    def clear(self) -> None:
        """Drops everything."""

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        """Lets the rows of everything stored follow the samples; of what has `batch` rows, where that is given."""

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        """What was stored at a step, for observers."""


Finite = Callable[[Tensor], bool]
"""Whether an offset may be used."""


class BlockState:
    """The offsets of spans of blocks.

    Args:
        blocks: The sites.
        modules: Their modules.
        rows: What the plan says for each step.
        finite: Whether an offset may be used.
        bytes_planned: Most bytes that the plan stores.
        corrections: For each site, for each step, what an offset that is added there is corrected with.
        pack: What is done to an offset that is stored.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        modules: Sequence[nn.Module],
        rows: Sequence[Row],
        finite: Finite,
        bytes_planned: int,
        corrections: Sequence[list[Affine | None] | None] = (),
        pack: Packer = AS_IS,
    ) -> None:
        self.corrections, self.pack = corrections, pack
        self.blocks, self.modules, self.rows, self.finite, self.bytes_planned = blocks, modules, rows, finite, bytes_planned
        self.last_use = {span: k for k, row in enumerate(rows) for span in (*row.store, *row.release)}
        self.called: list[int] = []
        self.values: dict[Span, dict[int, Kept]] = {}
        # Spans whose values nobody has read yet: whether they are finite is asked then.
        self.untested: set[Span] = set()
        self.refused: dict[Span, str] = {}
        self.spare = Spare()

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for value in self.values.values() for t in value.values())

    def start(self, step: int, doubt: str | None) -> Forward | None:
        row = self.rows[step]
        return Forward(self, step, row, doubt) if row.reuse or row.store else None

    def release(self, step: int) -> None:
        for span in [span for span in self.values if self.last_use[span] < step]:
            self.spare.give(self.values.pop(span))

    def clear(self) -> None:
        self.values.clear()

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        self.spare.tensors.clear()  # of the old batch size
        self.values = moved(self.values, rows, batch)

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        return {span: {i: read(t) for i, t in value.items()} for span, value in self.values.items() if span.source == step}


class Recompute(Exception):
    """The blocks were not called as before: this forward has to be computed."""


class Forward:
    """One denoiser call: what each block does.

    Args:
        branch: What the call's guidance branch keeps; `finish` puts into it what was collected.
        row: What the plan says for this step.
        doubt: Why nothing may be reused in this call, or None.
    """

    def __init__(self, branch: BlockState, step: int, row: Row, doubt: str | None) -> None:
        self.step = step
        self.blocks = branch.blocks
        self.branch = branch
        self.reused: set[int] = set()
        self.reasons: list[str] = []
        self.called: list[int] = []
        self.uses: dict[int, Use] = {}
        self.ends: dict[int, Use] = {}
        self.done: set[Use] = set()
        stores = list(row.store)
        for use in row.reuse:
            called = [site for site in branch.called if use.start <= site < use.stop]
            why = doubt or next((reason for span in use.spans if (reason := self._unusable(span)) is not None), None)
            if why is None and called:
                self.uses |= dict.fromkeys(called, use)
                self.ends[called[-1]] = use
            elif why is not None:
                self._why(use, why)
                newest = use.spans[0]
                # Computed after all: the next steps may use it, unless they weigh it against older ones.
                if len(use.terms) == 1 and newest not in branch.values and newest not in branch.refused:
                    stores.append(newest)
        # Only what is computed now can be collected, and only where nothing inside the span is reused.
        self.collectors = [Collector(span, branch.pack) for span in stores if not any(s in self.uses for s in range(span.start, span.stop))]

    def _unusable(self, span: Span) -> str | None:
        """Why what is stored for a span cannot be used, or None."""
        branch = self.branch
        if span in branch.refused:
            return branch.refused[span]
        if span not in branch.values:
            return "nothing is stored for it yet"
        if span in branch.untested:
            branch.untested.remove(span)
            if not all(branch.finite(probe(tensor)) for tensor in branch.values[span].values()):
                del branch.values[span]
                return "its stored offset is not finite"
        return None

    def _why(self, use: Use, reason: str) -> None:
        name = self.blocks[use.start].path + (f" to {self.blocks[use.stop - 1].path}" if use.stop > use.start + 1 else "")
        self.reasons.append(f"{name}: {reason}")

    def handlers(self) -> dict[nn.Module, Handler]:
        return {module: self.handler(site) for site, module in enumerate(self.branch.modules)}

    def executed(self, planned: np.ndarray) -> np.ndarray:
        if len(self.reused) == len(planned):
            return planned
        row = np.full(len(planned), Action.COMPUTE, np.uint8)
        at = sorted(self.reused)
        row[at] = planned[at]
        return row

    def handler(self, site: int) -> Handler:
        """What replaces the call of the block at `site` during this forward."""
        block = self.blocks[site]

        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.called.append(site)
            use = self.uses.get(site)
            if use is not None:
                return self._reuse(site, use, block, args, kwargs)
            collectors = [c for c in self.collectors if c.span.start <= site < c.span.stop and c.broken is None]
            if not collectors:
                return call(*args, **kwargs)
            given = Given.all(block, args, kwargs)
            out = call(*args, **kwargs)
            for collector in collectors:
                collector.take(site, block, given, out, self.branch.spare)
            return out

        return handle

    def _reuse(self, site: int, use: Use, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.reused.add(site)
        if site not in self.ends:
            return pass_on(block, args, kwargs, lambda stream, tensor: tensor)
        values = [self.branch.values[span] for span in use.spans]

        def added(stream: Stream, tensor: Tensor) -> Tensor:
            offsets = [value.get(stream.index) for value in values]
            if any(o is not None and (o.shape != tensor.shape or o.dtype != tensor.dtype) for o in offsets):
                raise Recompute(CHANGED)
            terms = [(o, weight) for o, (_, weight) in zip(offsets, use.terms, strict=True) if o is not None]
            fixes = self.branch.corrections[use.stop - 1] if self.branch.corrections else None
            fix = fixes[self.step] if fixes is not None and stream.index == 0 else None
            if not terms:
                return tensor
            # A block that returns its own, changed input may be called for that effect alone.
            return add_offsets(tensor, terms, fix, in_place=stream.aliased and block.in_place)

        out = pass_on(block, args, kwargs, added)
        self.done.add(use)
        return out

    def finish(self) -> None:
        """Stores what was collected.

        Raises:
            Recompute: A reused span did not end where it should, so its offset was not added.
        """
        missing = set(self.ends.values()) - self.done
        if missing or (self.uses and self.called != self.branch.called):
            raise Recompute("the model called other blocks than in the steps before")
        self.branch.called = self.called
        for collector in self.collectors:
            if collector.broken is None and not collector.sums and not collector.taken:
                continue  # none of its blocks was called (skip-layer guidance)
            broken = collector.broken or collector.close()  # its last block may not have been called
            if broken is not None:
                self.branch.refused[collector.span] = broken
                continue
            value = collector.value()
            self.branch.values[collector.span] = {stream: self.branch.pack(kept) for stream, kept in value.items()}
            if self.branch.pack.kind is not None:
                self.branch.spare.give(value)
            self.branch.untested.add(collector.span)
            self.branch.refused.pop(collector.span, None)


CHANGED = "the shape of the stream, or the batch, is no longer that of the stored offset"


def pass_on(block: Block, args: tuple[Any, ...], kwargs: dict[str, Any], made: Callable[[Stream, Tensor], Tensor]) -> Any:
    """What a block returns that is not computed: each of its streams as `made` says, in the block's own form.

    Raises:
        Recompute: A stream is not among the arguments.
    """
    outputs: dict[int | None, Tensor] = {}
    for stream in block.streams:
        tensor = argument(stream.position, args, kwargs)
        if tensor is None:
            raise Recompute(CHANGED)
        outputs[stream.slot] = made(stream, tensor)
    if block.form == "tensor":
        return outputs[None]
    entries = [outputs.get(slot) for slot in range(block.width)]
    return tuple(entries) if block.form == "tuple" else entries


def argument(position: Position, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The tensor that stands there, or None."""
    value = args[position] if isinstance(position, int) and position < len(args) else kwargs.get(position)  # type: ignore[arg-type]
    return value if isinstance(value, Tensor) else None
