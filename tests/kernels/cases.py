"""Inputs for the kernels: every type, odd sizes, odd layouts, extreme values; and how results are compared."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

# `make test-all` tries more.
FEW = settings(
    max_examples=int(os.environ.get("HASTEN_EXAMPLES", "8")), suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)
STREAMS = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("dense", "sliced", "shifted", "transposed", "expanded")
EXTREMES = (0.0, -0.0, float("inf"), -float("inf"), float("nan"), 3.0e38, -6.0e4, 1e-38, 1e-45, 448.0, 1e-12)

dtypes = st.sampled_from(STREAMS)
channels = st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 257, 264, 1000, 1152, 2056, 2304]))
seeds = st.integers(0, 2**31 - 1)


@st.composite
def shapes(draw: st.DrawFn, least: int = 2, most: int = 4) -> tuple[int, ...]:
    """[batch, ..., channels]; many tokens only where there are few channels."""
    width = draw(channels)
    ndim = draw(st.integers(least, most))
    sides = draw(st.lists(st.integers(1, 7 if width < 300 else 3), min_size=ndim - 1, max_size=ndim - 1))
    return (*sides, width)


def values(shape: Sequence[int], dtype: torch.dtype, seed: int, *, spread: float = 1.0, extremes: int = 0) -> Tensor:
    """Normal numbers, a few of them extreme ones."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(*shape, generator=generator) * spread
    flat = made.view(-1)
    for _ in range(extremes if flat.numel() else 0):
        where, which = (int(torch.randint(n, (), generator=generator)) for n in (flat.numel(), len(EXTREMES)))
        flat[where] = EXTREMES[which]
    if dtype == torch.int8:
        return made.nan_to_num().round().clamp(-127, 127).to(dtype)
    return made.to(dtype)


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, laid out otherwise."""
    if layout == "sliced" and tensor.ndim > 2:
        wide = torch.cat([torch.full_like(tensor[:, :1], 7), tensor], 1)
        return wide[:, 1:]
    if layout == "shifted":
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        return room[1:].view(tensor.shape).copy_(tensor)
    if layout == "transposed":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return tensor[:1].expand(tensor.shape)
    return tensor


def same(got: Tensor, want: Tensor) -> bool:
    """The very same numbers; what is not a number is alike."""
    if got.shape != want.shape or got.dtype != want.dtype:
        return False
    if got.dtype == torch.float8_e4m3fn:
        return torch.equal(got.view(torch.uint8), want.view(torch.uint8))
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(nan=0.0), want.nan_to_num(nan=0.0))
