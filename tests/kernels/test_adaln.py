"""gated_residual_adaln by its kernel: within rounding of float64, and in 8 bits exactly what its own 16-bit rows give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.kernels import fused, reference
from hasten.kernels.arguments import Modulation, Norm
from tests.kernels.cases import FEW, LAYOUTS, dtypes, laid_out, same, seeds, shapes, values
from tests.kernels.machine import Machine


def truth(x: Tensor, modulation: Modulation, norm: Norm) -> Tensor:
    """The modulated rows in float64, from x as it was rounded."""
    x = x.double()
    centred = x if norm.rms else x - x.mean(-1, keepdim=True)
    n = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    n = n * (1 if norm.weight is None else norm.weight.double()) + (0 if norm.bias is None else norm.bias.double())
    scale, shift = modulation.scale, modulation.shift
    return n * (1 + (0 if scale is None else scale.double())) + (0 if shift is None else shift.double())


@FEW
@given(
    shape=shapes(3), dtype=dtypes,
    tables=st.sampled_from([(), ("gate",), ("scale", "shift"), ("gate", "scale", "shift")]),
    affine=st.sampled_from(["none", "weight", "both"]), shared=st.sampled_from(["sample", "token", "all"]), wide=st.booleans(),
    rms=st.booleans(), eps=st.sampled_from([1e-6, 1e-5]), seed=seeds, layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(["int8", "fp8"]),
)  # fmt: skip
def test_fused_rows_are_right(machine: Machine, shape, dtype, tables, affine, shared, wide, rms, eps, seed, layout, kind) -> None:  # type: ignore[no-untyped-def]
    residual, y = laid_out(values(shape, dtype, seed), layout), laid_out(values(shape, dtype, seed + 1), LAYOUTS[seed % 4])
    table = {"sample": (shape[0], *[1] * (len(shape) - 2), shape[-1]), "token": shape, "all": (*[1] * (len(shape) - 1), shape[-1])}[shared]
    modulation = Modulation(**{name: values(table, torch.float32 if wide else dtype, seed + 2 + k) for k, name in enumerate(tables)})
    weight = values(shape[-1:], dtype, seed + 5) if affine != "none" else None
    bias = values(shape[-1:], dtype, seed + 6) if affine == "both" else None
    norm = Norm(weight, bias, eps, rms)
    got = fused.gated_residual_adaln(machine.backend, residual, y, modulation, norm)
    want = reference.gated_residual_adaln(residual, y, modulation, norm)
    assert got is not None and same(got[0], want[0])
    exact = truth(want[0], modulation, norm)
    # A small row's mean cancels: what is left is exact to a float32 step of its largest entry over its spread.
    spread = want[0].double().std(-1, keepdim=True, correction=0).clamp_min(eps**0.5) if not rms else 1.0
    slack = 64 * torch.finfo(torch.float32).eps * (1 + want[0].double().abs().amax(-1, keepdim=True) / spread) * (1 + exact.abs())
    limit = torch.finfo(dtype).eps * exact.abs() + slack
    assert bool(((got[1].double() - exact).abs() <= limit).all()) and bool(((want[1].double() - exact).abs() <= limit).all())
    eight = fused.gated_residual_adaln_quant(machine.backend, residual, y, modulation, norm, kind)
    rows = reference.quantise_rows(got[1], kind)
    assert eight is not None and same(eight[0], got[0]) and same(eight[1], rows[0]) and same(eight[2], rows[1])


@pytest.mark.parametrize("channels", [1152, 3072, 16_640, 4099])
def test_long_rows(machine: Machine, channels: int) -> None:
    """Of models' sizes, and of more than a block holds."""
    residual, y, gate = (values((1, 2, channels), torch.bfloat16, k) for k in range(3))
    modulation = Modulation(gate, values((1, 1, channels), torch.bfloat16, 3), values((1, 1, channels), torch.bfloat16, 4))
    got = fused.gated_residual_adaln(machine.backend, residual, y, modulation, Norm())
    want = reference.gated_residual_adaln(residual, y, modulation, Norm())
    assert got is not None and same(got[0], want[0])
    torch.testing.assert_close(got[1], want[1], rtol=2**-7, atol=2**-9)
    eight = fused.gated_residual_adaln_quant(machine.backend, residual, y, modulation, Norm(), "int8")
    rows = reference.quantise_rows(got[1], "int8")
    assert eight is not None and same(eight[1], rows[0]) and same(eight[2], rows[1])


def test_one_row_that_is_not_finite_spoils_no_other(machine: Machine) -> None:
    residual, y = values((2, 6, 64), torch.float32, 1), values((2, 6, 64), torch.float32, 2)
    clean = fused.gated_residual_adaln(machine.backend, residual, y, Modulation(), Norm())
    residual[1, 2, 5] = torch.nan
    got = fused.gated_residual_adaln(machine.backend, residual, y, Modulation(), Norm())
    assert got is not None and clean is not None and bool(got[1][1, 2].isnan().all())
    got[1][1, 2], clean[1][1, 2] = 0, 0
    assert same(got[1], clean[1])


def test_the_block_of_a_diffusers_model_is_meant(machine: Machine) -> None:
    """PixArt's block, between its self-attention and its feed-forward, with its own norm."""
    from torch import nn

    hidden, attention = values((2, 8, 64), torch.float32, 1), values((2, 8, 64), torch.float32, 2)
    shift, scale, gate = values((2, 3, 64), torch.float32, 3).chunk(3, 1)
    norm = nn.LayerNorm(64, eps=1e-6, elementwise_affine=False)
    want = hidden + gate * attention
    got = fused.gated_residual_adaln(machine.backend, hidden, attention, Modulation(gate, scale, shift), Norm())
    assert got is not None
    torch.testing.assert_close(got[0], want)
    torch.testing.assert_close(got[1], norm(want) * (1 + scale) + shift, rtol=1e-5, atol=1e-5)
