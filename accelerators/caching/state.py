"""How stored values lie in memory: as they are, or in 8 bits with a scale for every token.

Memory is what users of caching complain about most: FLUX keeps 28 MB for each branch and span at 1024x1024, a part-wise method a hundred
times that. Eight bits halve it against bfloat16. Corrections that are calibrated with quantised state absorb the error's mean.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

KINDS = ("int8", "fp8")


@dataclass(frozen=True, eq=False)
class Packed:
    """A tensor in 8 bits.

    Attributes:
        values: int8 or float8_e4m3fn, of the tensor's shape.
        scale: float32 [..., 1], of every token.
        dtype: Of the tensor.
    """

    values: Tensor
    scale: Tensor
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor, kind: str) -> Packed:
        """Packs a tensor [..., channels]. A row that is not finite has a scale that is not finite."""
        most = tensor.abs().amax(-1, keepdim=True).float()
        if kind == "int8":
            scale = (most / 127).clamp_min(1e-12)
            values = (tensor / scale).round().nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
        else:
            scale = (most / 448).clamp_min(1e-12)
            values = (tensor / scale).nan_to_num(0.0).clamp(-448, 448).to(torch.float8_e4m3fn)
        return cls(values, scale, tensor.dtype)

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scale.nbytes

    def read(self) -> Tensor:
        """The tensor, rounded."""
        return (self.values.to(torch.float32) * self.scale).to(self.dtype)

    def index_select(self, dim: int, rows: Tensor) -> Packed:
        """Some rows of it."""
        rows = rows.to(self.scale.device)
        values = self.values.view(torch.int8).index_select(dim, rows).view(self.values.dtype)
        return Packed(values, self.scale.index_select(dim, rows), self.dtype)


Kept = Tensor | Packed
"""A stored value."""


def as_is(tensor: Tensor) -> Kept:
    """Keeps a value as it is."""
    return tensor


def packer(kind: str | None) -> Callable[[Tensor], Kept]:
    """What is done to a value that is stored.

    Raises:
        ValueError: `kind` is neither None nor one of `KINDS`.
    """
    if kind is None:
        return as_is
    if kind not in KINDS:
        raise ValueError(f"state must be one of {', '.join(KINDS)} or None, not {kind!r}")
    # Scales and shifts, single numbers and whole ones are no activations.
    return lambda tensor: Packed.of(tensor, kind) if tensor.is_floating_point() and tensor.ndim > 1 else tensor


def read(kept: Kept) -> Tensor:
    """The value."""
    return kept.read() if isinstance(kept, Packed) else kept


def moved(kept: Kept, rows: Tensor, batch: int | None = None) -> Kept:
    """Some rows of it; where `batch` is given and it has another number of rows, all of it."""
    if batch is not None and len(kept.scale if isinstance(kept, Packed) else kept) != batch:
        return kept
    return kept.index_select(0, rows.to(kept.scale.device if isinstance(kept, Packed) else kept.device))


def probe(kept: Kept) -> Tensor:
    """What is finite if and only if the value was."""
    return kept.scale if isinstance(kept, Packed) else kept


def unpacked(value: Any) -> Any:
    """A nest of tuples and lists with everything read."""
    if isinstance(value, Packed):
        return value.read()
    if type(value) in (tuple, list):
        return type(value)(unpacked(entry) for entry in value)
    return value
