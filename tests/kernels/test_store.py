"""delta_store and quantise_rows by their kernels against the reference and against what caching does today: bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.caching.state import Packed
from hasten.kernels import fused, reference
from tests.kernels.cases import FEW, LAYOUTS, STREAMS, dtypes, laid_out, same, seeds, shapes, values
from tests.kernels.machine import Machine


@FEW
@given(
    shape=shapes(), dtype=dtypes, kind=st.sampled_from(["bf16", "int8", "fp8"]), by_channel=st.booleans(), seed=seeds,
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)), extremes=st.integers(0, 4),
    spread=st.sampled_from([1e-14, 1e-3, 1.0, 300.0]),
)  # fmt: skip
def test_stored_offsets_are_the_references(machine: Machine, shape, dtype, kind, by_channel, seed, layouts, extremes, spread) -> None:  # type: ignore[no-untyped-def]
    by_channel = by_channel and len(shape) > 2
    after = laid_out(values(shape, dtype, seed, extremes=extremes, spread=spread), layouts[0])
    before = laid_out(values(shape, dtype, seed + 1, spread=spread), layouts[1])
    want = reference.delta_store(after, before, kind, by_channel)
    got = fused.delta_store(machine.backend, after, before, kind, by_channel)
    assert got is not None and same(got[0], want[0]) and same(got[1], want[1])
    if kind != "bf16":
        rows = fused.quantise_rows(machine.backend, after, kind)
        want = reference.quantise_rows(after, kind)
        assert rows is not None and same(rows[0], want[0]) and same(rows[1], want[1])


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", STREAMS)
def test_rows_are_packed_as_caching_packs_them(machine: Machine, dtype: torch.dtype, kind: str) -> None:
    x = values((3, 5, 72), dtype, 7, extremes=2)
    packed, got = Packed.of(x, kind), fused.quantise_rows(machine.backend, x, kind)
    assert got is not None and same(got[0], packed.values) and same(got[1], packed.scale)


def test_every_8_bit_float_is_read_and_written_as_pytorch_does(machine: Machine) -> None:
    codes = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).view(1, 1, 256)
    zeros = torch.zeros(1, 1, 256)
    read = fused.delta_apply(machine.backend, zeros, codes)
    assert read is not None and same(read, codes.float() + 0.0)
    finite = codes.float().nan_to_num()[0, 0].unique()
    between = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([448.0])])
    near = torch.cat([between, between.nextafter(torch.tensor(torch.inf)), between.nextafter(torch.tensor(-torch.inf))]).clamp(-448, 448)
    rows = torch.stack([near, torch.full_like(near, 448.0)], 1)[None]  # each row's scale is 1
    written = fused.quantise_rows(machine.backend, rows, "fp8")
    assert written is not None and same(written[0][..., 0], near.to(torch.float8_e4m3fn)[None]) and bool((written[1] == 1).all())


@pytest.mark.parametrize("channels", [16_391, 16_640])
def test_rows_that_fit_no_registers_are_computed_again(machine: Machine, channels: int) -> None:
    after, before = values((1, 2, channels), torch.bfloat16, 1), values((1, 2, channels), torch.bfloat16, 2)
    got, want = fused.delta_store(machine.backend, after, before, "int8"), reference.delta_store(after, before, "int8")
    assert got is not None and same(got[0], want[0]) and same(got[1], want[1])


def test_channels_of_a_sample_do_not_depend_on_the_batch(machine: Machine) -> None:
    after, before = values((3, 130, 40), torch.float16, 1), values((3, 130, 40), torch.float16, 2)
    together = fused.delta_store(machine.backend, after, before, "int8", True)
    alone = fused.delta_store(machine.backend, after[1:2], before[1:2], "int8", True)
    assert together is not None and alone is not None
    assert same(together[0][1:2], alone[0]) and same(together[1][1:2], alone[1])
