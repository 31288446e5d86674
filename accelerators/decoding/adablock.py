"""AdaBlock-dLLM (arXiv 2509.26432): a block ends where the sense does, at a delimiter the model already sees coming.

At the start of a block, among the next positions that predict a delimiter (a line break), the surest ends the block if it is sure enough.
The forward that tells is the block's first one, so that nothing is computed twice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_not_negative, check_whole
from hasten.accelerators.decoding.geometry import Canvas, Geometry
from hasten.accelerators.decoding.statistics import Statistics


@dataclass(frozen=True)
class AdaBlock(Geometry):
    """Blocks that end at delimiters. For models that see both ways; block-causal ones have the blocks they were trained with.

    Attributes:
        delimiters: Ids of tokens that end a block. (198,) is the line break of LLaDA's tokenizer, the published choice; 11 and 13 are its
            comma and full stop.
        threshold: Least confidence in the delimiter: 0.3 for LLaDA, 0.5 for Dream. Infinity is fixed blocks.
        block_length: Where no delimiter is found; 16, 32 and 64 in the paper. It is no upper bound.
        share: How far to look, as a share of the answer's length; 0.25.

    Raises:
        ValueError: A value is out of range.
    """

    delimiters: tuple[int, ...] = (198,)
    threshold: float = 0.3
    block_length: int = 32
    share: float = 0.25

    adapts = True

    def __post_init__(self) -> None:
        if not self.delimiters or any(type(token) is not int or token < 0 for token in self.delimiters):
            raise ValueError(f"delimiters must be at least one token id of at least 0, not {self.delimiters!r}")
        check_not_negative(threshold=self.threshold)
        check_whole(1, block_length=self.block_length)
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be above 0 and at most 1, not {self.share!r}")

    def lengths(self, rows: int, device: torch.device) -> Tensor:
        return torch.full((rows,), self.block_length, device=device)

    def width(self, length: int) -> int:
        return max(self.block_length, int(self.share * length))

    def ends(self, canvas: Canvas, start: Tensor, length: Tensor, statistics: Statistics) -> Tensor:
        total = canvas.limit - canvas.prompt
        look = torch.minimum((self.share * total).floor().long(), canvas.limit - start)
        offset = torch.arange(statistics.best.shape[1], device=start.device)
        found = statistics.masked & (offset < look[:, None])
        found &= torch.stack([statistics.best == token for token in self.delimiters]).any(0)
        confidence, last = torch.where(found, statistics.p1, -1.0).max(-1)
        return start + torch.where(confidence >= self.threshold, last + 1, length)
