"""Video-T1's tree of frames (arXiv 2503.18942): a beam over the chunks of a video, with a verifier for each stage.

The first chunk is branched widely and judged as an image; the middle ones are judged by motion and pruned to few; the last one by the
whole video. Any function that continues a video by a chunk will do.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.task import Candidate, Found, Task
from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.loop import checked_micro_batch, micro_batches
from hasten.accelerators.steering.mixes import Panel
from hasten.accelerators.steering.report import ROOT, SearchReport
from hasten.accelerators.steering.verifiers import Verifier, as_verifier

STAGES = ("first", "middle", "final")

Extend = Callable[[Tensor | None, Tensor, int], Tensor]
"""From videos so far [n, F, ...] (None before the first chunk), noises [n, ...] and the chunk's number to the next chunks [n, f, ...]."""


class ChunkRequest(NamedTuple):
    """Chunks to generate and to judge, each at the end of its video so far."""

    prefixes: Tensor | None  # [N, F, ...]
    noises: Tensor  # [N, ...]
    chunk: int
    stage: str


class ChunkAnswer(NamedTuple):
    """The videos, longer by the chunk."""

    videos: Tensor  # [N, F + f, ...]
    scores: Tensor  # [N, V] float64 raw scores of them by the stage's verifier


Growth = Generator[ChunkRequest, ChunkAnswer, Candidate]


@dataclass(frozen=True)
class FrameTree:
    """A beam over chunks. The numbers of the paper could not be looked up; the defaults are ours.

    Attributes:
        branches: Continuations of every kept video at the first, at each middle and at the final chunk; the first chunk has so many in
            all.
        widths: Videos that are kept after each, never more than after the stage before.

    Raises:
        ValueError: There are not three numbers of at least 1 each, or the widths grow.
    """

    branches: tuple[int, int, int] = (8, 2, 2)
    widths: tuple[int, int, int] = (4, 2, 1)

    def __post_init__(self) -> None:
        for name in ("branches", "widths"):
            numbers = tuple(getattr(self, name))
            object.__setattr__(self, name, numbers)
            if len(numbers) != 3 or any(type(number) is not int or number < 1 for number in numbers):
                raise ValueError(f"{name} must be three whole numbers of at least 1 (first, middle, final), not {numbers!r}")
        if list(self.widths) != sorted(self.widths, reverse=True):
            raise ValueError(f"widths must not grow from stage to stage, not {self.widths!r}")

    def __str__(self) -> str:
        return f"tree of frames, branches {self.branches}, widths {self.widths}"

    def grow(self, task: Task, chunks: int, costs: Mapping[str, Cost]) -> Growth:
        """The search for one prompt.

        Args:
            task: Its steps are those of one chunk.
            chunks: Of the video.
            costs: Of one chunk at each stage.
        """
        rest = [sum((costs[stage_of(later, chunks)] for later in range(chunk + 1, chunks)), Cost()) for chunk in range(chunks)]
        beam: list[Candidate] = []
        for chunk in range(chunks):
            stage = stage_of(chunk, chunks)
            # A video of one chunk is judged by the final verifier, but branched like a first chunk.
            place = 0 if chunk == 0 else STAGES.index(stage)
            # Child by child and best first: where the budget cuts, every kept video has had its turn.
            kept: Sequence[Candidate | None] = beam or (None,)
            parents = [parent for _ in range(self.branches[place]) for parent in kept]
            found: list[Candidate] = []
            while len(found) < len(parents):
                count = self._affords(task, len(parents) - len(found), costs[stage], rest[chunk])
                if not count:
                    break
                part = parents[len(found) : len(found) + count]
                noises = task.fresh(count)
                prefixes = torch.stack([parent.latents for parent in part if parent is not None]) if beam else None
                answer = yield ChunkRequest(prefixes, noises, chunk, stage)
                nodes = [ROOT if parent is None else parent.node for parent in part]
                added = task.lineage.add(chunk, nodes, [float("nan")] * count, task.number)
                noise = [noises[i, None] if p is None else torch.cat([p.noise, noises[i, None]]) for i, p in enumerate(part)]
                rows = zip(noise, answer.videos, answer.scores, added, strict=True)
                found += [Candidate(made_of, task.path.top, video, video, scores, node) for made_of, video, scores, node in rows]
            if not found:
                task.warnings.append(f"the time ran out: the video ends after {chunk} of {chunks} chunks")
                break
            if len(found) < len(parents):
                task.warnings.append(f"the budget affords {len(found)} of {len(parents)} continuations at chunk {chunk}")
            beam = self._judged(task, found)[: self.widths[place]]
        return beam[0]

    def _affords(self, task: Task, rows: int, cost: Cost, reserve: Cost) -> int:
        # The first row goes alone where time is limited, and whatever the time: there must be something to return.
        if task.meter.budget.seconds is not None and task.meter.spent.particle_steps == 0:
            return 1
        return task.most(lambda count: cost * count + reserve, rows)

    def _judged(self, task: Task, found: list[Candidate]) -> list[Candidate]:
        values = task.values(torch.stack([candidate.scores for candidate in found]))
        for candidate, value in zip(found, values.tolist(), strict=True):
            task.lineage.nodes[candidate.node] = task.lineage.nodes[candidate.node]._replace(reward=value)
        return [found[i] for i in values.argsort(dim=0, descending=True, stable=True).tolist()]


