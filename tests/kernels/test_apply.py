"""delta_apply and forecast_apply by their kernel against the reference: bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.kernels import fused, reference
from hasten.kernels.arguments import Fix
from tests.kernels.cases import FEW, LAYOUTS, dtypes, laid_out, same, seeds, shapes, values
from tests.kernels.machine import Machine


@FEW
@given(
    shape=shapes(), dtype=dtypes, kind=st.sampled_from(["own", "bf16", "int8", "fp8"]), scaled=st.sampled_from(["", "token", "channel"]),
    weights=st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=3), groups=st.sampled_from([0, 1, 2, 3]), seed=seeds,
    layout=st.sampled_from(LAYOUTS), extremes=st.integers(0, 3),
)  # fmt: skip
def test_apply_is_the_reference(machine: Machine, shape, dtype, kind, scaled, weights, groups, seed, layout, extremes) -> None:  # type: ignore[no-untyped-def]
    stored = {"own": dtype, "bf16": torch.bfloat16, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[kind]
    x = laid_out(values(shape, dtype, seed, extremes=extremes), layout)
    spread = 1.0 if kind in ("own", "bf16") else 60.0
    offsets = [laid_out(values(shape, stored, seed + k + 1, spread=spread), LAYOUTS[(seed + k) % 3]) for k in range(len(weights))]
    table = (*shape[:-1], 1) if scaled == "token" else (shape[0], *[1] * (len(shape) - 2), shape[-1])
    scales = [values(table, torch.float32, seed + 9 + k).abs() for k in range(len(weights))] if scaled else []
    fix = None
    if groups and shape[0] % groups == 0:
        fix = Fix(values((groups, shape[-1]), torch.float32, seed + 20), values((groups, shape[-1]), torch.float32, seed + 21))
    before = [t.clone() for t in (x, *offsets)]
    want = reference.forecast_apply(x, offsets, scales, weights, fix)
    got = fused.forecast_apply(machine.backend, x, offsets, scales, weights, fix)
    assert machine.backend.broken is None and got is not None and got.is_contiguous()
    assert same(got, want)
    assert all(same(now, then) for now, then in zip((x, *offsets), before, strict=True))
    if weights == [1.0]:
        assert same(fused.delta_apply(machine.backend, x, offsets[0], scales[0] if scales else None, fix), want)  # type: ignore[arg-type]


def test_rows_that_lie_gigabytes_apart(machine: Machine) -> None:
    """Offsets of more than 32 bits: the rows in between are never touched, so they take no memory."""
    far = 2**31 + 8
    storage = torch.UntypedStorage(2 * (far + 16))
    x = torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, (2, 1, 16), (far, 16, 1))
    x.copy_(values((2, 1, 16), torch.bfloat16, 3))
    offset = values((2, 1, 16), torch.bfloat16, 4)
    assert same(fused.delta_apply(machine.backend, x, offset), reference.delta_apply(x, offset))  # type: ignore[arg-type]


def test_an_empty_batch_needs_no_launch(machine: Machine) -> None:
    x = torch.empty(0, 5, 8)
    made = fused.delta_apply(machine.backend, x, x.clone())
    assert made is not None and made.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stored_offset_comes_back_as_the_runtime_reads_it(machine: Machine, dtype: torch.dtype) -> None:
    """In float32 the op means what caching does today: the packed value read, then added."""
    from hasten.accelerators.caching.affine import Affine
    from hasten.accelerators.caching.forward import add_offsets
    from hasten.accelerators.caching.state import Packed

    x, offset = values((4, 6, 40), dtype, 1), values((4, 6, 40), dtype, 2)
    packed = Packed.of(offset, "int8")
    scale, shift = values((2, 40), torch.float32, 5).abs(), values((2, 40), torch.float32, 6)
    fixed = Affine(scale.flatten().numpy(), shift.flatten().numpy()).apply(packed.read(), -1)
    want = add_offsets(x, [(fixed, 1.0)], in_place=False)
    got = fused.delta_apply(machine.backend, x, packed.values, packed.scale, Fix(scale, shift))
    assert got is not None
    torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
