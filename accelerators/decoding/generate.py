"""The loop around a schedule, without a cache: small, row by row exact, and counting what it spends.

Every row has its own block and leaves the batch when it is done. The loop itself reads one thing back from the device in each step: which
rows are done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.decoding.compatibility import refuse
from hasten.accelerators.decoding.geometry import Canvas, Extent, FixedBlocks, Geometry, InsertingGeometry, advanced, window, written
from hasten.accelerators.decoding.noise import Key
from hasten.accelerators.decoding.schedule import Schedule, State
from hasten.accelerators.decoding.statistics import Sampling, Statistics, measure


class LogitsFn(Protocol):
    """The model."""

    def __call__(self, tokens: Tensor, valid: Tensor, columns: Tensor, /) -> Tensor:
        """Logits [r, W, V] of some columns.

        Args:
            tokens: int64 [r, L], of the rows that are not done yet.
            valid: bool [r, L], False where there is padding.
            columns: int64 [r, W], the columns whose logits are wanted.
        """
        ...


class Executor(Protocol):
    """Another way to carry out a schedule than one forward for each step."""

    @property
    def schedule(self) -> Schedule:
        """What is carried out."""
        ...

    def check(self, geometry: Geometry) -> None:
        """Raises ValueError where it cannot work under the geometry."""
        ...

    def run(self, loop: Loop, rows: Rows) -> Decoded:
        """Decodes all rows."""
        ...


@dataclass(frozen=True)
class Decoded:
    """Answers.

    Attributes:
        tokens: int64 [R, n], without prompt; after the first end-of-text there is nothing else.
        lengths: int64 [R], tokens up to the first end-of-text, that one included: no padding is counted.
        forwards: int64 [R], forwards of the model until the row was done.
        steps: int64 [R, n], the step of the schedule, from 1, that gave each token; 0 for what stands behind an end-of-text unasked.
    """

    tokens: Tensor
    lengths: Tensor
    forwards: Tensor
    steps: Tensor

    @property
    def tokens_per_forward(self) -> Tensor:
        """float [R]."""
        return self.lengths / self.forwards


class Logits(NamedTuple):
    """What a forward gave.

    Attributes:
        window: [r, W, V].
        shadow: [r, W, V], of the window's shadow.
        everything: [r, n, V], of all generated columns.
        ready: bool [r], rows whose logits these are; the others must be forwarded again before they go on. None is all.
    """

    window: Tensor
    shadow: Tensor | None = None
    everything: Tensor | None = None
    ready: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Where some rows are.

    Attributes:
        index: int64 [r], which rows of the batch they are.
        seeds: int64 [r], of their noise.
        canvas: Their tokens.
        extent: Their blocks.
        fresh: bool [r], the block has not been forwarded yet.
        done: bool [r].
        clock: int64 [r], steps so far.
        forwards: int64 [r], forwards so far.
        marks: int64 [r, L], the step that gave each token; 0 where none did.
        state: Of the schedule.
    """

    index: Tensor
    seeds: Tensor
    canvas: Canvas
    extent: Extent
    fresh: Tensor
    done: Tensor
    clock: Tensor
    forwards: Tensor
    marks: Tensor
    state: State

    def reindex(self, rows: Tensor) -> Rows:
        """The given rows, int64 [n]."""
        canvas = self.canvas
        return Rows(
            index=self.index[rows],
            seeds=self.seeds[rows],
            canvas=Canvas(canvas.tokens[rows], canvas.prompt, canvas.origin[rows], canvas.limit[rows]),
            extent=Extent(*(value[rows] for value in self.extent)),
            fresh=self.fresh[rows],
            done=self.done[rows],
            clock=self.clock[rows],
            forwards=self.forwards[rows],
            marks=self.marks[rows],
            state=self.state.reindex(rows),
        )

    def where(self, rows: Tensor, other: Rows) -> Rows:
        """These rows where `rows`, bool [r], holds, the others elsewhere."""

        def pick(mine: Tensor, theirs: Tensor) -> Tensor:
            return torch.where(rows.view(-1, *(1,) * (mine.ndim - 1)), mine, theirs)

        mine, theirs = self.canvas, other.canvas
        return Rows(
            index=pick(self.index, other.index),
            seeds=pick(self.seeds, other.seeds),
            canvas=Canvas(pick(mine.tokens, theirs.tokens), mine.prompt, pick(mine.origin, theirs.origin), pick(mine.limit, theirs.limit)),
            extent=Extent(*map(pick, self.extent, other.extent)),
            fresh=pick(self.fresh, other.fresh),
            done=pick(self.done, other.done),
            clock=pick(self.clock, other.clock),
            forwards=pick(self.forwards, other.forwards),
            marks=pick(self.marks, other.marks),
            state=self.state.where(rows, other.state),
        )


