"""Adds stored offsets to a stream: in one pass over memory where a fused kernel takes them, else by PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.state import Kept, Packed, read
from hasten.accelerators.fusing import fuses
from hasten.kernels import ops

ORDERS = 3
"""Offsets that the kernel adds at the most: those of a forecast of order 2."""


def add_offsets(tensor: Tensor, terms: Sequence[tuple[Kept, float]], fix: Affine | None = None, *, in_place: bool) -> Tensor:
    """`tensor` plus the weighted sum of offsets of its shape, corrected by `fix`; summed in fp32 where large terms would cancel.

    Args:
        tensor: [batch, ..., channels].
        terms: At least one offset, each with its weight.
        fix: Of every channel of the sum.
        in_place: Whether `tensor` itself is changed.
    """
    made = _fused(tensor, terms, fix)
    if made is not None:
        return tensor.copy_(made) if in_place else made
    given = [(read(kept).to(tensor.device), weight) for kept, weight in terms]
    if fix is not None:
        alone = len(given) == 1 and given[0][1] == 1
        whole = given[0][0] if alone else _added(torch.zeros_like(tensor), given, in_place=False)
        given = [(fix.apply(whole, -1), 1.0)]
    return _added(tensor, given, in_place=in_place)


def _added(tensor: Tensor, terms: Sequence[tuple[Tensor, float]], *, in_place: bool) -> Tensor:
    if len(terms) > 1 and tensor.dtype in (torch.float16, torch.bfloat16):
        total = tensor.float()
        for offset, weight in terms:
            total = total.add(offset, alpha=weight)
        return tensor.copy_(total) if in_place else total.to(tensor.dtype)
    for i, (offset, weight) in enumerate(terms):
        # The first addition makes a tensor of our own, to which the others are added in place.
        if in_place or (i and not tensor.requires_grad):
            tensor.add_(offset, alpha=weight)
        else:
            tensor = tensor.add(offset, alpha=weight)
    return tensor


def _fused(tensor: Tensor, terms: Sequence[tuple[Kept, float]], fix: Affine | None) -> Tensor | None:
    """The same by the kernel; None where it does not take these, or where PyTorch needs one pass, too."""
    if tensor.dtype not in ops.STREAMS or tensor.ndim < 2 or not fuses(tensor):
        return None
    kept = [value for value, _ in terms]
    whole = [value for value in kept if isinstance(value, Tensor)]
    packed = [value for value in kept if isinstance(value, Packed)]
    if len(whole) == len(kept) == 1 and fix is None:
        return None
    values = whole or [value.values for value in packed]
    alike = (not whole or not packed) and len({value.dtype for value in values}) == 1
    if not alike or len(kept) > ORDERS or not fuses(tensor, *values):
        return None
    table = None if fix is None else fix.table(tensor.device, tensor.shape[-1])
    return ops.forecast_apply(tensor, values, [weight for _, weight in terms], [value.scale for value in packed], table)
