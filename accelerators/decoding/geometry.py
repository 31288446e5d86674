"""Where the blocks of a row are. Blocks are decoded from left to right, and only masks of the present one may be committed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.decoding.statistics import Statistics


class Canvas(NamedTuple):
    """The rows that are decoded: padding on the left, prompt, generated tokens, padding on the right.

    Attributes:
        tokens: int64 [R, L].
        prompt: Columns before the first generated one, the same for all rows.
        origin: int64 [R], the first column that is not padding.
        limit: int64 [R], the column after the last generated one.
    """

    tokens: Tensor
    prompt: int
    origin: Tensor
    limit: Tensor

    @property
    def columns(self) -> Tensor:
        """0 to L - 1, [L]."""
        return torch.arange(self.tokens.shape[1], device=self.tokens.device)

    @property
    def valid(self) -> Tensor:
        """bool [R, L]: not padding."""
        return (self.columns >= self.origin[:, None]) & (self.columns < self.limit[:, None])

    @property
    def generated(self) -> Tensor:
        """bool [R, L]: neither padding nor prompt."""
        return (self.columns >= self.prompt) & (self.columns < self.limit[:, None])


class Extent(NamedTuple):
    """Where a block is, int64 [R] each: from column `start` up to, not including, `end`. `length` is that of a regular block."""

    start: Tensor
    end: Tensor
    length: Tensor


class Geometry(ABC):
    """Says where blocks begin and end.

    Attributes:
        adapts: Whether the length of a block depends on the logits.
        inserts: Whether the canvas may grow; such a geometry is an `InsertingGeometry`.
    """

    adapts: ClassVar[bool] = False
    inserts: ClassVar[bool] = False

    def answer_length(self, length: int | None) -> int:
        """Masks to begin with, given what the caller asked for.

        Raises:
            ValueError: The caller must say, or must not.
        """
        if type(length) is not int or length < 1:
            raise ValueError(f"length must be a whole number of at least 1, not {length!r}")
        return length

    @abstractmethod
    def lengths(self, rows: int, device: torch.device) -> Tensor:
        """Length of a regular block in each row, int64 [R]."""

    @abstractmethod
    def width(self, length: int) -> int:
        """Columns from the start of a block whose statistics are needed: the longest block at least. `length` is that of the answer."""

    @abstractmethod
    def ends(self, canvas: Canvas, start: Tensor, length: Tensor, statistics: Statistics) -> Tensor:
        """The column after the last of a block that begins now, int64 [R]; it may lie beyond the row's limit.

        Args:
            start: int64 [R], the block's first column.
            length: int64 [R], of a regular block.
            statistics: Of the window of `width` columns from `start` on, in the block's first forward. No transform was applied.
        """


class InsertingGeometry(Geometry):
    """A geometry that also says how long an answer is: masks are added, before the first step and between steps."""

    inserts = True

    @abstractmethod
    def capacity(self) -> int:
        """Columns for generated tokens that a row may come to need."""

    @abstractmethod
    def prepare(self, canvas: Canvas, look: Callable[[Canvas], Statistics], mask_id: int, eos_id: int) -> tuple[Canvas, Tensor]:
        """The canvas with the masks to begin with, and the forwards that this took, int64 [R].

        Args:
            canvas: Of full capacity, with the first masks in place and end-of-text behind them.
            look: Statistics of the generated columns up to the longest row's limit.
            mask_id, eos_id: The mask token and end-of-text.
        """

    @abstractmethod
    def insert(
        self, canvas: Canvas, start: Tensor, unfilled: Tensor, statistics: Statistics, everything: Statistics, mask_id: int, eos_id: int
    ) -> tuple[Canvas, Tensor]:
        """The canvas with further masks, and where each position of the window was before, int64 [R, W]; -1 for a new one.

        Args:
            canvas: After the step's decision.
            start: int64 [R], the first column of the window.
            unfilled: bool [R, W], masks of the block that the step has left.
            statistics: Of the window, before the decision.
            everything: Of the generated columns, likewise.
            mask_id, eos_id: The mask token and end-of-text.
        """


@dataclass(frozen=True)
class FixedBlocks(Geometry):
    """Blocks of one length, or of one for each row.

    Attributes:
        block_length: 32 for LLaDA and LLaDA2, 4 for SDAR and TraDo; a tuple has one for each row.
        aligned: Blocks are counted from the row's first token, as block-causal models were trained, and the first one may hold the end of
            the prompt; else from the first generated token.

    Raises:
        ValueError: A length is below 1.
    """

    block_length: int | tuple[int, ...] = 32
    aligned: bool = False

    def __post_init__(self) -> None:
        for length in self._all:
            if type(length) is not int or length < 1:
                raise ValueError(f"block_length must be whole numbers of at least 1, not {self.block_length!r}")
        if not self._all:
            raise ValueError("block_length must have an entry for each row, not none")

    @property
    def _all(self) -> tuple[int, ...]:
        return self.block_length if isinstance(self.block_length, tuple) else (self.block_length,)

    def lengths(self, rows: int, device: torch.device) -> Tensor:
        if not isinstance(self.block_length, tuple):
            return torch.full((rows,), self.block_length, device=device)
        if len(self.block_length) != rows:
            raise ValueError(f"block_length must have an entry for each of the {rows} rows, not {len(self.block_length)}")
        return torch.tensor(self.block_length, device=device)

    def width(self, length: int) -> int:
        return max(self._all)

    def ends(self, canvas: Canvas, start: Tensor, length: Tensor, statistics: Statistics) -> Tensor:
        return start + length - (start - canvas.origin) % length if self.aligned else start + length


def advanced(canvas: Canvas, extent: Extent, settled: Tensor, mask_id: int) -> tuple[Extent, Tensor]:
    """Where the rows go after a step, and which of them have nothing left to do.

    A row whose block is settled goes on to the next block that has masks; whole blocks without any are passed over.

    Args:
        settled: bool [R].
        mask_id: The mask token.

    Returns:
        The extent, in which `end` is only that of rows which stay, and bool [R].
    """
    masks = (canvas.tokens == mask_id) & canvas.generated
    left = masks.any(-1)
    first = masks.int().argmax(-1)
    skipped = ((first - extent.end) // extent.length).clamp(min=0)
    start = torch.where(settled & left, extent.end + skipped * extent.length, extent.start)
    return extent._replace(start=start), settled & ~left


def window(canvas: Canvas, start: Tensor, width: int) -> Tensor:
    """Columns of the windows that begin at `start`, int64 [R, width]; beyond the last column that one again."""
    return (start[:, None] + torch.arange(width, device=start.device)).clamp(max=canvas.tokens.shape[1] - 1)


def written(canvas: Canvas, start: Tensor, tokens: Tensor) -> Canvas:
    """The canvas with the tokens [R, W] of a window in their place; what lies beyond the last column is dropped."""
    offset = canvas.columns - start[:, None]
    inside = (offset >= 0) & (offset < tokens.shape[1])
    spread = tokens.gather(1, offset.clamp(0, tokens.shape[1] - 1))
    return canvas._replace(tokens=torch.where(inside, spread, canvas.tokens))