@dataclass(frozen=True)
class Loop:
    """What stays the same from step to step.

    Attributes:
        logits_fn: The model.
        schedule: What is committed.
        geometry: Where the blocks are.
        sampling: How tokens are chosen.
        width: Columns of a window.
        eos_id: End-of-text; None decodes rows to their last column.
        shadow_fn: The model's shadow block.
    """

    logits_fn: LogitsFn
    schedule: Schedule
    geometry: Geometry
    sampling: Sampling
    width: int
    eos_id: int | None = None
    shadow_fn: LogitsFn | None = None

    def forward(self, rows: Rows) -> tuple[Logits, Rows]:
        """Runs the model, and counts that."""
        canvas = rows.canvas
        columns = window(canvas, rows.extent.start, self.width)
        counted = replace(rows, forwards=rows.forwards + ~rows.done)
        if isinstance(self.geometry, InsertingGeometry):
            everything = self._everything(canvas)
            index = (columns - canvas.prompt).clamp(max=everything.shape[1] - 1)
            return Logits(everything.take_along_dim(index[..., None], 1), everything=everything), counted
        shadow = None if self.shadow_fn is None else self.shadow_fn(canvas.tokens, canvas.valid, columns)
        return Logits(self.logits_fn(canvas.tokens, canvas.valid, columns), shadow), counted

    def _everything(self, canvas: Canvas) -> Tensor:
        """Logits of the generated columns up to the longest row's limit, which is read back: padding need not be forwarded."""
        end = int(canvas.limit.max())
        columns = torch.arange(canvas.prompt, end, device=canvas.tokens.device).expand(len(canvas.tokens), -1)
        return self.logits_fn(canvas.tokens[:, :end], canvas.valid[:, :end], columns)

    def look(self, canvas: Canvas) -> Statistics:
        """Statistics of the generated columns, without noise."""
        return self._plain(canvas, self._everything(canvas))

    def _plain(self, canvas: Canvas, everything: Tensor) -> Statistics:
        shown = canvas.tokens[:, canvas.prompt : canvas.prompt + everything.shape[1]]
        return measure(everything, shown, replace(self.sampling, temperature=0.0, tempered=False))

    def transition(self, rows: Rows, logits: Logits) -> tuple[Rows, Statistics]:
        """One step of the schedule: where the rows are after it, and the statistics of the window that it was decided on."""
        schedule, canvas, extent, mask_id = self.schedule, rows.canvas, rows.extent, self.sampling.mask_id
        state = schedule.restart(rows.state, rows.fresh)
        columns = window(canvas, extent.start, self.width)
        current = canvas.tokens.gather(1, columns)
        statistics = measure(
            logits.window,
            current,
            self.sampling,
            key=Key(rows.seeds, columns - canvas.prompt, rows.clock),
            probes=schedule.probes(state),
            top=schedule.needs.top,
            lots=schedule.needs.lots,
            shadow=logits.shadow,
        )
        end = torch.where(rows.fresh, self.geometry.ends(canvas, extent.start, extent.length, statistics), extent.end)
        last = torch.where(rows.done, 0, torch.minimum(end, canvas.limit))
        active = extent.start[:, None] + torch.arange(self.width, device=end.device) < last[:, None]
        decision, state = schedule.select(statistics, state, active)
        canvas = written(canvas, extent.start, decision.apply(current, mask_id))
        step = torch.where(canvas.tokens == mask_id, 0, rows.clock[:, None] + 1)
        marks = torch.where(canvas.tokens == rows.canvas.tokens, rows.marks, step)
        if isinstance(self.geometry, InsertingGeometry) and logits.everything is not None and self.eos_id is not None:
            unfilled = active & (statistics.masked & ~decision.commits | decision.remasks)
            everything = self._plain(rows.canvas, logits.everything)
            canvas, source = self.geometry.insert(canvas, extent.start, unfilled, statistics, everything, mask_id, self.eos_id)
            state = schedule.rearrange(state, source)
            marks = _moved(marks, extent.start, source, canvas.limit - rows.canvas.limit)
        extent, done = advanced(canvas, extent._replace(end=end), decision.settled, mask_id)
        canvas, ended = self._ended(canvas)
        done = rows.done | done | ended
        rows = replace(
            rows,
            canvas=canvas,
            extent=extent,
            fresh=decision.settled & ~done,
            done=done,
            clock=rows.clock + ~rows.done,
            marks=marks,
            state=state,
        )
        return rows, statistics

    def _ended(self, canvas: Canvas) -> tuple[Canvas, Tensor]:
        """Rows whose first end-of-text has no mask before it, bool [R], and the canvas with nothing else behind it."""
        if self.eos_id is None:
            return canvas, torch.zeros_like(canvas.limit, dtype=torch.bool)
        tokens, generated = canvas.tokens, canvas.generated
        is_end = generated & (tokens == self.eos_id)
        before = is_end.cumsum(-1) == 0
        ended = is_end.any(-1) & ~(generated & before & (tokens == self.sampling.mask_id)).any(-1)
        return canvas._replace(tokens=tokens.masked_fill(generated & ~before & ended[:, None], self.eos_id)), ended


