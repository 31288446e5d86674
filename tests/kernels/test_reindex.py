"""reindex by its kernel: what index_select gives, for any mixture of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.kernels import fused, reference
from hasten.kernels.launch import TENSORS
from tests.kernels.cases import FEW, LAYOUTS, laid_out, same, seeds, values
from tests.kernels.machine import Machine

KINDS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)


@FEW
@given(
    batch=st.integers(1, 6), picks=st.lists(st.integers(0, 5), max_size=8), seed=seeds,
    rests=st.lists(st.lists(st.integers(0, 9), max_size=3), min_size=1, max_size=6), layout=st.sampled_from(LAYOUTS),
)  # fmt: skip
def test_rows_are_index_selects(machine: Machine, batch, picks, seed, rests, layout) -> None:  # type: ignore[no-untyped-def]
    rows = torch.tensor([pick % batch for pick in picks], dtype=torch.int64)
    tensors = [laid_out(values((batch, *rest), KINDS[(seed + k) % 5], seed + k), layout) for k, rest in enumerate(rests)]
    before = [t.clone() for t in tensors]
    got, want = fused.reindex(machine.backend, tensors, rows), reference.reindex(tensors, rows)
    assert got is not None and all(same(g, w) for g, w in zip(got, want, strict=True))
    assert all(same(t, b) for t, b in zip(tensors, before, strict=True))
    assert not {g.data_ptr() for g in got if g.numel()} & {t.data_ptr() for t in tensors}


def test_more_tensors_than_one_launch_takes(machine: Machine) -> None:
    rows = torch.tensor([2, 0, 0])
    tensors = [values((3, 4), torch.float32, k) for k in range(TENSORS + 3)]
    got = fused.reindex(machine.backend, tensors, rows)
    assert got is not None and all(same(g, t[rows]) for g, t in zip(got, tensors, strict=True))


@pytest.mark.parametrize("row", [3, -1, 2**40])
def test_an_index_out_of_range_is_no_wrong_number(machine: Machine, row: int) -> None:
    with pytest.warns(RuntimeWarning, match="trap in reindex"):
        assert fused.reindex(machine.backend_of_its_own(), [torch.randn(3, 4)], torch.tensor([0, row])) is None
