"""drift by its kernel: right sums, decisions that do not depend on the batch, and nothing left behind in its scratch memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.caching.deciders import relative_l1
from hasten.kernels import fused, reference
from tests.kernels.cases import FEW, LAYOUTS, STREAMS, dtypes, laid_out, same, seeds, shapes, values
from tests.kernels.machine import Machine


@FEW
@given(shape=shapes(), dtype=dtypes, seed=seeds, layout=st.sampled_from(LAYOUTS), closeness=st.sampled_from([1.0, 0.1, 0.0]))
def test_sums_and_decisions(machine: Machine, shape, dtype, seed, layout, closeness) -> None:  # type: ignore[no-untyped-def]
    before = laid_out(values(shape, dtype, seed), layout)
    now = (before.float() + closeness * values(shape, torch.float32, seed + 1)).to(dtype)
    exact = torch.stack([(now.double() - before.double()).abs().flatten(1).sum(1), before.double().abs().flatten(1).sum(1)], 1)
    ratio = exact[:, 0] / exact[:, 1].clamp_min(1e-12)
    threshold = float(ratio.median()) * 1.01
    got = fused.drift(machine.backend, now, before, threshold)
    assert got is not None
    torch.testing.assert_close(got[0].double(), exact, rtol=1e-5, atol=1e-30)
    clear = (ratio - threshold).abs() > 1e-4 * threshold
    assert torch.equal(got[1][clear], (ratio < threshold)[clear])
    torch.testing.assert_close(relative_l1(now, before), ratio.float(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("entries", [40_000, 40_001])
@pytest.mark.parametrize("dtype", STREAMS)
def test_a_sample_counts_the_same_alone_and_in_a_batch(machine: Machine, dtype: torch.dtype, entries: int) -> None:
    """In several pieces, to the bit."""
    now, before = values((3, entries), dtype, 1), values((3, entries), dtype, 2)
    together = fused.drift(machine.backend, now, before, 1.4)
    assert together is not None
    for k in range(3):
        alone = fused.drift(machine.backend, now[k : k + 1].clone(), before[k : k + 1].clone(), 1.4)
        assert alone is not None and same(alone[0][0], together[0][k]) and bool(alone[1][0] == together[1][k])
    torch.testing.assert_close(together[0], reference.drift(now, before, 1.4)[0], rtol=1e-5, atol=0)


def test_what_is_not_a_number_is_not_still(machine: Machine) -> None:
    before = values((3, 50), torch.float32, 1)
    now = before.clone()
    now[1, 7] = torch.nan
    got = fused.drift(machine.backend, now, before, 0.1)
    assert got is not None and got[1].tolist() == [True, False, True]
    nothing = fused.drift(machine.backend, torch.zeros(2, 9), torch.zeros(2, 9), 0.1)
    assert nothing is not None and nothing[1].tolist() == [True, True]


def test_scratch_memory_can_be_used_again(machine: Machine) -> None:
    """As a captured graph does: what counts arrivals is zero afterwards."""
    from hasten.kernels import launch

    now, before = values((2, 9000), torch.float32, 1), values((2, 9000), torch.float32, 2)
    parts, arrived = torch.empty(64), torch.zeros(2, dtype=torch.int32)
    seen = []
    for _ in range(2):
        sums, still = torch.empty(2, 2), torch.empty(2, dtype=torch.bool)
        assert machine.backend.run(launch.drift, sums, still, now, before, 1.0, parts, arrived)
        seen.append(sums)
    assert torch.equal(seen[0], seen[1]) and not arrived.any()