def _moved(marks: Tensor, start: Tensor, source: Tensor, added: Tensor) -> Tensor:
    """The marks after masks came in: `added`, int64 [r], of them, where `source` says. What stands behind has moved along."""
    new, columns = source < 0, torch.arange(marks.shape[1], device=marks.device)
    first = start + torch.where(new.any(-1), new.int().argmax(-1), source.shape[1])
    behind = columns >= (first + added)[:, None]
    before = torch.where(behind, columns - added[:, None], columns)
    return marks.gather(1, before).masked_fill(~behind & (columns >= first[:, None]), 0)


class Collector:
    """Takes the rows that are done out of the batch. `grows` says that a row's limit may move, so that the longest has to be found."""

    def __init__(self, rows: Rows, eos_id: int | None, grows: bool = False) -> None:
        self.eos_id, self.grows = eos_id, grows
        canvas = rows.canvas
        self.tokens = torch.empty_like(canvas.tokens[:, canvas.prompt :])
        self.limits = torch.zeros_like(canvas.limit)
        self.forwards = torch.zeros_like(rows.forwards)
        self.steps = torch.zeros_like(self.tokens)

    def take(self, rows: Rows) -> Tensor:
        """Keeps the answers of rows that are done, and returns the places of the others, int64 [n]. This reads back."""
        self.keep(rows, rows.done.nonzero()[:, 0])
        return (~rows.done).nonzero()[:, 0]

    def keep(self, rows: Rows, done: Tensor) -> None:
        """Keeps the answers of the rows at some places, int64 [n]."""
        canvas, index = rows.canvas, rows.index[done]
        self.tokens[index] = canvas.tokens[done, canvas.prompt :]
        self.limits[index] = canvas.limit[done] - canvas.prompt
        self.forwards[index] = rows.forwards[done]
        self.steps[index] = rows.marks[done, canvas.prompt :]

    def result(self) -> Decoded:
        """All answers."""
        longest = int(self.limits.max()) if self.grows else self.tokens.shape[1]
        tokens, steps = self.tokens[:, :longest], self.steps[:, :longest]
        if self.eos_id is None:
            return Decoded(tokens, self.limits, self.forwards, steps)
        length = (((tokens == self.eos_id).cumsum(-1) == 0).sum(-1) + 1).clamp(max=self.limits)
        return Decoded(tokens, length, self.forwards, steps)


@dataclass(frozen=True)
class Sequential:
    """One forward for each step."""

    schedule: Schedule

    def check(self, geometry: Geometry) -> None:
        refuse(self.schedule, geometry=geometry)

    def run(self, loop: Loop, rows: Rows) -> Decoded:
        collector = Collector(rows, loop.eos_id, loop.geometry.inserts)
        while len(rows.index):
            logits, rows = loop.forward(rows)
            rows, _ = loop.transition(rows, logits)
            rows = rows.reindex(collector.take(rows))
        return collector.result()


