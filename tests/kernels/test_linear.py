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
from hasten.kernels.products import int_product
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
    grid = {}
    if fixed:
        grid = {"scale": torch.tensor([0.02]), "zero": torch.tensor([5.0]), "sums": weight.sum(1, dtype=torch.int32)}
        if smooth:
            grid["smooth"] = values((columns,), torch.float32, seed + 3).abs() + 0.1
    more = dict(grid, activation=activation)
    if bias:
        more["bias"] = values((out,), torch.float32 if bias == "float" else dtype, seed + 4)
    if fix:
        more |= {"fix_scale": values((out,), torch.float32, seed + 5), "fix_shift": values((out,), torch.float32, seed + 6)}
    got, want = fused.int8_linear(machine.backend, x, weight, scales, **more), reference.int8_linear(x, weight, scales, **more)
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
    fix_scale, fix_shift = layer.correction[2].unbind()
    got = fused.int8_linear(
        machine.backend, x, layer.integers(), layer.scale, layer.bias.detach(), scale, zero, layer.sums, smooth, fix_scale, fix_shift
    )
    assert got is not None
    torch.testing.assert_close(got, layer(x), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_values_on_a_fixed_grid_are_the_references(machine: Machine) -> None:
    """To the bit, what lies beyond the grid's ends and what is not a number included."""
    x = torch.cat([torch.linspace(-4, 4, 4001), torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38])]).view(5, -1)
    scale, zero = torch.tensor([0.02]), torch.tensor([-31.0])
    got = fused.int8_linear(
        machine.backend, x, torch.eye(x.shape[1], dtype=torch.int8), torch.ones(x.shape[1]), None, scale, zero,
        torch.ones(x.shape[1], dtype=torch.int32),
    )  # fmt: skip
    values8 = reference.quantise_fixed(x, scale, zero)
    assert values8.amin() == -128 and values8.amax() == 127 and got is not None
    torch.testing.assert_close(got, (values8.float() + 31) * 0.02)


@given(rows=st.integers(1, 40), columns=st.integers(1, 70), out=st.integers(1, 40), seed=seeds)
def test_products_are_exact(rows: int, columns: int, out: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randint(-128, 128, shape, generator=generator).to(torch.int8) for shape in ((rows, columns), (out, columns)))
    assert torch.equal(int_product(x, weight).long(), x.long() @ weight.long().t())
