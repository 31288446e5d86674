"""Decoding batches with a cache: the same tokens from less work.

Rows leave the batch when they are done. Nothing is read back from the device but once in a few forwards: which rows are done, and where the
others are. A row that is done before that is known stays as it is, and what is computed for it is counted as wasted.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.cache import Memory
from hasten.accelerators.decoding.cached_loop import APPROXIMATE, EXACT, CachedLoop, Track
from hasten.accelerators.decoding.compatibility import Cache, refuse
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.generate import Collector, Decoded, Loop, Rows, begin, check
from hasten.accelerators.decoding.geometry import FixedBlocks, Geometry, InsertingGeometry, window, written
from hasten.accelerators.decoding.models import CausalLM, LanguageModel
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.statistics import Sampling, Statistics

MASKED, GUESSED, COMMITTED, FINAL = range(4)
"""What a token is after a step: a mask; a mask that the model would fill so; committed, but it may be revised, or cut off by an end-of-text
in front of it; there to stay."""


@dataclass(frozen=True)
class Generated(Decoded):
    """Answers, and what they cost.

    Attributes:
        forwards: int64 [R], forwards of the model that a row was part of until it was done; those that only cached a finished block count.
        wasted: int64 [R], further forwards that it was in for nothing: it was done and that was not known yet, or it waited for its cache
            to be refreshed.
        calls: Of the model, for the whole batch.
        read_backs: After how many of them the host waited for the device.
    """

    wasted: Tensor
    calls: int
    read_backs: int


@dataclass(frozen=True)
class Step:
    """The rows of the batch after a step of the loop.

    Attributes:
        index: int64 [r], which rows they are.
        tokens: int64 [r, n], generated tokens, with the model's guess at masks that it was asked about.
        marks: int64 [r, n], for each what it is: MASKED, GUESSED, COMMITTED or FINAL.
        clock: int64 [r], steps of the schedule so far.
        done: bool [r].
    """

    index: Tensor
    tokens: Tensor
    marks: Tensor
    clock: Tensor
    done: Tensor


@dataclass(frozen=True)
class Batched:
    """One forward of the batch for each step; what rows are done is read back once in a few forwards.

    Attributes:
        schedule: What is carried out.
        every: Forwards between two read-backs.
    """

    schedule: Schedule
    every: int = 4

    def check(self, geometry: Geometry) -> None:
        refuse(self.schedule, geometry=geometry)

    def run(self, loop: Loop, rows: Rows) -> Generated:
        """Decodes all rows."""
        steps = self.steps(loop, rows, watched=False)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                result: Generated = end.value
                return result

    def steps(self, loop: Loop, rows: Rows, watched: bool = True) -> Generator[Step | None, None, Generated]:
        """Decodes all rows, stopping after each step; `watched` says whether anybody wants to see them."""
        collector = Collector(rows, loop.eos_id, loop.geometry.inserts)
        wasted, read_backs, calls = torch.zeros_like(rows.forwards), 0, 0
        while len(rows.index):
            for _ in range(self.every):
                before = rows
                logits, rows = loop.forward(before)
                wasted = wasted.index_add(0, rows.index, 1 - (rows.forwards - before.forwards))
                after, statistics = loop.transition(rows, logits)
                rows = after if logits.ready is None else after.where(logits.ready, rows)
                calls += 1
                yield _step(loop, before, rows, statistics, logits.ready) if watched else None
            flags, read_backs = rows.done.long()[None], read_backs + 1
            if isinstance(loop, CachedLoop):
                flags = torch.cat([flags, loop.numbers(rows)])
            done, *numbers = flags.tolist()
            left = [place for place, flag in enumerate(done) if not flag]
            keep = None
            if len(left) < len(done):
                ended = [place for place, flag in enumerate(done) if flag]
                collector.keep(rows, torch.tensor(ended, device=rows.index.device))
                keep = torch.tensor(left, dtype=torch.int64, device=rows.index.device)
                rows = rows.reindex(keep)
            if left and isinstance(loop, CachedLoop):
                loop.note([[values[place] for place in left] for values in numbers], keep, rows.canvas.tokens.shape[1])
        found = collector.result()
        calls = loop.track.calls if isinstance(loop, CachedLoop) else calls
        return Generated(found.tokens, found.lengths, found.forwards, found.steps, wasted, calls, read_backs)


def _step(loop: Loop, before: Rows, rows: Rows, statistics: Statistics, ready: Tensor | None) -> Step:
    """What can be seen of a step: the tokens with the guesses, and what each of them is."""
    canvas, start, mask_id = rows.canvas, before.extent.start, loop.sampling.mask_id
    shown = canvas.tokens.gather(1, window(canvas, start, loop.width))
    asked = shown == mask_id
    if ready is not None:
        asked = asked & ready[:, None]
    tokens = written(canvas, start, torch.where(asked, statistics.tokens, shown)).tokens
    masked = canvas.tokens == mask_id
    final = rows.done[:, None] | (canvas.columns < rows.extent.start[:, None])
    if not loop.schedule.revises:
        final = final | (masked.cumsum(-1) == 0)
    marks = torch.where(final, FINAL, COMMITTED)
    marks = torch.where(masked, torch.where(tokens == mask_id, MASKED, GUESSED), marks)
    return Step(rows.index, tokens[:, canvas.prompt :], marks[:, canvas.prompt :], rows.clock, rows.done)


@dataclass(frozen=True)
class Engine:
    """Decodes batches with one model, one schedule and one cache.

    Attributes:
        model: The model in its adapter.
        schedule: What is committed at which step, or FreeDave, which holds a schedule.
        geometry: Where the blocks are.
        cache: "block-append" for block-causal models, exact; "prefix", "dual" and "vicinity" for those that see both ways, approximate;
            "none" forwards whole rows.
        every: Forwards between two read-backs. A row that is done is taken out at the next one. FreeDave reads back at every forward.
        wide_cost: What a forward of two blocks costs, in forwards of one. None is 2 on a CPU, where time goes with the columns, and 1
            elsewhere, where a forward of few columns reads weights for most of its time.

    Raises:
        ValueError: These do not go together; the message says why.
    """

    model: LanguageModel
    schedule: Schedule | FreeDave
    geometry: Geometry = FixedBlocks()  # noqa: RUF009  frozen
    cache: Cache = "none"
    every: int = 4
    wide_cost: float | None = None

    def __post_init__(self) -> None:
        check_whole(1, every=self.every)
        if self.wide_cost is not None and not self.wide_cost >= 1:
            raise ValueError(f"wide_cost must be a number of at least 1 or None, not {self.wide_cost!r}")
        if self.cache not in (*EXACT, *APPROXIMATE):
            known = ", ".join((*EXACT, *APPROXIMATE))
            raise ValueError(f"cache must be one of {known}, not {self.cache!r}" + " (it is not built)" * (self.cache in get_args(Cache)))
        schedule, place, sees = self.executor.schedule, type(self.geometry).__name__, self.model.attention
        refuse(schedule, geometry=self.geometry, cache=self.cache, drafts=isinstance(self.schedule, FreeDave))
        if self.cache != "none" and not isinstance(self.model, CausalLM):
            raise ValueError(f"cache must be 'none' for {type(self.model).__name__}: its published code keeps no keys of chosen columns")
        if self.cache == "block-append" and sees == "bidirectional":
            raise ValueError("cache='block-append' needs attention='block-causal'; for a bidirectional model pass 'none' or 'dual'")
        if self.cache in APPROXIMATE and sees == "block-causal":
            raise ValueError(f"cache={self.cache!r} is for bidirectional models; a block-causal one has 'block-append', which is exact")
        if self.cache in APPROXIMATE and isinstance(self.schedule, FreeDave):
            raise ValueError(f"FreeDave cannot use cache={self.cache!r}: logits of a draft are not those of the step that it stands for")
        if sees == "block-causal" and not isinstance(self.geometry, FixedBlocks):
            raise ValueError(f"{place} needs a bidirectional model: block-causal ones see blocks of the length they were trained with")
        if schedule.needs.shadow and (not isinstance(self.model, CausalLM) or self.model.shifted):
            raise ValueError(f"{type(schedule).__name__} needs a model of transformers without shifted logits, to give it a shadow block")

    @property
    def exact(self) -> bool:
        """Whether the tokens are those that there would be without a cache."""
        return self.cache in EXACT

    @property
    def executor(self) -> Batched | FreeDave:
        """What carries the schedule out."""
        return self.schedule if isinstance(self.schedule, FreeDave) else Batched(self.schedule, self.every)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        length: int | None = None,
        eos_id: int | None = None,
        seeds: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Generated:
        """Answers to prompts.

        Args:
            prompts: Token ids of each, of any length.
            device: Of the model.
            sampling, length, eos_id, seeds: As in `decode`.

        Raises:
            ValueError: As in `decode`; also where a prompt is empty, or a prompt and its answer are longer than the model's context.
        """
        with torch.no_grad():
            loop, rows = self._begun(prompts, sampling, length, eos_id, seeds, device)
            if isinstance(self.executor, Batched):
                return self.executor.run(loop, rows)
            found, track = self.executor.run(loop, rows), getattr(loop, "track", None)
            calls = int(found.forwards.max()) if track is None else track.calls
            return Generated(
                found.tokens, found.lengths, found.forwards, found.steps, torch.zeros_like(found.forwards), calls, read_backs=calls
            )

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: Sampling,
        length: int | None = None,
        eos_id: int | None = None,
        seeds: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Generator[Step, None, Generated]:
        """As `generate`, stopping after each step of the batch.

        Raises:
            ValueError: Likewise; and FreeDave, which takes several steps at once and tells of none.
        """
        if isinstance(self.schedule, FreeDave):
            raise ValueError("FreeDave cannot be streamed: it takes several steps in a forward; stream its schedule by itself")
        with torch.no_grad():
            loop, rows = self._begun(prompts, sampling, length, eos_id, seeds, device)
        steps = Batched(self.schedule, self.every).steps(loop, rows)
        while True:
            try:
                with torch.no_grad():  # not around the yield, where other people's code runs
                    step = next(steps)
            except StopIteration as end:
                result: Generated = end.value
                return result
            assert step is not None  # it is watched
            yield step

    def _begun(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        length: int | None,
        eos_id: int | None,
        seeds: Sequence[int] | None,
        device: torch.device | str | None,
    ) -> tuple[Loop, Rows]:
        """The loop, and the rows before the first step."""
        executor, geometry, model = self.executor, self.geometry, self.model
        if not prompts or not all(map(len, prompts)):
            raise ValueError("prompts must be at least one, of at least one token each")
        longest = max(map(len, prompts))
        prompt_ids = torch.tensor([[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts], device=device)
        origin = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
        length = check(prompt_ids, executor, geometry, length, eos_id)
        most = geometry.capacity() if isinstance(geometry, InsertingGeometry) else length
        total = longest + most
        if model.context is not None and total > model.context:
            raise ValueError(
                f"prompt and answer take {longest} + {most} positions and the model's context has {model.context}: "
                "pass a shorter prompt or a shorter answer"
            )
        width, schedule = geometry.width(length), executor.schedule
        shadow_fn = model.shadow(sampling.mask_id) if schedule.needs.shadow and isinstance(model, CausalLM) else None
        plain = Loop(model, schedule, geometry, sampling, width, eos_id, shadow_fn)
        rows = begin(plain, prompt_ids, length, origin, seeds)
        if not isinstance(model, CausalLM) or (self.cache == "none" and model.attention == "bidirectional"):
            return plain, rows
        prompt = rows.canvas.prompt
        track = Track(
            memory=Memory(len(prompts), total + 1 + (width if shadow_fn is not None else 0)),
            cached=torch.zeros_like(rows.index),
            low=0,
            high=min(prompt + width, total),
            first=prompt,
        )
        cost = self.wide_cost if self.wide_cost is not None else 2.0 if prompt_ids.device.type == "cpu" else 1.0
        loop = CachedLoop(
            plain.logits_fn,
            schedule,
            geometry,
            sampling,
            width,
            eos_id,
            shadow_fn,
            model=model,
            cache=self.cache,
            track=track,
            drafting=isinstance(executor, FreeDave),
            wide_cost=cost,
        )
        return loop, rows