@torch.no_grad()
def decode(
    logits_fn: LogitsFn,
    prompt_ids: Tensor,
    schedule: Schedule | Executor,
    geometry: Geometry | None = None,
    *,
    sampling: Sampling,
    length: int | None = None,
    prompt_mask: Tensor | None = None,
    eos_id: int | None = None,
    seeds: Sequence[int] | None = None,
    shadow_fn: LogitsFn | None = None,
) -> Decoded:
    """Answers to prompts. No cache: every step forwards whole rows.

    Args:
        logits_fn: The model.
        prompt_ids: int64 [R, P], padded on the left.
        schedule: What is committed at which step, or an executor such as FreeDave that holds a schedule.
        geometry: Where the blocks are; `FixedBlocks(32)` unless told.
        sampling: How tokens are chosen, and the mask token.
        length: Tokens of an answer; None under DAEDAL, which finds it.
        prompt_mask: bool [R, P], False where there is padding.
        eos_id: End-of-text. A row is done as soon as no mask is left before its first one.
        seeds: One for each row, 0 to R - 1 unless told. A row's noise depends on its seed, not on its place in the batch.
        shadow_fn: Logits of a shadow block: as `logits_fn`, but no column sees its own token. WINO needs it.

    Raises:
        ValueError: Arguments disagree, or schedule, geometry and executor do not go together.
    """
    executor = Sequential(schedule) if isinstance(schedule, Schedule) else schedule
    geometry = FixedBlocks() if geometry is None else geometry
    length = check(prompt_ids, executor, geometry, length, eos_id)
    if executor.schedule.needs.shadow and shadow_fn is None:
        raise ValueError(f"{type(executor.schedule).__name__} needs shadow_fn, the model with a shadow block")
    loop = Loop(
        logits_fn,
        executor.schedule,
        geometry,
        sampling,
        geometry.width(length),
        eos_id,
        shadow_fn if executor.schedule.needs.shadow else None,
    )
    origin = None if prompt_mask is None else _origin(prompt_ids, prompt_mask)
    return executor.run(loop, begin(loop, prompt_ids, length, origin, seeds))


def check(prompt_ids: Tensor, executor: Executor, geometry: Geometry, length: int | None, eos_id: int | None) -> int:
    """The masks to begin with; arguments as in `decode`.

    Raises:
        ValueError: They do not go together.
    """
    executor.check(geometry)
    if executor.schedule.needs.shadow and geometry.inserts:
        raise ValueError(f"{type(executor.schedule).__name__} has no shadow of the whole answer, which {type(geometry).__name__} looks at")
    if geometry.inserts and eos_id is None:
        raise ValueError(f"{type(geometry).__name__} needs eos_id: it looks for the end of the text")
    if prompt_ids.ndim != 2 or not len(prompt_ids):
        raise ValueError(f"prompt_ids must be [rows, positions] with at least one row, not {tuple(prompt_ids.shape)}")
    return geometry.answer_length(length)


def _origin(prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
    """The first column of each prompt, int64 [R]."""
    prompt = prompt_ids.shape[1]
    origin = prompt - prompt_mask.sum(-1)
    if prompt_mask.shape != prompt_ids.shape or not torch.equal(
        prompt_mask.bool(), torch.arange(prompt, device=prompt_ids.device) >= origin[:, None]
    ):
        raise ValueError("prompt_mask must be of the shape of prompt_ids, False for padding on the left and True from there on")
    return origin


def begin(loop: Loop, prompt_ids: Tensor, length: int, origin: Tensor | None, seeds: Sequence[int] | None) -> Rows:
    """The rows before the first step; arguments as in `decode`, and `origin`, int64 [R], the first column of each prompt."""
    (rows, prompt), device = prompt_ids.shape, prompt_ids.device
    seeds = range(rows) if seeds is None else seeds
    if len(seeds) != rows:
        raise ValueError(f"seeds must have an entry for each of the {rows} rows, not {len(seeds)}")
    mask_id, geometry = loop.sampling.mask_id, loop.geometry
    if origin is None:
        origin = torch.zeros(rows, dtype=torch.int64, device=device)
    limit = torch.full((rows,), prompt + length, device=device)
    canvas = Canvas(torch.cat([prompt_ids, torch.full((rows, length), mask_id, device=device)], 1), prompt, origin, limit)
    forwards = torch.zeros(rows, dtype=torch.int64, device=device)
    if isinstance(geometry, InsertingGeometry) and loop.eos_id is not None:
        spare = torch.full((rows, geometry.capacity() - length), loop.eos_id, device=device)
        canvas = canvas._replace(tokens=torch.cat([canvas.tokens, spare], 1))
        canvas, forwards = geometry.prepare(canvas, loop.look, mask_id, loop.eos_id)
    start = torch.full((rows,), prompt, device=device)
    return Rows(
        index=torch.arange(rows, device=device),
        seeds=torch.tensor(list(seeds), dtype=torch.int64, device=device),
        canvas=canvas,
        extent=Extent(start, start, geometry.lengths(rows, device)),
        fresh=torch.ones(rows, dtype=torch.bool, device=device),
        done=torch.zeros(rows, dtype=torch.bool, device=device),
        clock=torch.zeros(rows, dtype=torch.int64, device=device),
        forwards=forwards,
        marks=torch.zeros_like(canvas.tokens),
        state=loop.schedule.init(rows, loop.width, device),
    )
