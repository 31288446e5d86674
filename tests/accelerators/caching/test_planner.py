"""The planner on tables whose best answer is known, and `hasten.plan` end to end on a tiny pipeline."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from hasten.accelerators.caching.calibrate import Sketches, Tables
from hasten.accelerators.caching.planner import Planner
from hasten.accelerators.caching.segments import Span
from hasten.pipelines.calibration import StepCosts
from hasten.pipelines.planning import steps_for

LEVELS = tuple(np.linspace(1.0, 0.1, 10))


def tables(paths: np.ndarray, sensitivity: np.ndarray | None = None) -> Tables:
    """Tables of offsets [samples, T, D]."""
    g = np.ones(paths.shape[1]) if sensitivity is None else sensitivity
    return Tables(paths @ paths.transpose(0, 2, 1), g, LEVELS[: paths.shape[1]])


def smooth(seed: int, steps: int = 10) -> np.ndarray:
    """Offsets that move smoothly, fast at first."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, steps)
    basis = np.stack([np.ones(steps), t, np.exp(-6 * t), np.sin(3 * t)])
    return np.einsum("bt,sbd->std", basis, rng.normal(size=(3, 4, 40)))


def test_offsets_on_a_line_are_forecast_without_error() -> None:
    t = np.asarray(LEVELS)
    line = np.stack([a * t[:, None] + b for a, b in np.random.default_rng(0).normal(size=(3, 2, 1, 7))])
    found = Planner(tables(line)).solve(2)
    assert found.predicted < 1e-6 * np.linalg.norm(line)
    held = Planner(tables(line), terms=1, fitted=False).solve(2)
    assert held.predicted > 1e-2


def test_fitted_weights_are_never_worse_than_the_polynomial_on_their_own_tables() -> None:
    made = tables(smooth(1))
    for computed in itertools.combinations(range(1, 10), 3):
        fitted, polynomial = (Planner(made, coherence=0.0, fitted=f).judge([0, *computed]) for f in (True, False))
        assert fitted.predicted <= polynomial.predicted * 1.02


@pytest.mark.parametrize("coherence", [0.0, 0.5, 1.0])
def test_the_search_finds_what_brute_force_finds(coherence: float) -> None:
    g = np.linspace(2, 0.5, 10)
    for seed in range(3):
        planner = Planner(tables(smooth(seed), g), coherence=coherence)
        best = min(planner.judge([0, *rest]).predicted for rest in itertools.combinations(range(1, 10), 3))
        assert planner.solve(4).predicted <= best * 1.05


def test_prediction_is_the_error_that_the_tables_describe() -> None:
    """With one sample and full coherence the prediction is the norm of the weighted sum of what the forecasts miss."""
    path, g = smooth(3)[:1], np.linspace(1, 2, 10)
    found = Planner(tables(path, g), coherence=1.0).judge([0, 4, 7])
    missed, history = np.zeros(path.shape[-1]), []
    for k in range(10):
        if k in (0, 4, 7):
            history = [k, *history][:3]
        else:
            missed += g[k] * (path[0, k] - sum(w * path[0, s] for w, s in zip(found.weights[k], history, strict=False)))
    assert found.predicted == pytest.approx(np.linalg.norm(missed), rel=1e-6)


def test_more_computed_steps_predict_less_error() -> None:
    planner = Planner(tables(smooth(4)))
    predicted = [planner.solve(n).predicted for n in range(1, 11)]
    assert all(b <= a * 1.01 for a, b in itertools.pairwise(predicted)) and predicted[-1] == 0


def test_limits_are_named() -> None:
    planner = Planner(tables(smooth(5)))
    with pytest.raises(ValueError, match="count must be from 1 to 10, not 0"):
        planner.solve(0)
    with pytest.raises(ValueError, match="terms must be from 1 to 3, not 4"):
        Planner(tables(smooth(5)), terms=4)


def test_sketches_keep_inner_products() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4, 2, 8, 6, 5, generator=generator)  # steps, sites, rows, tokens, channels
    full, narrow = (Sketches(4, None, 8, budget) for budget in (10**9, 1))
    guided = Sketches(4, 3.0, 8)
    for k in range(4):
        for sketches in (full, narrow, guided):
            sketches("branch0", k, {Span(s, s + 1, k): {0: values[k, s]} for s in range(2)})
    summed = values.sum(1).flatten(2)
    expected = torch.einsum("knd,lnd->nkl", summed, summed)
    np.testing.assert_allclose(full.gram(), expected, rtol=1e-4, atol=1e-4)
    assert narrow.width == 64
    without, given = summed.chunk(2, 1)
    weighed = without + 3 * (given - without)
    np.testing.assert_allclose(guided.gram(), torch.einsum("knd,lnd->nkl", weighed, weighed), rtol=1e-4, atol=1e-3)


def test_a_sketch_of_few_entries_is_near() -> None:
    values = torch.randn(3, 2, 100_000)
    sketches = Sketches(3, None, 2, budget=4 * 3 * 2 * 4096)
    for k in range(3):
        sketches("b", k, {Span(0, 1, k): {0: values[k]}})
    diagonal = np.diagonal(sketches.gram(), axis1=1, axis2=2)
    np.testing.assert_allclose(diagonal, 100_000, rtol=0.1)


def test_steps_for_a_speedup() -> None:
    costs = StepCosts(full=1.0, reused=0.05, other=0.02)
    assert steps_for(costs, 20, 1.0) == 20
    for speedup in (1.5, 2.0, 3.0):
        count = steps_for(costs, 20, speedup)
        assert costs.speedup(20, count) >= speedup > costs.speedup(20, count + 1)
    with pytest.raises(ValueError, match=r"speedup=1000 is out of reach: with one computed step of 20 it would be 8\.68"):
        steps_for(costs, 20, 1000.0)


@pytest.mark.parametrize("coherence", [0.0, 0.5, 1.0])
def test_the_quick_prediction_is_that_of_the_judge(coherence: float) -> None:
    planner = Planner(tables(smooth(6), np.linspace(2, 0.5, 10)), coherence=coherence)
    for rest in itertools.combinations(range(1, 10), 3):
        assert planner.predicted((0, *rest)) == pytest.approx(planner.judge((0, *rest)).predicted, rel=1e-9)
