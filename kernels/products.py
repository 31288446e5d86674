"""Products of int8 matrices, exact: oneDNN's on packed weights on CPUs, `torch._int_mm` elsewhere, padded to what it takes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_seen: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""For every living weight that was multiplied: its version, and the weight as oneDNN reads it, or None before its second product."""


def int_product(x: Tensor, weight: Tensor) -> Tensor:
    """int32 [rows, out]: x int8 [rows, in] times weight int8 [out, in], transposed; the columns of each row next to each other.

    CUDA takes more than 16 rows and multiples of 8 columns only. CPUs get padding where a size is 1: torch up to 2.15 reads a stride
    there that has no meaning (pytorch issue 195066). CPUs whose products overflow multiply in float64, which is exact.
    """
    if x.device.type == "cpu" and not cpu_is_exact():
        return (x.double() @ weight.double().t()).to(torch.int32)
    if x.is_cuda or 1 in (*x.shape, len(weight)):
        return padded_product(x, weight)
    return torch._int_mm(x.contiguous(), weight.t())


def padded_product(x: Tensor, weight: Tensor) -> Tensor:
    """`int_product` of operands with zeros added up to 32 rows and to multiples of 8 in both other sizes."""
    rows, columns, out = len(x), x.shape[1], len(weight)
    x = _padded(x, max(0, 32 - rows), -columns % 8)
    weight = _padded(weight, -out % 8, -columns % 8)
    return torch._int_mm(x.contiguous(), weight.contiguous().t())[:rows, :out]


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """With as many more of both; the matrix itself where that is none, of which torch would make a copy."""
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def scaled_product(x: Tensor, weight: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """float32 [rows, out]: `int_product`, times `factor` float32 [out], plus `shift` float32 [out], each rounded.

    On CPUs a weight is laid out at its second product as oneDNN reads it, and kept so (once more its memory) as long as it lives and is
    not changed: that takes longer than many products, and `torch._int_mm` does some of it every time.
    """
    if torch.compiler.is_compiling():
        made: Tensor = _scaled_product_op(x, weight, factor, shift)
        return made
    packed = _as_packed(weight) if x.device.type == "cpu" and _pays(len(x), *weight.shape) and packs() else None
    if packed is None:
        y = int_product(x, weight).to(torch.float32).mul_(factor)
    elif shift is not None and shifts():
        return _packed_product(x, packed, factor, shift)
    else:
        y = _packed_product(x, packed, factor)
    return y if shift is None else y.add_(shift)


@torch.library.custom_op("hasten::scaled_product", mutates_args=())
def _scaled_product_op(x: Tensor, weight: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    """Hides from compilers what is remembered of weights."""
    return scaled_product(x, weight, factor, shift)


@_scaled_product_op.register_fake
def _(x: Tensor, weight: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    return factor.new_empty(len(x), len(weight))


PACKED_WORK, PACKED_COLUMNS = 1 << 24, 32
"""Multiplications from which on a packed product is faster, measured with AMX; and columns below which oneDNN has only slow ways."""


def _pays(rows: int, out: int, columns: int) -> bool:
    """Whether a packed weight makes a product of this size faster."""
    return rows > 1 and columns >= PACKED_COLUMNS and rows * out * columns >= PACKED_WORK


def _packed_product(x: Tensor, packed: Tensor, factor: Tensor, shift: Tensor | None = None) -> Tensor:
    zero = torch.zeros(len(factor), dtype=torch.int64)
    made: Tensor = torch.ops.onednn.qlinear_pointwise(
        x.contiguous(), 1.0, 0, packed, factor, zero, shift, 1.0, 0, torch.float32, "none", [], ""
    )
    return made


def _as_packed(weight: Tensor) -> Tensor | None:
    """The weight as oneDNN reads it; None at first sight, and where nobody can tell whether it was changed in place."""
    if weight.is_inference() or weight.numel() == 0:
        return None
    version, packed = _seen.get(weight, (None, None))
    if version != weight._version:
        _seen[weight] = weight._version, None
        return None
    if packed is None:
        packed = torch.ops.onednn.qlinear_prepack(weight, None)
        _seen[weight] = version, packed
    return packed


@cache
def packs() -> bool:
    """Whether this CPU multiplies packed weights, and exactly."""
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return False
    try:
        return _exact(lambda x, weight: _packed_product(x, torch.ops.onednn.qlinear_prepack(weight, None), torch.ones(len(weight))))
    except RuntimeError:  # a build without oneDNN's quantised layers
        return False


@cache
def shifts() -> bool:
    """Whether oneDNN's products round before they are shifted, as everything else here does, and not only afterwards."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randint(-128, 128, (n, 256), generator=generator).to(torch.int8) for n in (32, 512))
    factor, shift = (torch.rand(512, generator=generator) for _ in range(2))
    packed = torch.ops.onednn.qlinear_prepack(weight, None)
    return torch.equal(_packed_product(x, packed, factor, shift), _packed_product(x, packed, factor).add_(shift))


@cache
def cpu_is_exact() -> bool:
    """Whether `torch._int_mm` is right on this CPU: without VNNI or the like oneDNN adds pairs in 16 bits, which overflow silently
    (pytorch issue 136746)."""
    return _exact(lambda x, weight: torch._int_mm(x, weight.t()))


def _exact(product: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Tries the values that are most prone to overflow once."""
    for rows, columns, out in ((17, 16, 16), (64, 64, 64), (128, 768, 192)):
        for value in (127, -128):
            x, weight = (torch.full(shape, v, dtype=torch.int8) for shape, v in (((rows, columns), value), ((out, columns), 127)))
            if not bool((product(x, weight) == value * 127 * columns).all()):
                return False
    return True
