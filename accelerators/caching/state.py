"""How stored values lie in memory: as they are, or in 8 bits with a scale for every token.

Memory is what users of caching complain about most: FLUX keeps 28 MB for each branch and span at 1024x1024, a part-wise method a hundred
times that. Eight bits halve it against bfloat16. Corrections that are calibrated with quantised state absorb the error's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.fusing import fuses
from hasten.kernels import ops, reference

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
        quantise = ops.quantise_rows if tensor.dtype in ops.STREAMS and fuses(tensor) else reference.quantise_rows
        return cls(*quantise(tensor, kind), tensor.dtype)

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


@dataclass(frozen=True)
class Packer:
    """What is done to a value that is stored.

    Attributes:
        kind: One of `KINDS`, or None to keep values as they are.

    Raises:
        ValueError: `kind` is neither.
    """

    kind: str | None = None

    def __post_init__(self) -> None:
        if self.kind is not None and self.kind not in KINDS:
            raise ValueError(f"state must be one of {', '.join(KINDS)} or None, not {self.kind!r}")

    def __call__(self, value: Kept) -> Kept:
        """The value as it is stored; what is packed already stays as it is."""
        if self.kind is None or isinstance(value, Packed) or not self._packs(value):
            return value
        return Packed.of(value, self.kind)

    def difference(self, after: Tensor, before: Tensor) -> Packed | None:
        """`after - before`, subtracted and packed in one pass; None where no fused kernel does that."""
        if self.kind is None or not self._packs(after) or after.dtype not in ops.STREAMS or after.dtype != before.dtype:
            return None
        if not fuses(after, before):
            return None
        values, scale = ops.delta_store(after, before, self.kind)
        assert scale is not None
        return Packed(values, scale, after.dtype)

    @staticmethod
    def _packs(value: Tensor) -> bool:
        # Scales and shifts, single numbers and whole ones are no activations.
        return value.is_floating_point() and value.ndim > 1


AS_IS = Packer()
"""Keeps values as they are."""


def read(kept: Kept) -> Tensor:
    """The value."""
    return kept.read() if isinstance(kept, Packed) else kept


def mapped(value: Any, made: Callable[[Any], Any]) -> Any:
    """A nest of dicts, tuples and lists with its tensors, packed or not, replaced."""
    if isinstance(value, Tensor | Packed):
        return made(value)
    if type(value) is dict:
        return {key: mapped(entry, made) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, made) for entry in value)
    return value


def kept_in(value: Any) -> list[Kept]:
    """The tensors of a nest, packed or not."""
    found: list[Kept] = []
    mapped(value, found.append)
    return found


def moved(nest: Any, rows: Tensor, batch: int | None = None) -> Any:
    """A nest with some rows of everything in it; where `batch` is given, all rows of what has another number of them."""
    leaves = kept_in(nest)
    at = [i for i, leaf in enumerate(leaves) if batch is None or len(leaf.scale if isinstance(leaf, Packed) else leaf) == batch]
    for i, leaf in zip(at, _rows_of([leaves[i] for i in at], rows), strict=True):
        leaves[i] = leaf
    following = iter(leaves)
    return mapped(nest, lambda _: next(following))


def _rows_of(leaves: Sequence[Kept], rows: Tensor) -> list[Kept]:
    """Some rows of each, in one launch where a fused kernel does that."""
    tensors = [t for leaf in leaves for t in ((leaf.values, leaf.scale) if isinstance(leaf, Packed) else (leaf,))]
    if not tensors or not fuses(*tensors):
        return [leaf.index_select(0, rows.to(leaf.scale.device if isinstance(leaf, Packed) else leaf.device)) for leaf in leaves]
    made = iter(ops.reindex(tensors, rows.to(tensors[0].device)))
    return [Packed(next(made), next(made), leaf.dtype) if isinstance(leaf, Packed) else next(made) for leaf in leaves]


def probe(kept: Kept) -> Tensor:
    """What is finite if and only if the value was."""
    return kept.scale if isinstance(kept, Packed) else kept


def unpacked(value: Any) -> Any:
    """A nest with everything read."""
    return mapped(value, read)
