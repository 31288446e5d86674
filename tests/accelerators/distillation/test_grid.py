"""The grid: exact forward kernels between nodes, estimates and jumps row by row, and segments."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.distillation.grid import Grid
from hasten.accelerators.solvers.gamma import PREDICTIONS, estimate
from hasten.accelerators.steering.levels import AlphaSigma
from tests.accelerators.distillation.oracles import grid_of


def rows(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_an_estimate_is_that_of_the_sampler_row_by_row(prediction: str) -> None:
    grid = grid_of(prediction)
    index = torch.arange(1, grid.steps)
    output, latents = rows(len(index)), rows(len(index), 1)
    together = grid.estimate(output, latents, index)
    for row, node in enumerate(index):
        at = AlphaSigma(float(grid.alpha[node]), float(grid.sigma[node]))
        alone = estimate(output[row : row + 1], latents[row : row + 1], at, prediction)
        torch.testing.assert_close(together.x0[row], alone.x0[0])
        torch.testing.assert_close(together.noise[row], alone.noise[0])


@given(st.sampled_from(["epsilon", "flow_prediction"]), st.integers(1, 11), st.integers(0, 11))
def test_noising_in_two_goes_is_noising_in_one(prediction: str, first: int, further: int) -> None:
    grid = grid_of(prediction)
    last = min(first + further, grid.steps - 1)
    one, two = torch.tensor([first]), torch.tensor([last])
    x0, none = rows(1), torch.zeros(1, 3, 2, dtype=torch.float64)
    signal = grid.renoised(grid.noised(x0, none, one), one, two, none)
    torch.testing.assert_close(signal, grid.noised(x0, none, two))
    # Independent noises add up in the square.
    unit = torch.ones_like(none)
    kept = grid.renoised(grid.noised(none, unit, one), one, two, none)
    added = grid.renoised(none, one, two, unit)
    torch.testing.assert_close(kept.square() + added.square(), grid.noised(none, unit, two).square())


def test_noising_never_goes_back() -> None:
    grid = grid_of("epsilon")
    with pytest.raises(ValueError, match="noise can only be added"):
        grid.renoised(rows(1), torch.tensor([5]), torch.tensor([4]), rows(1))


def test_the_top_node_is_noise_alone() -> None:
    grid = grid_of("epsilon")
    x0, noise = rows(2), rows(2, 1)
    torch.testing.assert_close(grid.noised(x0, noise, torch.tensor([grid.steps, 0])), torch.stack([noise[0], x0[1]]))


def test_a_jump_to_its_own_node_stays_and_one_of_a_single_phase_lands_on_the_estimate() -> None:
    grid = grid_of("flow_prediction")
    latents, velocity, index = rows(12), rows(12, 1), torch.arange(1, 13)
    given_ = grid.estimate(velocity, latents, index)
    torch.testing.assert_close(grid.jump(given_, index), latents)
    time = grid.sigma[index].view(-1, 1, 1)
    torch.testing.assert_close(grid.jump(given_, torch.zeros_like(index)), latents - time * velocity)


@given(st.integers(1, 40), st.data())
def test_segments_begin_where_the_paper_says(steps: int, data: st.DataObject) -> None:
    segments = data.draw(st.integers(1, steps))
    grid = Grid.flow(steps)
    ends = [int(k * steps / segments + 1e-9) for k in range(segments)]
    index = torch.arange(1, steps + 1)
    expected = [max(end for end in ends if end <= node - 1) for node in index.tolist()]
    assert grid.segment_start(index, segments).tolist() == expected


def test_grids_are_on_the_schedule() -> None:
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = torch.cumprod(1 - betas, 0)
    grid = Grid.variance_preserving(kept, 50)
    assert grid.timesteps[1:].tolist() == list(range(19, 1000, 20))  # of the published LCM scripts
    torch.testing.assert_close(grid.alpha[1:].square(), kept[grid.timesteps[1:]])
    assert Grid.variance_preserving(kept, 16, top=649).timesteps[-1] == 649
    flow = Grid.flow(4, shift=3.0)
    torch.testing.assert_close(flow.sigma, torch.tensor([0.0, 0.5, 0.75, 0.9, 1.0], dtype=torch.float64))
    torch.testing.assert_close(flow.timesteps, 1000 * flow.sigma)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: Grid.variance_preserving(torch.linspace(0.99, 0.1, 10), 11),
            "steps must be at most the number of timesteps up to top, 10",
        ),
        (lambda: Grid.variance_preserving(torch.linspace(0.99, 0.1, 10), 2, top=10), "top must be a timestep from 0 to 9, not 10"),
        (lambda: Grid.variance_preserving(torch.linspace(0.99, 0.0, 10), 2), "begin at a lower noise level"),
        (lambda: Grid.variance_preserving(torch.linspace(0.99, 0.1, 10), 2, "score"), "prediction_type must be one of"),
        (lambda: Grid.flow(0), "steps must be a whole number of at least 1"),
        (lambda: Grid.flow(4, top=1.5), "top above 0 and at most 1"),
        (lambda: Grid(torch.arange(3), torch.tensor([1.0, 0.5, 0.6]), torch.tensor([0.0, 0.5, 0.4]), "epsilon"), "must rise from 0"),
        (lambda: Grid(torch.arange(2), torch.tensor([1.0, 0.5, 0.4]), torch.tensor([0.0, 0.5, 0.6]), "epsilon"), r"must all be \[N \+ 1\]"),
        (lambda: Grid.flow(4).segment_start(torch.tensor([1]), 5), "segments must be from 1 to the grid's steps, 4"),
    ],
)
def test_what_is_no_grid_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
