"""Products of int8 matrices, exact: `torch._int_mm` where it is right, and padded to what it takes."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor


def int_product(x: Tensor, weight: Tensor) -> Tensor:
    """int32 [rows, out]: x int8 [rows, in] times weight int8 [out, in], transposed; the columns of each row next to each other.

    CUDA takes more than 16 rows and multiples of 8 columns only. CPUs get padding where a size is 1: torch up to 2.15 reads a stride
    there that has no meaning (pytorch issue 195066). CPUs whose products overflow multiply in float64, which is exact.
    """
    if x.is_cuda or 1 in (*x.shape, len(weight)):
        rows, columns, out = len(x), x.shape[1], len(weight)
        x = F.pad(x, (0, -columns % 8, 0, max(0, 32 - rows)))
        weight = F.pad(weight, (0, -columns % 8, 0, -out % 8))
        return int_product(x, weight)[:rows, :out] if not x.is_cuda else torch._int_mm(x.contiguous(), weight.contiguous().t())[:rows, :out]
    if x.device.type == "cpu" and not cpu_is_exact():
        return (x.double() @ weight.double().t()).to(torch.int32)
    return torch._int_mm(x.contiguous(), weight.t())


@cache
def cpu_is_exact() -> bool:
    """Whether `torch._int_mm` is right on this CPU: without VNNI or the like oneDNN adds pairs in 16 bits, which overflow silently
    (pytorch issue 136746). The values most prone to that are tried once."""
    for rows, columns, out in ((17, 16, 16), (64, 64, 64), (128, 768, 192)):
        for value in (127, -128):
            x, weight = (torch.full(shape, v, dtype=torch.int8) for shape, v in (((rows, columns), value), ((out, columns), 127)))
            if not bool((torch._int_mm(x, weight.t()) == value * 127 * columns).all()):
                return False
    return True
