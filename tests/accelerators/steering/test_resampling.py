"""Resampling: everybody gets K * W_i copies in the mean, and not more variance than the scheme promises."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.steering.resampling import SCHEMES, effective_sample_size, normalised, settled

WEIGHTS = torch.tensor([0.02, 0.41, 0.0, 0.22, 0.35], dtype=torch.float64)
VALUES = torch.tensor([3.0, -1.0, 9.0, 0.5, 2.0], dtype=torch.float64)
REPEATS = 4_000

weights = st.lists(st.floats(0, 1), min_size=1, max_size=20).filter(lambda w: sum(w) > 1e-6)


def draws(scheme: str, count: int = 5) -> Tensor:
    """Ancestors [REPEATS, count]."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([SCHEMES[scheme](WEIGHTS, count, generator) for _ in range(REPEATS)])


def exact_variance(scheme: str, count: int = 5) -> float:
    """Of the sum of VALUES over the ancestors, by the definition of the scheme."""

    def of(shares: Tensor) -> float:
        return float((shares * VALUES**2).sum() - (shares * VALUES).sum() ** 2)

    if scheme == "multinomial":
        return count * of(WEIGHTS)
    if scheme == "residual":
        rest = count * WEIGHTS - (count * WEIGHTS).floor()
        return float(rest.sum()) * of(rest / rest.sum())
    edges = torch.cat([torch.zeros(1, dtype=torch.float64), WEIGHTS.cumsum(0)])
    total = 0.0
    for n in range(count):  # stratified: the share of every ancestor in the stratum
        low, high = n / count, (n + 1) / count
        total += of((edges[1:].clamp(low, high) - edges[:-1].clamp(low, high)) * count)
    return total


@pytest.mark.parametrize("scheme", SCHEMES)
def test_everybody_has_the_wanted_number_of_copies_in_the_mean(scheme: str) -> None:
    counts = torch.stack([torch.bincount(row, minlength=5) for row in draws(scheme)]).double()
    wanted = 5 * WEIGHTS
    # No scheme varies more than independent draws: five of their standard errors.
    tolerance = 5 * (wanted * (1 - WEIGHTS) / REPEATS).sqrt()
    assert ((counts.mean(0) - wanted).abs() <= tolerance + 1e-12).all()
    assert (counts[:, 2] == 0).all() and (counts.sum(1) == 5).all()


def test_the_variances_are_those_of_the_schemes_and_in_their_order() -> None:
    measured = {scheme: float(VALUES[draws(scheme)].sum(1).var()) for scheme in SCHEMES}
    for scheme in ("multinomial", "residual", "stratified"):
        assert measured[scheme] == pytest.approx(exact_variance(scheme), rel=0.12), scheme
    assert measured["residual"] < measured["multinomial"] and measured["stratified"] < measured["multinomial"]
    assert measured["ssp"] < 0.6 * measured["multinomial"] and measured["systematic"] < 0.6 * measured["multinomial"]


@pytest.mark.parametrize("scheme", ["systematic", "ssp"])
@given(raw=weights, seed=st.integers(0, 2**31))
def test_counts_are_the_whole_numbers_beside_the_wanted_one(scheme: str, raw: list[float], seed: int) -> None:
    shares = torch.tensor(raw, dtype=torch.float64)
    shares = shares / shares.sum()
    counts = torch.bincount(SCHEMES[scheme](shares, len(raw), torch.Generator().manual_seed(seed)), minlength=len(raw))
    assert int(counts.sum()) == len(raw)
    for share, count in zip(shares.tolist(), counts.tolist(), strict=True):
        wanted = share * len(raw)
        assert math.floor(wanted - 1e-7) <= count <= math.ceil(wanted + 1e-7)


@pytest.mark.parametrize("scheme", SCHEMES)
@given(raw=weights, seed=st.integers(0, 2**31), spare=st.integers(1, 30))
def test_what_has_no_weight_is_never_drawn_and_the_count_is_kept(scheme: str, raw: list[float], seed: int, spare: int) -> None:
    shares = torch.tensor([*raw, 0.0], dtype=torch.float64)
    ancestors = SCHEMES[scheme](shares / shares.sum(), spare, torch.Generator().manual_seed(seed))
    assert ancestors.shape == (spare,) and ancestors.dtype == torch.int64
    assert (shares[ancestors] > 0).all()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_particle_with_all_the_weight_is_all_there_is(scheme: str) -> None:
    ancestors = SCHEMES[scheme](torch.tensor([0.0, 0.0, 1.0, 0.0]), 4, torch.Generator().manual_seed(0))
    assert ancestors.tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("scheme", ["residual", "stratified", "systematic", "ssp"])
def test_even_weights_leave_everybody_as_it_was(scheme: str) -> None:
    for count in (3, 7, 10, 49):  # none of whose shares is exact in binary
        ancestors = SCHEMES[scheme](torch.full((count,), 1 / count, dtype=torch.float64), count, torch.Generator().manual_seed(1))
        assert settled(ancestors).tolist() == list(range(count))


@given(ancestors=st.lists(st.integers(0, 11), min_size=12, max_size=12))
def test_settled_keeps_the_ancestors_and_lets_survivors_stay(ancestors: list[int]) -> None:
    index = settled(torch.tensor(ancestors))
    assert sorted(index.tolist()) == sorted(ancestors)
    assert all(index[survivor] == survivor for survivor in set(ancestors))


def test_weights_are_normalised_in_log_space() -> None:
    torch.testing.assert_close(normalised(torch.tensor([1e5, 1e5 + math.log(3)], dtype=torch.float64)), torch.tensor([0.25, 0.75]).double())
    lost = normalised(torch.tensor([[-math.inf, -math.inf], [-math.inf, -9e9]]))
    torch.testing.assert_close(lost, torch.tensor([[0.5, 0.5], [0.0, 1.0]]).double())
    assert effective_sample_size(normalised(torch.zeros(2, 8))).tolist() == [8.0, 8.0]
    assert float(effective_sample_size(torch.tensor([1.0, 0.0]))) == 1.0
