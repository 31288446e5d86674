"""exp, GELU and SiLU out of sums, products and divisions alone.

Libraries and devices differ in the last bits of exp and erf, and 8-bit rows that are made of them would differ now and then. Each operation
here rounds once and the same everywhere, in this file and in cuda/elementary.cuh: so the rows are equal to the bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

_EXP = (0.00019857756, 0.00139336172, 0.00833336078, 0.0416664667, 0.166666672, 0.5)
"""Of (e^r - 1 - r) / r^2 for |r| <= ln(2) / 2, highest power first: a minimax fit, relative error 3e-9."""
_TAIL = (
    -0.0291460492, 0.143972263, -0.25571543, 0.159175485, -0.0231107362,
    0.10550838, 0.119832776, 0.139861882, 0.139621407,
)  # fmt: skip
"""Of the normal tail times e^(a^2 / 2) in s = 1 / (1 + 0.35 a), without a constant: a minimax fit, relative error 4e-8."""


def exp(x: Tensor) -> Tensor:
    """e^x for float32, within 2 units in the last place."""
    x = x.clamp(-104.0, 89.0)
    n = (x * 1.44269504).round()
    r = (x - n * 0.693359375) - n * -2.12194440e-4  # ln(2) in two parts, the first of which has few digits
    p = torch.full_like(r, _EXP[0])
    for coefficient in _EXP[1:]:
        p = p * r + coefficient
    power = n.to(torch.int32)
    half = power >> 1  # in two factors, for 2^n alone is no number where the result is subnormal or at its largest
    return (r * r * p + r + 1.0) * _power_of_two(half) * _power_of_two(power - half)


def _power_of_two(n: Tensor) -> Tensor:
    return ((n + 127) << 23).view(torch.float32)


def tail(a: Tensor) -> Tensor:
    """The probability that a standard normal number is above `a` >= 0, float32."""
    s = 1.0 / (0.35 * a + 1.0)
    p = torch.full_like(s, _TAIL[0])
    for coefficient in _TAIL[1:]:
        p = p * s + coefficient
    return p * s * exp(a * a * -0.5)


def gelu(x: Tensor) -> Tensor:
    """x times the probability that a standard normal number is below x; float32. Unlike 1 + erf it keeps its digits where x is negative."""
    above = tail(x.abs())
    return x * torch.where(x < 0, above, 1.0 - above)


def gelu_tanh(x: Tensor) -> Tensor:
    """The approximation of GELU by a hyperbolic tangent, float32."""
    u = (x * x * x * 0.044715 + x) * 0.7978845608
    return x / (exp(u * -2.0) + 1.0)


def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x), float32."""
    return x / (exp(-x) + 1.0)