def stage_of(chunk: int, chunks: int) -> str:
    """The stage of a chunk: final for the last one, even where it is the first too."""
    return "final" if chunk == chunks - 1 else "first" if chunk == 0 else "middle"


def grow_video(
    tree: FrameTree,
    extend: Extend,
    shape: Sequence[int],
    verifiers: Verifier | Callable[..., Tensor] | Mapping[str, Verifier | Callable[..., Tensor]],
    *,
    chunks: int,
    steps: int = 1,
    prompt: str | Mapping[str, str] = "",
    number: int = 0,
    budget: Budget | Meter | None = None,
    seed: int = 0,
    micro_batch: int | None = None,
    rows_per_step: int = 1,
) -> Found:
    """Grows one video. `Found.latents` is the video [F, ...], `Found.noise` its chunks' noises [chunks, ...].

    Args:
        tree: The settings.
        extend: Generates chunks. Deterministic, and a row's outcome must not depend on its batch-mates.
        shape: Of one chunk's noise.
        verifiers: One for "first", "middle" and "final" each, or one for all. They are given the video so far, [n, F, ...].
        chunks: Of the video.
        steps: Denoiser calls of a chunk.
        prompt: What the verifier is told, or by stage: Video-T1 asks something else at each.
        number: Of the prompt, which its noise depends on.
        budget: Of this search, or a meter that has one.
        seed: Same seed, same result, whatever the micro-batch.
        micro_batch: Rows at a time; None for all.
        rows_per_step: Denoiser rows that a row counts for.

    Raises:
        BudgetError: The budget does not suffice for one video.
        ValueError: A stage lacks its verifier or its prompt, or a number is out of range.
    """
    check_whole(1, chunks=chunks)
    judges = verifiers if isinstance(verifiers, Mapping) else dict.fromkeys(STAGES, verifiers)
    asked = prompt if isinstance(prompt, Mapping) else dict.fromkeys(STAGES, prompt)
    stages = {stage_of(chunk, chunks) for chunk in range(chunks)}
    for name, given in (("verifiers", judges), ("prompt", asked)):
        if not stages <= given.keys():
            raise ValueError(f"{name} must have an entry for {', '.join(sorted(stages - given.keys()))}; it has {', '.join(given)}")
    panels = {stage: Panel(as_verifier(judges[stage])) for stage in stages}
    meter, micro_batch = budget if isinstance(budget, Meter) else Meter(budget or Budget()), checked_micro_batch(micro_batch)
    task = Task(tuple(shape), steps, panels["final"], meter, asked["final"], number, seed, rows_per_step=rows_per_step)
    costs = {stage: Cost(steps, steps * rows_per_step, 1, panel.calls) for stage, panel in panels.items()}
    meter.require_sample(sum((costs[stage_of(chunk, chunks)] for chunk in range(chunks)), Cost()))
    growing = tree.grow(task, chunks, costs)
    try:
        request = next(growing)
        while True:
            task.panel, task.prompt = panels[request.stage], asked[request.stage]
            meter.charge(costs[request.stage] * len(request.noises))
            request = growing.send(_extended(request, task, extend, micro_batch))
    except StopIteration as end:
        best: Candidate = end.value
    report = SearchReport(str(tree), task.lineage, [[best.node]], meter, task.facts, task.warnings)
    return Found(best.latents, best.noise, best.level, best.scores, report)


def _extended(request: ChunkRequest, task: Task, extend: Extend, micro_batch: int | None) -> ChunkAnswer:
    videos, scores = [], []
    with torch.no_grad():
        for part in micro_batches(len(request.noises), micro_batch):
            prefixes = None if request.prefixes is None else request.prefixes[part]
            with task.meter.timing("denoise"):
                made = extend(prefixes, request.noises[part], request.chunk).cpu()
            videos.append(made if prefixes is None else torch.cat([prefixes, made], 1))
            with task.meter.timing("verify"):
                scores.append(task.panel.scores(videos[-1], [task.prompt] * len(made)).to("cpu", torch.float64))
    return ChunkAnswer(torch.cat(videos), torch.cat(scores))
