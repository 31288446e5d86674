"""Learned grids against brute force, and against even grids on problems whose solution is known."""

from __future__ import annotations

import itertools
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.solvers.evodiff import first_order
from hasten.accelerators.solvers.grids import first_order_errors, learned_grid, refined_grid, second_order_errors
from hasten.accelerators.steering.levels import AlphaSigma
from tests.accelerators.solvers.runs import DENOISERS, Denoiser, Path, angles, apart, ddim, dpm_2m, flow, noise

NODES, FINE = 40, 10


def sums(errors: np.ndarray, steps: int) -> dict[tuple[int, ...], float]:
    """The error of every chain."""
    nodes, found = len(errors) - 1, {}
    for inner in itertools.combinations(range(1, nodes), steps - 1):
        chain = (0, *inner, nodes)
        if errors.ndim == 2:
            found[chain] = sum(errors[a, b] for a, b in pairwise(chain))
        else:
            found[chain] = errors[0, 0, chain[1]] + sum(errors[p, a, b] for p, a, b in zip(chain, chain[1:], chain[2:], strict=False))
    return found


@given(st.integers(1, 8), st.integers(2, 3), st.integers(0, 2**32 - 1), st.sampled_from([1e-20, 1.0, 1e20]))
def test_equals_brute_force(nodes: int, dims: int, seed: int, scale: float) -> None:
    errors = scale * np.random.default_rng(seed).random((nodes + 1,) * dims)
    for steps in range(1, nodes + 1):
        grid, all_sums = learned_grid(errors, steps), sums(errors, steps)
        assert tuple(grid) in all_sums
        assert all_sums[tuple(grid)] == pytest.approx(min(all_sums.values()), rel=1e-5, abs=0)


def test_steps_that_are_barred_are_not_taken() -> None:
    errors = np.ones((5, 5))
    errors[0, 2:] = errors[:3, 4] = np.inf
    assert learned_grid(errors, 3) in ([0, 1, 3, 4], [0, 1, 2, 4])[:1]
    with pytest.raises(ValueError, match=r"cannot be cut into 2"):
        learned_grid(errors, 2)
    table = np.full((4, 4, 4), np.inf)
    table[0, 0, 1], table[0, 1, 3] = 1.0, 1.0
    assert learned_grid(table, 2) == [0, 1, 3]
    with pytest.raises(ValueError, match=r"^there is no chain of 3 steps with finite errors$"):
        learned_grid(table, 3)


def recorded(denoise: Denoiser, latents: Tensor, path: Path, every: int) -> tuple[list[Tensor], list[Tensor], list[AlphaSigma]]:
    """A long first-order run, seen at some of its points."""
    states, x0 = [latents], []
    for k, (now, then) in enumerate(pairwise(path)):
        estimate = denoise(latents, now)
        latents = first_order(latents, estimate, now, then)
        if k % every == 0:
            x0.append(estimate)
        if (k + 1) % every == 0:
            states.append(latents)
    return states, x0, list(path[::every])


def test_tables_hold_what_the_solvers_miss() -> None:
    states, x0, path = recorded(DENOISERS["numbers"], noise(2), angles(6), 1)
    first, second = (table(states, x0, path, scale=0) for table in (first_order_errors, second_order_errors))
    size = states[-1].norm()
    for a in range(6):
        assert first[a, a + 1] < 1e-12, "neighbours were reached by the same step"
        assert np.isinf(first[a, : a + 1]).all() and np.isinf(second[a:, a, 1:])[0 if a else 1 :].all()
    assert first[1, 4] == pytest.approx(float((first_order(states[1], x0[1], path[1], path[4]) - states[4]).norm() / size))
    np.testing.assert_allclose(second[0, 0], first[0])
    np.testing.assert_allclose(second[2, 4, 6], first[4, 6])
    start = {path[1]: (states[1], x0[1]), path[3]: (states[3], x0[3])}
    reached = dpm_2m(lambda x, at: start[at][1], states[1], [path[1], path[3], path[5]])
    first_leg = first_order(states[1], x0[1], path[1], path[3])
    moved = reached + path[5].sigma / path[3].sigma * (states[3] - first_leg)  # as from the recorded state
    assert second[1, 3, 5] == pytest.approx(float((moved - states[5]).norm() / size))
    assert first_order_errors(states, x0, path, scale=1)[1, 4] == pytest.approx(first[1, 4] / path[4].alpha)


