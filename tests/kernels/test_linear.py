"""int8_linear: exact products, and by its kernels what the reference and the quantised layers give."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from hasten.accelerators.caching.correction import AffineCorrection
from hasten.accelerators.quantization.int8 import QuantLinear
from hasten.accelerators.quantization.ranges import Step
from hasten.kernels import fused, reference
from hasten.kernels.arguments import Fix, Grid, Weight
from tests.kernels.cases import FEW, STREAMS, dtypes, laid_out, same, seeds, values
from tests.kernels.machine import Machine


@FEW
@given(
    rows=st.integers(1, 20), columns=st.integers(1, 40), out=st.one_of(st.integers(1, 40), st.sampled_from([64, 264])),
    dtype=dtypes, seed=seeds,
    fixed=st.booleans(), smooth=st.booleans(), bias=st.sampled_from(["", "own", "float"]), fix=st.booleans(),
    activation=st.sampled_from(["none", "gelu", "gelu_tanh", "silu"]), layout=st.sampled_from(["dense", "shifted", "transposed"]),
)  # fmt: skip
def test_layers_are_the_references(machine: Machine, rows, columns, out, dtype, seed, fixed, smooth, bias, fix, activation, layout) -> None:  # type: ignore[no-untyped-def]
    x = laid_out(values((rows, columns), dtype, seed), layout)
    weight = values((out, columns), torch.int8, seed + 1, spread=50.0)
    scales = values((out,), torch.float32, seed + 2).abs() / 100
    grid = None
    if fixed:
        divided = values((columns,), torch.float32, seed + 3).abs() + 0.1 if smooth else None
        grid = Grid(torch.tensor([0.02]), torch.tensor([5.0]), weight.sum(1, dtype=torch.int32), divided)
    added = values((out,), torch.float32 if bias == "float" else dtype, seed + 4) if bias else None
    correction = Fix(values((out,), torch.float32, seed + 5), values((out,), torch.float32, seed + 6)) if fix else None
    args = x, Weight(weight, scales, added), grid, correction, activation
    got, want = fused.int8_linear(machine.backend, *args), reference.int8_linear(*args)
    assert got is not None
    if activation == "none":
        assert same(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", STREAMS)
@pytest.mark.parametrize("smoothed", [False, True])
def test_it_is_the_quantised_layer_of_caching(machine: Machine, dtype: torch.dtype, smoothed: bool) -> None:
    torch.manual_seed(3)
    linear, step = nn.Linear(48, 40).to(dtype), Step(4)
    smooth = torch.rand(48) + 0.5 if smoothed else None
    layer = QuantLinear(linear, step, torch.tensor([[-3.0, 4.0]]).repeat(4, 1), smooth=smooth)
    layer.correct(AffineCorrection(torch.rand(4, 40) + 0.5, torch.randn(4, 40)))
    step.set(2)
    x = values((3, 11, 48), dtype, 1)
    assert layer.activation is not None and layer.correction is not None
    scale, zero = layer.activation[2].split(1)
    grid, fix = Grid(scale, zero, layer.sums, smooth), Fix(*layer.correction[2].unbind())
    got = fused.int8_linear(machine.backend, x, Weight(layer.integers(), layer.scale, layer.bias.detach()), grid, fix)
    assert got is not None
    torch.testing.assert_close(got, layer(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_values_on_a_fixed_grid_are_the_references(machine: Machine) -> None:
    """To the bit, what lies beyond the grid's ends and what is not a number included."""
    x = torch.cat([torch.linspace(-4, 4, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])]).view(5, -1)
    columns = x.shape[1]
    grid = Grid(torch.tensor([0.02]), torch.tensor([-31.0]), torch.ones(columns, dtype=torch.int32))
    got = fused.int8_linear(machine.backend, x, Weight(torch.eye(columns, dtype=torch.int8), torch.ones(columns)), grid)
    values8 = reference.quantise_fixed(x, grid)
    assert values8.amin() == -128 and values8.amax() == 127 and got is not None
    torch.testing.assert_close(got, (values8.float() + 31) * 0.02)
