"""The segment solver against brute force, its limits and its speed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.caching.solver import segment_dp


def brute(cost: np.ndarray, segments: int, least: int, most: int) -> float:
    steps, best = len(cost), np.inf
    for cuts in itertools.combinations(range(1, steps), segments - 1):
        edges = [0, *cuts, steps]
        lengths = np.diff(edges)
        if (lengths[:-1] >= least).all() and (lengths <= most).all():
            best = min(best, sum(cost[a, b - 1] for a, b in itertools.pairwise(edges)))
    return best


@given(st.integers(1, 10), st.integers(0, 2**32 - 1), st.integers(1, 3), st.integers(0, 7))
def test_equals_brute_force(steps: int, seed: int, least: int, more: int) -> None:
    cost = np.random.default_rng(seed).random((steps, steps))
    found = segment_dp(cost, steps, least, least + more)
    for m in range(1, steps + 1):
        expected = brute(cost, m, least, least + more)
        assert found.values[m] == pytest.approx(expected, rel=1e-5)
        if np.isfinite(expected):
            edges = [*found.starts(m), steps]
            assert edges[0] == 0 and len(edges) == m + 1
            assert sum(cost[a, b - 1] for a, b in itertools.pairwise(edges)) == pytest.approx(expected, rel=1e-5)
        else:
            with pytest.raises(ValueError, match="cannot be cut"):
                found.starts(m)


def anchored(drift: np.ndarray) -> np.ndarray:
    """cost[a, b]: distances of all values of a segment to its first."""
    distance = np.abs(drift[:, None] - drift[None])
    return np.triu(distance).cumsum(1)


@given(st.integers(2, 12), st.integers(0, 2**32 - 1))
def test_more_segments_never_cost_more_and_all_of_them_nothing(steps: int, seed: int) -> None:
    found = segment_dp(anchored(np.random.default_rng(seed).random(steps)), steps)
    assert (np.diff(found.values[1:]) <= 1e-6).all() and found.values[steps] == 0
    assert found.starts(steps) == list(range(steps))


def test_costs_of_neighbours_alone_need_no_programme() -> None:
    """A score that looks at adjacent steps only telescopes: its optimum refreshes where neighbours differ most."""
    change = np.array([0.0, 0.3, 0.1, 0.9, 0.2, 0.5])  # between each step and the one before
    cost = np.array([[change[a + 1 : b + 1].sum() for b in range(6)] for a in range(6)])
    assert segment_dp(cost, 3).starts(3) == [0, 3, 5]


def test_limits_are_named() -> None:
    with pytest.raises(ValueError, match="cost must be square"):
        segment_dp(np.zeros((2, 3)), 1)
    with pytest.raises(ValueError, match="budget must be from 1 to the number of steps, 3, not 4"):
        segment_dp(np.zeros((3, 3)), 4)
    with pytest.raises(ValueError, match="min_length must be from 1 to max_length, 2, not 3"):
        segment_dp(np.zeros((3, 3)), 1, 3, 2)
    with pytest.raises(ValueError, match="must be a number"):
        segment_dp(np.full((3, 3), np.nan), 1)


def test_a_thousand_steps_take_milliseconds() -> None:
    cost = anchored(np.random.default_rng(0).random(1000).cumsum())
    seconds = []
    for _ in range(10):  # other work on the machine may slow some of them
        began = time.perf_counter()
        found = segment_dp(cost, 50)
        seconds.append(time.perf_counter() - began)
    assert len(found.starts(50)) == 50
    assert min(seconds) < 0.25, "40 ms on an idle core; a loop in Python over its 25 million cells takes half a minute"
