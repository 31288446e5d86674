"""gelu_quant by its kernel: the same bits as the reference, whose activations are right."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from hasten.kernels import elementary, fused, reference
from tests.kernels.cases import FEW, LAYOUTS, dtypes, laid_out, same, seeds, shapes, values
from tests.kernels.machine import Machine

EVERY_16_BITS = torch.arange(-(2**15), 2**15).to(torch.int16)


@FEW
@given(
    shape=shapes(), dtype=dtypes, activation=st.sampled_from(["gelu", "gelu_tanh", "geglu", "swiglu"]),
    kind=st.sampled_from(["int8", "fp8"]),
    seed=seeds, layout=st.sampled_from(LAYOUTS), extremes=st.integers(0, 3), spread=st.sampled_from([0.1, 3.0, 40.0]),
)  # fmt: skip
def test_rows_are_the_references(machine: Machine, shape, dtype, activation, kind, seed, layout, extremes, spread) -> None:  # type: ignore[no-untyped-def]
    if activation in ("geglu", "swiglu"):
        shape = (*shape[:-1], 2 * shape[-1])
    x = laid_out(values(shape, dtype, seed, extremes=extremes, spread=spread), layout)
    got, want = fused.gelu_quant(machine.backend, x, activation, kind), reference.gelu_quant(x, activation, kind)
    assert got is not None and same(got[0], want[0]) and same(got[1], want[1])


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits(any_machine: Machine, dtype: torch.dtype, activation: str) -> None:
    """A row for each: its scale is the activation's magnitude, so all of them are seen."""
    x = EVERY_16_BITS.view(dtype).view(1, -1, 1)
    got, want = fused.gelu_quant(any_machine.backend, x, activation, "int8"), reference.gelu_quant(x, activation, "int8")
    assert got is not None and same(got[0], want[0]) and same(got[1], want[1])


def test_silu_of_every_number_of_16_bits(any_machine: Machine) -> None:
    gates = EVERY_16_BITS.view(torch.bfloat16).view(1, -1, 1)
    x = torch.cat([torch.ones_like(gates), gates], -1)
    got, want = fused.gelu_quant(any_machine.backend, x, "swiglu", "fp8"), reference.gelu_quant(x, "swiglu", "fp8")
    assert got is not None and same(got[0], want[0]) and same(got[1], want[1])


def test_elementary_functions_are_accurate() -> None:
    x = torch.cat([EVERY_16_BITS.view(torch.bfloat16).float(), torch.linspace(-110, 100, 100_001)])
    x = x[x.isfinite()]
    exact = x.double().exp()
    normal = (exact > 1.2e-38) & (exact < 3.4e38)
    assert ((elementary.exp(x).double() / exact - 1).abs()[normal] < 2 * 2**-24).all()
    assert ((elementary.exp(x).double() - exact).abs()[exact <= 1.2e-38] <= 2**-149).all()
    assert elementary.exp(x)[exact > 3.5e38].isinf().all()
    for ours, theirs in (
        (elementary.gelu, lambda v: v * torch.special.erfc(-v * 0.5**0.5) / 2),
        (elementary.gelu_tanh, lambda v: v / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (v + 0.044715 * v**3)))),
        (elementary.silu, lambda v: v / (1 + torch.exp(-v))),
    ):
        exact = theirs(x.double())
        size = (exact.abs() > 1e-30) & (exact.abs() < 3e38)
        assert ((ours(x).double() / exact - 1).abs()[size] < 256 * 2**-24).all()
        middle = (x.abs() < 5) & (x != 0) & size
        assert ((ours(x).double() / exact - 1).abs()[middle] < 32 * 2**-24).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -0.0])
def test_elementary_functions_at_the_ends(value: float) -> None:
    x = torch.tensor([value])
    for ours, theirs in ((elementary.exp, torch.exp), (elementary.gelu, F.gelu), (elementary.silu, F.silu)):
        torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
