"""Distribution matching: its gradient is the difference of the scores, its score learns the student, its rollout is the sampler's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators.distillation.dmd import DistributionMatching, rollout
from hasten.accelerators.distillation.grid import Conditions, Grid
from hasten.accelerators.solvers.gamma import Estimate
from tests.accelerators.distillation.oracles import SHAPE, grid_of, node_of, said


def around(grid: Grid, mean: float, std: float) -> Callable[..., Tensor]:
    """The exact denoiser of data N(mean, std^2)."""

    def denoiser(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        index = node_of(grid, timesteps)
        alpha, sigma = grid.at(index, latents)
        x0 = mean + alpha * std**2 / (alpha.square() * std**2 + sigma.square()) * (latents - alpha * mean)
        return said(grid, Estimate(x0, (latents - alpha * x0) / sigma), index)

    return denoiser


def samples(seed: int = 0, rows: int = 256) -> Tensor:
    return torch.randn(rows, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", ["epsilon", "flow_prediction"])
def test_what_the_scores_agree_on_is_not_moved(prediction: str) -> None:
    grid = grid_of(prediction)
    x0 = samples().requires_grad_()
    denoiser = around(grid, 0.3, 1.0)
    DistributionMatching((1, 1)).student_loss(x0, denoiser, denoiser, Conditions(0.0), grid, torch.Generator().manual_seed(0)).backward()
    assert x0.grad is not None and x0.grad.abs().max() < 1e-12


def test_samples_are_moved_to_where_the_teacher_wants_them() -> None:
    """A student that only shifts noise learns the teacher's mean when its own score is known exactly."""
    grid = grid_of("epsilon")
    teacher, method = around(grid, 2.0, 1.0), DistributionMatching((1, 1))
    mean = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([mean], 0.1)
    for step in range(150):
        fake = around(grid, float(mean.detach()), 1.0)
        loss = method.student_loss(samples(step) + mean, fake, teacher, Conditions(0.0), grid, torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert abs(float(mean.detach()) - 2.0) < 0.1


def test_the_gradient_is_the_difference_of_the_estimates_over_how_far_the_teacher_is_off() -> None:
    grid = grid_of("epsilon")
    x0 = samples(rows=3).requires_grad_()
    told = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64).view(3, 1, 1)

    def says(value: float) -> Callable[..., Tensor]:
        def denoiser(latents: Tensor, timesteps: Tensor, conditions: Tensor) -> Tensor:
            index = node_of(grid, timesteps)
            alpha, sigma = grid.at(index, latents)
            clean = torch.full_like(latents, value) * conditions
            return said(grid, Estimate(clean, (latents - alpha * clean) / sigma), index)

        return denoiser

    DistributionMatching((1, 1)).student_loss(x0, says(0.5), says(0.2), Conditions(told), grid, torch.Generator()).backward()
    off = (x0.detach() - 0.2 * told).abs().mean((1, 2), keepdim=True)
    assert x0.grad is not None
    torch.testing.assert_close(x0.grad, (0.3 * told / off).expand_as(x0) / x0.numel())


def test_the_score_learns_what_the_student_makes_and_the_student_nothing_of_it() -> None:
    grid = grid_of("flow_prediction")
    x0 = 0.5 + 0.7 * samples()
    losses = {}
    for mean in (0.0, 0.5, 1.0):
        generator = torch.Generator().manual_seed(1)
        losses[mean] = DistributionMatching().score_loss(x0, around(grid, mean, 0.7), Conditions(0.0), grid, generator)
    assert losses[0.5] < min(losses[0.0], losses[1.0])


def test_a_rollout_samples_as_the_gamma_sampler_does_and_has_one_gradient() -> None:
    grid = grid_of("epsilon")
    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    exact, calls = around(grid, 0.3, 0.5), []

    def student(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        calls.append((int(timesteps[0]), torch.is_grad_enabled()))
        return weight * exact(latents, timesteps, conditions)

    noise, generator = samples(rows=4), torch.Generator().manual_seed(5)
    found = rollout(student, noise, 0.0, grid, [12, 6, 3], generator)
    assert calls == [(int(grid.timesteps[12]), False), (int(grid.timesteps[6]), False), (int(grid.timesteps[3]), True)]
    fresh, latents = torch.Generator().manual_seed(5), noise
    for node, then in ((12, 6), (6, 3)):
        index = torch.full((4,), node)
        x0 = grid.estimate(exact(latents, grid.times(index), 0.0), latents, index).x0
        drawn = torch.randn(noise.shape, generator=fresh, dtype=torch.float64)
        latents = grid.noised(x0, drawn, torch.full((4,), then))
    torch.testing.assert_close(found.latents, latents)
    assert found.node.tolist() == [3] * 4 and found.x0.requires_grad and not found.latents.requires_grad


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="noise must be two rising shares"):
        DistributionMatching(noise=(0.9, 0.1))
    with pytest.raises(ValueError, match="updates must be a whole number of at least 1"):
        DistributionMatching(updates=0)
