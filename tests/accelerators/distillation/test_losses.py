"""The losses: zero for the exact student on a problem with a known solution, right for a wrong one, and with gradients into it alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hasten.accelerators.distillation.ctm import ConsistencyTrajectory
from hasten.accelerators.distillation.grid import Conditions, Grid
from hasten.accelerators.distillation.lcm import LCM, SIGMA_DATA, TIMESTEP_SCALE, consistency
from hasten.accelerators.distillation.method import DistillationMethod, Task
from hasten.accelerators.distillation.pcm import PhasedConsistency
from hasten.accelerators.distillation.segmented import segmented_jumps
from hasten.accelerators.distillation.teacher import distance, drawn_scale, guided
from hasten.accelerators.distillation.trajectory import TrajectoryConsistency
from hasten.accelerators.solvers.gamma import PREDICTIONS, Estimate
from tests.accelerators.distillation.oracles import MEAN, SHAPE, carried, grid_of, node_of, output_of, said, walking

ROWS = 64
EPSILONS = ("epsilon", "v_prediction", "flow_prediction")


def task(student: Callable[..., Tensor], teacher: Callable[..., Tensor], grid: Grid, conditions: Conditions | None = None) -> Task:
    generator = torch.Generator().manual_seed(3)
    x0, noise = torch.randn(2, ROWS, *SHAPE, generator=generator, dtype=torch.float64)
    return Task(student, teacher, x0, noise, conditions or Conditions(0.0), grid, generator)


def next_node(stride: int = 1, grid: Grid | None = None, segments: int = 1) -> Callable[[Tensor], Tensor]:
    def landing(index: Tensor) -> Tensor:
        low = torch.zeros_like(index) if grid is None else grid.segment_start(index, segments)
        return torch.maximum(index - stride, low)

    return landing


# ----------------------------------------------------------------------------------------------------------- exact students


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("segments", [1, 2, 4, 5, 12])
def test_the_exact_student_has_no_segmented_loss(prediction: str, segments: int) -> None:
    grid = grid_of(prediction)
    student = walking(grid, lambda index: grid.segment_start(index, segments))
    for stride in (1, 3):
        teacher = walking(grid, next_node(stride, grid, segments))
        method = TrajectoryConsistency((segments,), stride=stride)
        assert method.loss(task(student, teacher, grid), segments) < 1e-20
        phased = PhasedConsistency(segments, huber=None, stride=stride)
        assert phased.loss(task(student, teacher, grid), segments) < 1e-20


@pytest.mark.parametrize("prediction", EPSILONS)
def test_a_student_of_other_segments_has_one(prediction: str) -> None:
    grid = grid_of(prediction)
    teacher = walking(grid, next_node())
    student = walking(grid, lambda index: grid.segment_start(index, 4))
    assert TrajectoryConsistency().loss(task(student, teacher, grid), 1) > 1e-4


@pytest.mark.parametrize("prediction", EPSILONS)
def test_the_teacher_alone_says_where_a_segment_ends(prediction: str) -> None:
    """A student that agrees with itself, but not with the teacher, is only wrong where the teacher's step ends on the landing."""
    grid = grid_of(prediction)

    def shifted(grid: Grid, latents: Tensor, index: Tensor, to: Tensor) -> Tensor:
        return carried(grid, latents, index, to) + 1.0

    student = walking(grid, lambda index: grid.segment_start(index, 3), shifted)
    index = torch.arange(1, 13)
    start = grid.segment_start(index, 3)
    latents = torch.randn(12, *SHAPE, dtype=torch.float64)
    jumps = segmented_jumps(student, walking(grid, next_node()), latents, index, start, Conditions(0.0), grid, torch.ones(12))
    off = distance(*jumps, None)
    torch.testing.assert_close(off, (index == start + 1).double())


def test_the_lcm_student_with_its_boundary_is_exact_where_it_should_be() -> None:
    for prediction in EPSILONS:
        grid = grid_of(prediction)

        def student(latents: Tensor, timesteps: Tensor, conditions: Any, grid: Grid = grid) -> Tensor:
            index = node_of(grid, timesteps)
            time = 1000.0 / grid.scale * timesteps.double().view(-1, 1, 1) * TIMESTEP_SCALE
            length = time.square() + SIGMA_DATA**2
            clean = carried(grid, latents, index, torch.zeros_like(index))
            x0 = (clean - SIGMA_DATA**2 / length * latents) / (time / length.sqrt())
            alpha, sigma = grid.at(index, latents)
            return said(grid, Estimate(x0, (latents - alpha * x0) / sigma), index)

        teacher = walking(grid, next_node(2))
        assert LCM(huber=None, stride=2).loss(task(student, teacher, grid), 1) < 1e-18
        latents = torch.randn(2, *SHAPE, dtype=torch.float64)
        torch.testing.assert_close(consistency(student, latents, torch.tensor([0, 0]), 0.0, grid), latents)


