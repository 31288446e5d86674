"""FK steering against the exact moments of a tilted mixture, and against what its weights must telescope to."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.steering.best_of_n import BestOfN
from hasten.accelerators.steering.controller import Population, Run, SteeringError, StepInfo
from hasten.accelerators.steering.fk import POTENTIALS, FKSteering
from hasten.accelerators.steering.kernels import ddim_eta
from hasten.accelerators.steering.loop import steer
from hasten.benchmarks.mixture import ORACLES, denoised, flow_path, moments, reward, steered, tilted, vp_path

NOTHING = torch.zeros(0)


def population(method: FKSteering, rewards: list[list[float]], prompts: int = 1) -> tuple[Population, list[torch.Tensor | None]]:
    """A controller that was given these rewards at its scheduled steps of ten, and its index maps."""
    controller = method.begin(Run(prompts=prompts, steps=10))
    given, maps = iter(rewards), []
    for step in range(10):
        scored = torch.tensor(next(given)) if controller.scores_at(step) else None
        maps.append(controller.on_step(StepInfo(step, NOTHING, NOTHING, scored)).index)
    return controller, maps


@pytest.mark.parametrize(("method", "strength"), ORACLES.values(), ids=list(ORACLES))
def test_the_weighted_population_has_the_tilted_moments(method: FKSteering, strength: float) -> None:
    mean, variance, controller = moments(method, strength, 50_000)
    wanted_mean, wanted_variance, _ = tilted(strength)
    assert mean == pytest.approx(wanted_mean, abs=0.03)
    assert variance == pytest.approx(wanted_variance, abs=0.06)
    if method.ess is None:
        assert controller.facts["resampled"] == len(controller.facts["schedule"])
    else:
        assert controller.facts["resampled"] < len(controller.facts["schedule"])


def test_reward_std_is_the_unit_of_lambda() -> None:
    halves = [
        steered(FKSteering(particles=2_000, lambda_=lambda_, reward_std=std), vp_path(20))[1] for lambda_, std in ((1.5, 0.5), (3.0, 1.0))
    ]
    torch.testing.assert_close(*halves)
    run = Run(prompts=1, steps=10, reward_std=0.25)
    assert FKSteering(lambda_=2.0).begin(run).strength == 8.0 and FKSteering(lambda_=2.0, reward_std=1.0).begin(run).strength == 2.0


scores = st.lists(st.floats(-50, 50), min_size=3, max_size=3)


@given(potential=st.sampled_from(POTENTIALS), rows=st.lists(scores, min_size=5, max_size=5), strength=st.floats(0, 30))
def test_without_resampling_every_potential_closes_to_the_tilt_of_the_finished_samples(
    potential: str, rows: list[list[float]], strength: float
) -> None:
    method = FKSteering(particles=3, potential=potential, lambda_=strength, ess=1e-9, select="all")
    controller, maps = population(method, rows[:4])
    assert maps == [None] * 10
    final = torch.tensor(rows[4])
    selection = controller.finish(final)
    torch.testing.assert_close(selection.weights[0], (strength * final.double()).softmax(0), rtol=1e-6, atol=1e-9)
    assert [final[row] for row in selection.rows[0]] == sorted(rows[4], reverse=True)


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
def test_state_follows_the_particles_when_they_are_resampled(potential: str) -> None:
    method = FKSteering(particles=2, potential=potential, lambda_=1.0, ess=0.9, start=0.2, end=0.4, every=0.2)
    # The second particle takes over; then both have its past, so that equal rewards weigh the same.
    controller, maps = population(method, [[0.0, 60.0], [30.0, 30.0]])
    index = maps[2]
    assert index is not None and index.tolist() == [1, 1]
    assert maps[4] is None
    selection = controller.finish(torch.tensor([60.0, 60.0]))
    assert selection.weights.tolist() == [[0.5, 0.5]]
    assert controller.lineage.unique_ancestors() == 1


def test_only_those_alive_are_resampled() -> None:
    controller = FKSteering(particles=4, lambda_=10.0, ess=None).begin(Run(prompts=1, steps=10))
    controller.alive[0] = torch.tensor([False, True, False, True])
    index = controller.on_step(StepInfo(2, NOTHING, NOTHING, torch.tensor([9.0, 5.0, 9.0, 0.0]))).index
    assert index is not None and index.tolist() == [0, 1, 2, 1]
    selection = controller.finish(torch.tensor([9.0, 1.0, 9.0, 2.0]))
    assert selection.rows == [[3]] and selection.weights[0, [0, 2]].tolist() == [0.0, 0.0]


def test_rewards_of_any_size_do_not_overflow() -> None:
    method = FKSteering(particles=4, lambda_=1e4, ess=None)
    controller, _ = population(method, [[1e6, 2e6, -1e6, 3e6]] * 4)
    weights = controller.finish(torch.tensor([1e6, 2e6, 3e6, 4e6])).weights
    assert weights.isfinite().all() and weights.sum() == pytest.approx(1.0)


@pytest.mark.parametrize("potential", POTENTIALS)
def test_a_particle_without_a_reward_loses_and_its_line_ends(potential: str) -> None:
    method = FKSteering(particles=3, potential=potential, lambda_=1.0, ess=None, end=0.2)
    controller, maps = population(method, [[math.nan, 0.0, 0.0]])
    index = maps[2]
    assert index is not None and 0 not in index.tolist()
    assert controller.finish(torch.tensor([1.0, 1.0, 1.0])).weights.isfinite().all()


@pytest.mark.parametrize("potential", POTENTIALS)
@pytest.mark.parametrize("when", range(3))
def test_where_nobody_has_a_reward_nothing_is_learned(potential: str, when: int) -> None:
    rows = [[0.0, 1.0, 2.0], [1.0, 0.5, 0.0], [0.2, 0.1, 0.4]]
    rows[when] = [math.nan] * 3
    method = FKSteering(particles=3, potential=potential, lambda_=1.0, ess=1e-9, every=0.3)
    controller, _ = population(method, rows)
    weights = controller.finish(torch.tensor([1.0, 2.0, 0.0])).weights[0]
    torch.testing.assert_close(weights, torch.tensor([1.0, 2.0, 0.0]).double().softmax(0))


def test_when_all_are_lost_one_by_one_the_weights_start_anew() -> None:
    method = FKSteering(particles=2, lambda_=1.0, ess=1e-9, end=0.4)
    controller, _ = population(method, [[math.nan, 1.0], [1.0, math.nan]])
    assert controller.finish(torch.tensor([0.0, math.log(3.0)])).weights[0].isfinite().all()


def test_best_is_by_the_finished_samples_and_a_lost_one_is_not_chosen() -> None:
    controller, _ = population(FKSteering(particles=3, ess=1e-9), [[0.0] * 3] * 4)
    assert controller.finish(torch.tensor([math.nan, -5.0, -9.0])).rows == [[1]]


def test_sample_draws_by_weight() -> None:
    drawn = []
    for seed in range(300):
        controller = FKSteering(particles=2, lambda_=1.0, select="sample", ess=1e-9).begin(Run(prompts=1, steps=10, seed=seed))
        drawn.append(controller.finish(torch.tensor([0.0, math.log(3.0)])).rows[0][0])
    assert sum(drawn) / 300 == pytest.approx(0.75, abs=0.1)


def test_prompts_do_not_mix_and_do_not_depend_on_each_other() -> None:
    method = FKSteering(particles=4, lambda_=2.0, ess=None, select="all")
    rows = torch.randn(4, 12, generator=torch.Generator().manual_seed(0)).tolist()
    three, maps = population(method, rows, prompts=3)
    for index in maps:
        assert index is None or torch.equal(index // 4, torch.arange(12) // 4)
    two, _ = population(method, [row[:8] for row in rows], prompts=2)
    final = torch.randn(12)
    a, b = three.finish(final), two.finish(final[:8])
    assert a.rows[:2] == b.rows and torch.equal(a.weights[:2], b.weights)


def test_copies_part_in_the_very_step_in_which_they_are_made() -> None:
    seen = {}

    def denoise(latents: torch.Tensor, step: int, owners: torch.Tensor) -> torch.Tensor:
        seen[step] = latents.clone()
        return 0.5 * latents

    method = FKSteering(particles=4, lambda_=1e6, ess=None, start=0.5, end=0.5)
    steer(method, denoise, flow_path(10), (3,), lambda images: images.sum(1))
    assert len(seen[6].unique(dim=0)) == 4 and len(seen[5].unique(dim=0)) == 4


def test_steering_raises_the_reward_more_than_plain_best_of_n() -> None:
    path = vp_path(30)

    def mean_reward(method: FKSteering | BestOfN) -> float:
        out = steer(method, lambda x, k, _: denoised(x, path[k]), path, (1,), reward, prompts=[""] * 300, kernel=ddim_eta)
        return float(torch.stack([reward(samples)[0] for samples in out.latents]).mean())

    assert mean_reward(FKSteering(lambda_=3.0)) > mean_reward(BestOfN(4)) + 0.05


def test_the_schedule_is_the_papers_and_leaves_out_the_last_step() -> None:
    def schedule(steps: int, **more: float) -> list[int]:
        return FKSteering(**more).begin(Run(prompts=1, steps=steps)).facts["schedule"]  # type: ignore[arg-type]

    assert schedule(100) == [20, 40, 60, 80]
    assert schedule(50, start=0.1, end=1.0, every=0.3) == [5, 20, 35]
    assert schedule(4) == [1, 2]
    assert schedule(8) == [2, 3, 5, 6]
    with pytest.raises(SteeringError, match=r"no step of 1 before the last lies at the fractions 0\.2 to 0\.8 every 0\.2"):
        schedule(1)


def test_a_sampler_that_draws_no_noise_is_refused() -> None:
    with pytest.raises(SteeringError, match="FKSteering copies particles, and a sampler that draws no noise"):
        FKSteering().begin(Run(prompts=1, steps=10, stochastic=False))
    assert FKSteering(particles=1).begin(Run(prompts=1, steps=10, stochastic=False)).particles == 1
    with pytest.raises(SteeringError, match="eta above 0"):
        steer(FKSteering(), lambda x, k, p: x, flow_path(10), (2,), lambda x: x.sum(1), kernel=lambda *a: ddim_eta(*a, eta=0.0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"particles": 0}, "particles must be a whole number of at least 1, not 0"),
        ({"potential": "rt"}, "potential must be one of difference, max, sum, current, not 'rt'"),
        ({"lambda_": -1.0}, "lambda_ must be at least 0 and finite, not -1.0"),
        ({"lambda_": math.nan}, "lambda_ must be at least 0 and finite, not nan"),
        ({"reward_std": 0.0}, "reward_std must be above 0 and finite, or None, not 0.0"),
        ({"start": 0.9}, "0 <= start <= end <= 1, not 0.9 and 0.8"),
        ({"every": 0.0}, "every must be a fraction above 0 and at most 1, not 0.0"),
        ({"resampling": "random"}, "resampling must be one of multinomial, residual, stratified, systematic, ssp, not 'random'"),
        ({"ess": 2.0}, "ess must be a share above 0 and at most 1, or None, not 2.0"),
        ({"select": "worst"}, "select must be one of best, sample, all, not 'worst'"),
    ],
)
def test_settings_are_checked(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        FKSteering(**wrong)
