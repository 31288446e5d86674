"""DAEDAL (arXiv 2508.00819): the length of the answer is found while it is written, from how sure the model is that it ends in time.

Before the first step the row of masks grows until its tail predicts end-of-text. Later, where the end is in doubt, the least certain mask
of the block becomes several: there is more to be said at that place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.decoding.geometry import Canvas, InsertingGeometry
from hasten.accelerators.decoding.quota import top
from hasten.accelerators.decoding.statistics import Statistics


@dataclass(frozen=True)
class DAEDAL(InsertingGeometry):
    """Answers of variable length. Together with `ThresholdDecoding(0.9)` this is the published method.

    It needs logits of the whole answer at every step, no cache, and a model that was trained with end-of-text as padding. How many forwards
    the first stage takes is read back from the device, as is the longest row in each step.

    Attributes:
        initial_length: Masks to begin with; 64.
        max_length: Longest answer, the closing end-of-text tokens not counted; 2048.
        block_length: 32.
        expansion: Masks that are added to a row in the first stage, and that one mask becomes in the second; 8.
        eos_threshold: The row grows while its end-of-text confidence is below; 0.5.
        expand_eos_threshold: Masks are inserted while it is below; 0.9.
        low: Only a mask whose best token has less probability than this is expanded; 0.1.
        eos_window: Predictions of end-of-text that are looked at, from the end of the row; 32. Half as many end-of-text tokens close the
            row after the first stage; they count as its end from then on, which the source of these numbers leaves open.

    Raises:
        ValueError: A value is out of range.
    """

    initial_length: int = 64
    max_length: int = 2048
    block_length: int = 32
    expansion: int = 8
    eos_threshold: float = 0.5
    expand_eos_threshold: float = 0.9
    low: float = 0.1
    eos_window: int = 32

    def __post_init__(self) -> None:
        check_whole(1, initial_length=self.initial_length, max_length=self.max_length)
        check_whole(1, block_length=self.block_length, eos_window=self.eos_window)
        check_whole(2, expansion=self.expansion)
        if self.initial_length > self.max_length:
            raise ValueError(f"initial_length must be at most max_length, {self.max_length}, not {self.initial_length}")
        check_not_negative(eos_threshold=self.eos_threshold, expand_eos_threshold=self.expand_eos_threshold, low=self.low)

    @property
    def tail(self) -> int:
        """End-of-text tokens that close a row."""
        return self.eos_window // 2

    def answer_length(self, length: int | None) -> int:
        if length is not None:
            raise ValueError(f"length must be None under DAEDAL, which finds it (initial_length and max_length), not {length!r}")
        return self.initial_length

    def lengths(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows,), self.block_length, device=device)

    def width(self, length: int) -> int:
        return self.block_length

    def ends(self, canvas: Canvas, start: Tensor, length: Tensor, statistics: Statistics) -> Tensor:
        return start + length

    def capacity(self) -> int:
        return self.max_length + self.tail

    def prepare(self, canvas: Canvas, look: Callable[[Canvas], Statistics], mask_id: int, eos_id: int) -> tuple[Canvas, Tensor]:
        most = canvas.prompt + self.max_length
        growing = torch.ones_like(canvas.limit, dtype=torch.bool)
        forwards = torch.zeros_like(canvas.limit)
        while True:
            short = self._confidence(canvas, look(canvas), eos_id) < self.eos_threshold
            forwards = forwards + growing
            growing = growing & short & (canvas.limit < most)
            if not growing.any():
                break
            limit = torch.where(growing, (canvas.limit + self.expansion).clamp(max=most), canvas.limit)
            added = (canvas.columns >= canvas.limit[:, None]) & (canvas.columns < limit[:, None])
            canvas = canvas._replace(tokens=canvas.tokens.masked_fill(added, mask_id), limit=limit)
        return canvas._replace(limit=canvas.limit + self.tail), forwards

    def insert(
        self, canvas: Canvas, start: Tensor, unfilled: Tensor, statistics: Statistics, everything: Statistics, mask_id: int, eos_id: int
    ) -> tuple[Canvas, Tensor]:
        extra = self.expansion - 1
        room = canvas.limit + extra <= canvas.prompt + self.capacity()
        wanted = room & (self._confidence(canvas, everything, eos_id) < self.expand_eos_threshold)
        weak = unfilled & (statistics.p1 < self.low) & wanted[:, None]
        chosen = top(-statistics.p1, weak, 1)
        inserts, place = chosen.any(-1), chosen.int().argmax(-1)

        def moved(index: Tensor, at: Tensor) -> Tensor:
            """Where each place was before masks came in behind place `at`; -1 for those."""
            behind = inserts[:, None] & (index > at[:, None])
            before = torch.where(behind, index - extra, index.expand(len(at), -1))
            return before.masked_fill(behind & (index <= at[:, None] + extra), -1)

        source = moved(canvas.columns, start + place)
        tokens = canvas.tokens.gather(1, source.clamp(min=0)).masked_fill(source < 0, mask_id)
        grown = canvas._replace(tokens=tokens, limit=canvas.limit + extra * inserts)
        return grown, moved(torch.arange(unfilled.shape[1], device=place.device), place)

    def _confidence(self, canvas: Canvas, everything: Statistics, eos_id: int) -> Tensor:
        """Mean probability of end-of-text over the last `eos_window` positions that predict it, [R]; what is missing counts as 0."""
        ends = canvas.generated[:, canvas.prompt : canvas.prompt + everything.best.shape[1]] & (everything.best == eos_id)
        counted = ends & (ends.flip(-1).cumsum(-1).flip(-1) <= self.eos_window)
        return torch.where(counted, everything.p1, 0).sum(-1) / self.eos_window
