"""FreeDave, free draft-and-verify (arXiv 2510.00294): the tokens of a step-by-step schedule from fewer forwards in a row.

One set of logits yields several drafts, each with one more of the surest positions filled. All are evaluated in one forward. The schedule
is then followed from draft to draft for as long as the step it takes from one leads exactly to another, whose logits are there already.

The published form verifies a static schedule in a batch of one. Here the rows verify their own drafts, and any schedule without revisions
can be verified, since its state is carried along the path that it takes itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.decoding.compatibility import refuse
from hasten.accelerators.decoding.generate import Collector, Decoded, Logits, Loop, Rows
from hasten.accelerators.decoding.geometry import Geometry, advanced, window, written
from hasten.accelerators.decoding.quota import rank
from hasten.accelerators.decoding.schedule import Schedule
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Statistics

Agreement = Literal["exact", "subset"]
"""When a draft may stand for the step that the schedule takes: if it is the same, or if the step has the same and more."""


@dataclass(frozen=True)
class FreeDave:
    """An executor: `decode(model, prompts, FreeDave(drafts=4), ...)`.

    With "exact" the tokens are those of the schedule, in the same arithmetic: forwards of another batch size may round otherwise. Noise is
    keyed by row, position and step, so that this holds for sampled tokens too. Every forward makes at least the progress of one step.

    Attributes:
        schedule: What is carried out; `StaticDecoding()` unless told. It must not revise tokens.
        drafts: Evaluated at once: 4 for LLaDA and 8 for Dream, TraDo and SDAR in the published code. 1 is the schedule step by step.
        agreement: "subset" is the published rule for schedules that commit several tokens in a step (FreeDave++); it gives up exactness.

    Raises:
        ValueError: A value is out of range, or the schedule revises.
    """

    schedule: Schedule = field(default_factory=StaticDecoding)
    drafts: int = 4
    agreement: Agreement = "exact"

    def __post_init__(self) -> None:
        check_whole(1, drafts=self.drafts)
        if self.agreement not in get_args(Agreement):
            raise ValueError(f"agreement must be one of {', '.join(get_args(Agreement))}, not {self.agreement!r}")
        refuse(self.schedule, drafts=True)

    def check(self, geometry: Geometry) -> None:
        refuse(self.schedule, geometry=geometry, drafts=True)

    def run(self, loop: Loop, rows: Rows) -> Decoded:
        collector = Collector(rows, loop.eos_id)
        logits, rows = loop.forward(rows)
        while True:
            before = rows
            rows, statistics = loop.transition(rows, logits)
            keep = collector.take(rows)
            if not len(keep):
                return collector.result()
            rows, before = rows.reindex(keep), before.reindex(keep)
            branches = self._branches(loop, before, rows, statistics.reindex(keep))
            evaluated, _ = loop.forward(branches)
            rows = replace(rows, forwards=rows.forwards + 1)
            rows, reached = self._followed(loop, rows, branches, evaluated.window)
            logits = Logits(reached)

    def _branches(self, loop: Loop, before: Rows, rows: Rows, statistics: Statistics) -> Rows:
        """The drafts of all rows, those of a row next to each other: the step itself, and ever more positions of its block filled."""
        start, mask_id = before.extent.start, loop.sampling.mask_id
        current = rows.canvas.tokens.gather(1, window(rows.canvas, start, loop.width))
        last = torch.minimum(rows.extent.end, rows.canvas.limit)
        inside = start[:, None] + torch.arange(loop.width, device=start.device) < last[:, None]
        # Where a block begins now, the old one is full: nothing is known of the new one yet, and the drafts are all alike.
        masked = inside & (current == mask_id)
        place = rank(statistics.score("low_confidence"), masked)
        tokens, starts = [], []
        for extra in range(self.drafts):
            filled = masked & (place < extra)
            canvas = written(rows.canvas, start, torch.where(filled, statistics.tokens, current))
            full = ~rows.fresh & ~(masked & ~filled).any(-1)
            tokens.append(canvas.tokens)
            starts.append(advanced(canvas, rows.extent, full, mask_id)[0].start)
        wide = rows.reindex(torch.arange(len(start), device=start.device).repeat_interleave(self.drafts))
        return replace(
            wide,
            canvas=wide.canvas._replace(tokens=torch.stack(tokens, 1).flatten(0, 1)),
            extent=wide.extent._replace(start=torch.stack(starts, 1).flatten()),
        )

    def _followed(self, loop: Loop, rows: Rows, branches: Rows, logits: Tensor) -> tuple[Rows, Tensor]:
        """Where the schedule leads through the drafts, and the logits [r, W, V] of where each row has come to."""
        every = torch.arange(len(rows.index), device=logits.device) * self.drafts
        drafts = branches.canvas.tokens.unflatten(0, (-1, self.drafts))
        left = (drafts == loop.sampling.mask_id).sum(-1)
        best = torch.zeros_like(every)
        for _ in range(self.drafts - 1):
            ahead, _ = loop.transition(rows, Logits(logits[every + best]))
            same = drafts == ahead.canvas.tokens[:, None]
            agrees = same if self.agreement == "exact" else same | (drafts == loop.sampling.mask_id)
            agrees = agrees.all(-1) & (left < left.gather(1, best[:, None]))
            found, furthest = agrees.any(-1), left.masked_fill(~agrees, torch.iinfo(left.dtype).max).argmin(-1)
            there = branches.reindex(every + furthest)
            # The step may have more than the draft that stands for it; then that draft has not filled the block yet.
            short = ~same.all(-1).gather(1, furthest[:, None])[:, 0]
            no = torch.zeros_like(short)
            drafted = replace(ahead, canvas=there.canvas, extent=there.extent, fresh=no, done=no)
            rows = drafted.where(short, ahead).where(found, rows)
            best = torch.where(found, furthest, best)
        return rows, logits[every + best]