@pytest.mark.parametrize("path", [flow, angles])
@pytest.mark.parametrize("name", DENOISERS)
def test_a_learned_grid_beats_the_even_one_on_other_samples(name: str, path) -> None:  # type: ignore[no-untyped-def]
    denoise = DENOISERS[name]
    states, x0, nodes = recorded(denoise, noise(12, 1), path(NODES * FINE), FINE)
    errors, x = first_order_errors(states, x0, nodes), noise(24, 2)
    reference = ddim(denoise, x, path(NODES * FINE))
    for steps in (5, 8, 10):
        even = [nodes[round(k * NODES / steps)] for k in range(steps + 1)]
        learned = [nodes[k] for k in learned_grid(errors, steps)]
        assert apart(ddim(denoise, x, learned), reference) < 0.97 * apart(ddim(denoise, x, even), reference), steps


def test_refining_helps_a_solver_whose_errors_do_not_add_up() -> None:
    denoise = DENOISERS["numbers"]
    nodes = angles(NODES)
    calibration, x = noise(2, 1), noise(12, 2)
    references = [dpm_2m(denoise, latents, angles(800)) for latents in (calibration, x)]

    def error(grid: list[int], latents: Tensor = calibration, reference: Tensor = references[0]) -> float:
        return apart(dpm_2m(denoise, latents, [nodes[k] for k in grid]), reference)

    even = [0, 8, 16, 24, 32, 40]
    refined = refined_grid(even, NODES, error)  # type: ignore[arg-type]
    assert error(refined) < error(even) and error(refined, x, references[1]) < 0.75 * error(even, x, references[1])


@given(st.integers(3, 12), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_refining_keeps_the_ends_the_order_and_the_budget(nodes: int, calls: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    grid = [0, *sorted(random.choice(np.arange(1, nodes), random.integers(0, nodes), replace=False).tolist()), nodes]
    asked: list[float] = []

    def error(trial) -> float:  # type: ignore[no-untyped-def]
        assert trial[0] == 0 and trial[-1] == nodes and len(trial) == len(grid) and all(a < b for a, b in pairwise(trial))
        asked.append(float(random.random()))
        return asked[-1]

    refined_grid(grid, nodes, error, calls)
    assert len(asked) <= calls


def test_refining_finds_the_minimum_of_a_bowl_and_never_returns_worse() -> None:
    target = [0, 3, 17, 31, 40]
    found = refined_grid([0, 10, 20, 30, 40], 40, lambda grid: float(sum((a - b) ** 2 for a, b in zip(grid, target, strict=True))))
    assert found == target
    assert refined_grid([0, 1, 2], 2, lambda grid: 1.0) == [0, 1, 2]


@pytest.mark.parametrize(
    ("errors", "steps", "message"),
    [
        (np.ones((3, 4)), 1, r"errors must be \[M \+ 1, M \+ 1\] or .*, not \[3, 4\]"),
        (np.ones(3), 1, r"errors must be \[M"),
        (np.full((3, 3), np.nan), 1, "errors must be numbers of at least 0"),
        (-np.ones((3, 3)), 1, "errors must be numbers of at least 0"),
        (np.ones((3, 3)), 3, "steps must be a whole number from 1 to the recorded ones, 2, not 3"),
        (np.ones((3, 3)), 0, "steps must be a whole number from 1"),
        (np.ones((3, 3)), 1.0, "steps must be a whole number from 1"),
    ],
)
def test_bad_tables_are_refused_in_one_line(errors: np.ndarray, steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        learned_grid(errors, steps)
    assert "\n" not in str(caught.value)


def test_bad_runs_and_grids_are_refused_in_one_line() -> None:
    x = torch.zeros(1, 1)
    with pytest.raises(ValueError, match=r"^a run of M steps has M \+ 1 states, M estimates and M \+ 1 levels, not 2, 2 and 3$"):
        first_order_errors([x, x], [x, x], flow(2))
    for grid in ([0, 2, 1, 3], [0, 2], [1, 3], [3]):
        with pytest.raises(ValueError, match=r"^grid must rise from 0 to nodes, 3, not \["):
            refined_grid(grid, 3, lambda trial: 0.0)
    with pytest.raises(ValueError, match=r"^calls must be at least 1, not 0$"):
        refined_grid([0, 3], 3, lambda trial: 0.0, calls=0)
