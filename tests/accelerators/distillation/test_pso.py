"""PSO: the published losses by brute force, gradients towards what is preferred, and none where the ratio is clipped."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators.distillation.dmd import rollout
from hasten.accelerators.distillation.grid import Grid
from hasten.accelerators.distillation.pso import OfflinePSO, OnlinePSO, drawn_trajectory
from hasten.accelerators.solvers.gamma import Estimate
from tests.accelerators.distillation.oracles import SHAPE, grid_of, node_of, said

ROWS = 5


class Drawing(nn.Module):
    """A few-step student that draws one value whatever it is given, with a little of its latents."""

    def __init__(self, grid: Grid, value: float, share: float = 0.0) -> None:
        super().__init__()
        self.grid, self.share = grid, share
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        index = node_of(self.grid, timesteps)
        alpha, sigma = self.grid.at(index, latents)
        x0 = self.value + self.share * latents
        return said(self.grid, Estimate(x0, (latents - alpha * x0) / sigma), index)


@pytest.fixture
def grid() -> Grid:
    return grid_of("epsilon")


def samples(seed: int) -> Tensor:
    return torch.randn(ROWS, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("reference", [True, False])
def test_the_offline_loss_is_the_published_one(grid: Grid, reference: bool) -> None:
    student, before = Drawing(grid, 0.4), Drawing(grid, 0.1)
    preferred, rejected = samples(0), samples(1)
    method = OfflinePSO(beta=3.0, rejection=0.2, reference=reference, anchor=0.5)
    loss = method.loss(student, before, preferred, rejected, 0.0, grid, torch.Generator().manual_seed(2))
    total = 0.0
    for row in range(ROWS):
        better, worse = (float((0.4 - x0[row]).square().mean()) for x0 in (preferred, rejected))
        better_before, worse_before = (float((0.1 - x0[row]).square().mean()) for x0 in (preferred, rejected))
        d, d_ref = better - 0.2 * worse, better_before - 0.2 * worse_before
        logit = d_ref - d if reference else -d
        total += math.log1p(math.exp(-3.0 * logit)) if reference else max(0.0, 1 - 3.0 * logit)
        total += 0.5 * worse
    assert float(loss.detach()) == pytest.approx(total / ROWS)


def test_offline_pairs_pull_the_student_towards_what_is_preferred(grid: Grid) -> None:
    student, before = Drawing(grid, 0.0), Drawing(grid, 0.0)
    ones = torch.ones(ROWS, *SHAPE, dtype=torch.float64)
    OfflinePSO(anchor=0).loss(student, before, ones, -ones, 0.0, grid, torch.Generator().manual_seed(0)).backward()
    assert student.value.grad is not None and student.value.grad < 0 and before.value.grad is None


def test_a_trajectory_is_the_sampler_s(grid: Grid) -> None:
    student = Drawing(grid, 0.3, 0.2)
    nodes, noise = (12, 8, 4), samples(3)
    run = drawn_trajectory(student, noise, 0.0, grid, nodes, torch.Generator().manual_seed(1))
    sampled = rollout(student, noise, 0.0, grid, nodes, torch.Generator().manual_seed(1))
    torch.testing.assert_close(run.x0, sampled.x0.detach())
    torch.testing.assert_close(run.latents[-1], sampled.latents)
    assert run.nodes == nodes and len(run.latents) == 3 and torch.equal(run.latents[0], noise)


def test_the_online_loss_is_the_published_one(grid: Grid) -> None:
    student, before = Drawing(grid, 0.32, 0.2), Drawing(grid, 0.3, 0.2)
    nodes = (12, 8, 4)
    runs = [drawn_trajectory(before, samples(seed), 0.0, grid, nodes, torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    preference = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0])
    loss = OnlinePSO(beta=50.0).loss(student, before, *runs, preference, 0.0, grid)
    total = 0.0
    for step in range(2):
        alpha, sigma = float(grid.alpha[nodes[step + 1]]), float(grid.sigma[nodes[step + 1]])
        for row in range(ROWS):
            logs = []
            for run in runs:
                x, then = run.latents[step][row], run.latents[step + 1][row]
                densities = [
                    torch.distributions.Normal(alpha * (value + 0.2 * x), sigma).log_prob(then).mean() for value in (0.32, 0.3)
                ]  # fmt: skip
                logs.append(math.log(min(1.1, max(0.9, math.exp(float(densities[0] - densities[1]))))))
            total += math.log1p(math.exp(-50.0 * float(preference[row]) * (logs[0] - logs[1])))
    assert float(loss.detach()) == pytest.approx(total / (2 * ROWS))


def test_ties_and_clipped_ratios_have_no_gradient(grid: Grid) -> None:
    student, before = Drawing(grid, 0.0), Drawing(grid, 0.0)
    runs = [drawn_trajectory(before, samples(seed), 0.0, grid, (12, 2), torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    tie = OnlinePSO().loss(student, before, *runs, torch.zeros(ROWS), 0.0, grid)
    tie.backward()
    assert float(tie.detach()) == pytest.approx(math.log(2)) and student.value.grad == 0
    near, far = Drawing(grid, 0.0), Drawing(grid, 1e4)
    for one, other in ((far, before), (near, far)):  # the second ratio is more than a float holds
        one.value.grad = None
        OnlinePSO().loss(one, other, *runs, torch.ones(ROWS), 0.0, grid).backward()
        assert one.value.grad == 0


def test_online_pairs_move_the_student_where_the_reward_is(grid: Grid) -> None:
    """The reward is the sample's mean: in a few rounds the student draws larger values, and no farther than its steps are likely."""
    student = Drawing(grid, 0.0, 0.3)
    optimizer = torch.optim.SGD(student.parameters(), 0.02)
    for round_ in range(30):
        before = Drawing(grid, float(student.value.detach()), 0.3)
        generator = torch.Generator().manual_seed(round_)
        noise = [torch.randn(64, *SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
        runs = [drawn_trajectory(student, start, 0.0, grid, (12, 9, 6), generator) for start in noise]
        preference = torch.sign(runs[0].x0.mean((1, 2)) - runs[1].x0.mean((1, 2)))
        optimizer.zero_grad()
        OnlinePSO(beta=5.0).loss(student, before, *runs, preference, 0.0, grid).backward()
        optimizer.step()
    assert float(student.value.detach()) > 0.05


def test_what_cannot_be_compared_is_refused(grid: Grid) -> None:
    student = Drawing(grid, 0.0)
    one, two, other = (drawn_trajectory(student, samples(0), 0.0, grid, nodes, torch.Generator()) for nodes in ((12,), (12, 6), (12, 4)))
    for pair in ((one, one), (two, other)):
        with pytest.raises(ValueError, match="both trajectories must have the same two nodes or more"):
            OnlinePSO().loss(student, student, *pair, torch.ones(ROWS), 0.0, grid)
    with pytest.raises(ValueError, match="clip must be above 0 and below 1"):
        OnlinePSO(clip=0.0)
    with pytest.raises(ValueError, match="beta must be a number of at least 0"):
        OfflinePSO(beta=-1.0)