@pytest.mark.parametrize("prediction", EPSILONS)
def test_on_one_point_every_jump_is_exact(prediction: str) -> None:
    """Data of a single point: all trajectories are straight in (alpha, sigma), whatever the landing."""
    grid = grid_of(prediction)

    def denoiser(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        index = node_of(grid, timesteps)
        _, sigma = grid.at(index, latents)
        alpha, _ = grid.at(index, latents)
        x0 = torch.full_like(latents, MEAN)
        return said(grid, Estimate(x0, (latents - alpha * x0) / sigma), index)

    given = task(denoiser, denoiser, grid)._replace(x0=torch.full((ROWS, *SHAPE), MEAN, dtype=torch.float64))
    assert ConsistencyTrajectory().loss(given, 1) < 1e-20
    assert TrajectoryConsistency(landing="any").loss(given, 3) < 1e-20
    wrong = given._replace(x0=given.x0 + 1)
    assert ConsistencyTrajectory(denoising=0).loss(wrong, 1) < 1e-20 < ConsistencyTrajectory().loss(wrong, 1)


def test_the_teacher_of_a_consistency_trajectory_walks_several_steps() -> None:
    grid = grid_of("flow_prediction")
    calls: list[int] = []

    def teacher(latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        calls.append(len(latents))
        return walking(grid, next_node())(latents, timesteps)

    student = walking(grid, lambda index: torch.zeros_like(index))
    given = task(student, teacher, grid)
    ConsistencyTrajectory(reach=5, denoising=0).loss(given, 1)
    assert len(calls) == 5


# ------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_folded_in_with_the_scale_of_each_row() -> None:
    grid = grid_of("epsilon")
    latents = torch.randn(3, *SHAPE, dtype=torch.float64)
    index, scale = torch.tensor([2, 5, 9]), torch.tensor([1.0, 3.0, 7.5])

    def teacher(latents: Tensor, timesteps: Tensor, conditions: float) -> Tensor:
        return 0.1 * latents + conditions

    found = guided(teacher, latents, index, Conditions(2.0, 0.5), grid, scale)
    expected = 0.1 * latents + 0.5 + scale.view(-1, 1, 1) * 1.5
    torch.testing.assert_close(found.noise, expected)
    calls = []
    alone = guided(lambda *a: calls.append(1) or teacher(*a), latents, index, Conditions(2.0), grid, scale)  # type: ignore[func-returns-value]
    torch.testing.assert_close(alone.noise, 0.1 * latents + 2.0)
    assert len(calls) == 1


@pytest.mark.parametrize("method", [TrajectoryConsistency(guidance=(3, 3)), PhasedConsistency(guidance=(3, 3)), LCM(guidance=(3, 3))])
def test_the_student_learns_the_guided_teacher(method: DistillationMethod) -> None:
    """The teacher is right at guidance 3 alone: neither branch is, nor any other scale."""
    grid, segments = grid_of("epsilon"), method.stages[0]
    exact = walking(grid, lambda index: grid.segment_start(index, segments))
    teacher = walking(grid, next_node())
    off = 0.3
    right = Conditions(off * 2 / 3, off)

    def teaching(latents: Tensor, timesteps: Tensor, conditions: float) -> Tensor:
        return teacher(latents, timesteps, conditions)

    def student(latents: Tensor, timesteps: Tensor, conditions: float) -> Tensor:
        return exact(latents, timesteps)  # conditions are the student's own affair

    plain = method.loss(task(student, teaching, grid), segments)
    torch.testing.assert_close(method.loss(task(student, teaching, grid, right), segments), plain)
    assert method.loss(task(student, teaching, grid, Conditions(off / 2, off)), segments) > plain + 1e-6


def test_scales_are_drawn_from_the_range() -> None:
    scale = drawn_scale((2.0, 5.0), 4096, torch.Generator().manual_seed(0))
    assert scale.min() >= 2 and scale.max() <= 5 and abs(float(scale.mean()) - 3.5) < 0.05


# ------------------------------------------------------------------------------------------------------------ gradients


class Scaled(nn.Module):
    """Says its latents times a weight."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight, dtype=torch.float64))

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        return self.weight * latents


@pytest.mark.parametrize("method", [TrajectoryConsistency((4, 1)), PhasedConsistency(4), LCM(), ConsistencyTrajectory()])
def test_gradients_flow_into_the_student_alone_and_not_through_its_target(method: DistillationMethod) -> None:
    grid = grid_of("flow_prediction")
    student, teacher, target = Scaled(0.3), Scaled(0.5), Scaled(0.3)
    given = task(student, teacher, grid)
    state = given.generator.get_state()
    loss = method.loss(given, method.stages[0])
    loss.backward()
    assert student.weight.grad is not None and student.weight.grad != 0 and teacher.weight.grad is None
    # With a target that says the same, loss and gradient are the same: none came by way of the target.
    gradient = student.weight.grad.clone()
    student.weight.grad = None
    given.generator.set_state(state)
    again = method.loss(given._replace(target=target), method.stages[0])
    again.backward()
    assert target.weight.grad is None
    torch.testing.assert_close((again, student.weight.grad), (loss, gradient))


def test_the_loss_does_not_depend_on_anything_but_its_arguments() -> None:
    grid = grid_of("epsilon")
    first, second = (TrajectoryConsistency().loss(task(Scaled(0.3), Scaled(0.5), grid), 4) for _ in range(2))
    assert first == second


# ------------------------------------------------------------------------------------------------------------- learning


class Affine(nn.Module):
    """A student with a scale and an offset of its own for each node: it can be exact where data are Gaussian."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.scale = nn.Parameter(torch.zeros(grid.steps + 1, dtype=torch.float64))
        self.offset = nn.Parameter(torch.zeros(grid.steps + 1, dtype=torch.float64))

    def forward(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        index = node_of(self.grid, timesteps)
        return latents * self.scale[index].view(-1, 1, 1) + self.offset[index].view(-1, 1, 1)


def test_training_in_stages_finds_the_end_of_the_trajectory() -> None:
    grid = Grid.flow(8)
    student, teacher = Affine(grid), walking(grid, next_node())
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    method, steps = TrajectoryConsistency((4, 2, 1)), 240
    generator = torch.Generator().manual_seed(0)
    for step in range(3 * steps):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1 - (step % steps) / steps)
        x0, noise = torch.randn(2, 64, *SHAPE, generator=generator, dtype=torch.float64)
        loss = method.loss(Task(student, teacher, x0, noise, Conditions(0.0), grid, generator), method.stages[step // steps])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    latents = torch.randn(100, *SHAPE, generator=generator, dtype=torch.float64)
    index, zero = torch.full((100,), 8), torch.zeros(100, dtype=torch.long)
    with torch.no_grad():
        landed = grid.jump(grid.estimate(student(latents, grid.times(index), 0.0), latents, index), zero)
    torch.testing.assert_close(landed, carried(grid, latents, index, zero), atol=0.03, rtol=0)


# ------------------------------------------------------------------------------------------------------------- settings


def test_pseudo_huber_lies_between_both_norms() -> None:
    apart = torch.tensor([[1e-5], [3.0]], dtype=torch.float64)
    found = distance(apart, torch.zeros_like(apart), 0.001)
    torch.testing.assert_close(found, torch.tensor([1e-10 / 0.002, 3.0 - 0.001], dtype=torch.float64), rtol=1e-3, atol=0)
    torch.testing.assert_close(distance(apart, torch.zeros_like(apart), None), apart[:, 0].square())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrajectoryConsistency(segments=(2, 4)), r"segments must be falling .* not \(2, 4\)"),
        (lambda: TrajectoryConsistency(segments=()), r"not \(\)"),
        (lambda: TrajectoryConsistency(landing="end"), "landing must be one of start, any, not 'end'"),  # type: ignore[arg-type]
        (lambda: LCM(guidance=(5.0, 2.0)), r"guidance must be \(lowest, highest\)"),
        (lambda: LCM(huber=0.0), "huber must be above 0"),
        (lambda: PhasedConsistency(0), "phases must be a whole number of at least 1"),
        (lambda: PhasedConsistency(ema=1.0), "ema must be from 0 to below 1"),
        (lambda: ConsistencyTrajectory(reach=0), "reach must be a whole number of at least 1"),
        (lambda: ConsistencyTrajectory(denoising=-1.0), "denoising must be a number of at least 0"),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_the_oracle_says_where_it_lands() -> None:
    for prediction in PREDICTIONS:
        grid = grid_of(prediction)
        latents, index, to = torch.randn(12, *SHAPE, dtype=torch.float64), torch.arange(1, 13), torch.arange(12)
        landed = carried(grid, latents, index, to)
        given = grid.estimate(output_of(grid, latents, index, to, landed), latents, index)
        torch.testing.assert_close(grid.jump(given, to), landed)
