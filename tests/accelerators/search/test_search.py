"""Searches over noises and paths, in a world where a noise's sample is known."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.search.paths import SearchOverPaths
from hasten.accelerators.search.random_search import RandomSearch
from hasten.accelerators.search.rollover import RolloverBudget, rollover_levels
from hasten.accelerators.search.task import Found, SearchMethod, search
from hasten.accelerators.search.zero_order import ZeroOrder, neighbour
from hasten.accelerators.steering.budget import Budget, BudgetError, Meter
from hasten.accelerators.steering.levels import NoisePath
from hasten.accelerators.steering.mixes import MeanRank
from hasten.accelerators.steering.noise import stream
from hasten.accelerators.steering.report import ROOT
from hasten.accelerators.steering.verifiers import RewardWarning
from tests.accelerators.search.worlds import TARGET, World, closeness, evaluate
from tests.accelerators.steering.budgets import limits

METHODS: list[SearchMethod] = [
    RandomSearch(rounds=3),
    RandomSearch(rounds=2, pool=4, growth=1, steps=3),
    ZeroOrder(),
    ZeroOrder(keep="gaussian", restart=False),
    SearchOverPaths(),
    SearchOverPaths(paths=3, branches=2, keep="each", start=0.11),
    RolloverBudget(evaluations=60, initial=4),
    RolloverBudget(evaluations=60, initial=4, completions=3),
    RolloverBudget(evaluations=60, chains=1, initial=4, reserve=0, spacing="even"),
]
STEPS = 10


def run(method: SearchMethod, **more: Any) -> Found:
    arguments: dict[str, Any] = {"steps": STEPS, "seed": 1, **more}
    return search(method, arguments.pop("evaluate", evaluate), (2,), arguments.pop("verifier", closeness), **arguments)


def noise(number: int, seed: int = 1) -> Tensor:
    return torch.randn(2, generator=stream(seed, 0, number))


# ------------------------------------------------------------------------------------------------------------------- all


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_same_seed_gives_the_same_sample_in_batches_of_any_size(method: SearchMethod) -> None:
    whole = run(method)
    for size in (1, 3, 4):
        parts = run(method, micro_batch=size)
        assert torch.equal(parts.latents, whole.latents) and torch.equal(parts.noise, whole.noise)
        assert parts.report.to_json()["nodes"] == whole.report.to_json()["nodes"]
    assert not torch.equal(run(method, seed=2).latents, whole.latents)
    assert not torch.equal(run(method, number=1).latents, whole.latents)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_returned_is_made_from_the_noise_that_is_returned(method: SearchMethod) -> None:
    found = run(method)
    again, _ = evaluate(found.noise, found.level, 0.0, STEPS)
    if getattr(method, "reserve", None) == 0:
        _, again = evaluate(found.noise, found.level, found.level, 1)
    torch.testing.assert_close(again, found.latents)
    assert float(found.scores) == pytest.approx(float(closeness(found.latents[None])))
    assert found.report.rewards[0] == pytest.approx(float(found.scores))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_searching_is_better_than_not_searching(method: SearchMethod) -> None:
    found = torch.stack([run(method, seed=seed).latents for seed in range(40)])
    assert float(closeness(found).mean()) > -0.6 * float((TARGET.square() + 1).sum())


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_lost_rewards_never_win_and_ranks_may_judge(method: SearchMethod) -> None:
    def half(images: Tensor) -> Tensor:
        return torch.where(images[:, 1] > 0, torch.nan, closeness(images))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RewardWarning)  # some searches meet none of them
        assert run(method, verifier=half, seed=4).latents[1] <= 0
    with pytest.warns(RewardWarning):
        assert run(method, verifier=lambda images: images[:, 0] * math.nan).latents.isfinite().all()
    assert run(method, verifier=MeanRank((closeness, lambda images: images[:, 0]))).scores.shape == (2,)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_parents_come_before_their_children_and_the_winner_is_in_the_tree(method: SearchMethod) -> None:
    report = run(method).report
    for number, node in enumerate(report.lineage.nodes):
        assert node.parent < number
        assert node.parent == ROOT or report.lineage.nodes[node.parent].stage < node.stage
    assert report.selected[0][0] in range(len(report.lineage))
    assert len({(node.stage, node.slot) for node in report.lineage.nodes}) == len(report.lineage)


# --------------------------------------------------------------------------------------------------------------- budgets


methods = st.one_of(
    st.builds(RandomSearch, st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.sampled_from([None, 1, 4, 50])),
    st.builds(ZeroOrder, st.integers(1, 5), st.integers(1, 4), restart=st.booleans()),
    st.builds(
        SearchOverPaths,
        st.integers(1, 3),
        st.integers(1, 4),
        st.sampled_from([0.11, 0.2]),
        steps=st.sampled_from([None, 2]),
        keep=st.sampled_from(["overall", "each"]),
    ),
    st.builds(
        RolloverBudget,
        st.integers(1, 80),
        st.integers(1, 3),
        st.integers(1, 9),
        st.integers(2, 6),
        quota=st.sampled_from([None, 1, 5]),
        reserve=st.sampled_from([None, 0, 3]),
        completions=st.integers(1, 4),
    ),
)


@settings(max_examples=200)
@given(method=methods, limit=limits)
def test_no_budget_is_exceeded_and_one_below_a_sample_is_refused(method: SearchMethod, limit: dict[str, int]) -> None:
    one = {"particle_steps": STEPS, "denoiser_rows": 2 * STEPS, "decodes": 1, "verifier_rows": 2}
    arguments = {"budget": Budget(**limit), "rows_per_step": 2, "verifier": MeanRank((closeness, closeness))}  # type: ignore[arg-type]
    if any(limit.get(name, math.inf) < cost for name, cost in one.items()):
        with pytest.raises(BudgetError, match="but one sample takes"):
            run(method, **arguments)
        return
    found = run(method, **arguments)
    for name, most in limit.items():
        assert getattr(found.report.meter.spent, name) <= most
    finished, _ = evaluate(found.noise, found.level, 0.0, STEPS)
    if getattr(method, "reserve", None) != 0:
        torch.testing.assert_close(found.latents, finished)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("seconds", [1.0, 15.0, 40.0, 90.0])
def test_the_time_is_not_exceeded_once_the_pace_is_known(method: SearchMethod, seconds: float) -> None:
    world = World()
    found = run(method, evaluate=world.evaluate, verifier=world.judge, budget=Meter(Budget(seconds=seconds), world))
    # One row must be run and judged before there is a pace.
    assert world.now <= max(seconds, STEPS + 1.0)
    assert world.calls[0][0] == 1 and found.latents.isfinite().all()
    if found.report.meter.spent.particle_steps < run(method).report.meter.spent.particle_steps:
        assert found.report.warnings


# --------------------------------------------------------------------------------------------------------- random search


def test_pools_grow_and_the_best_ever_is_returned() -> None:
    world = World()
    found = run(RandomSearch(rounds=3), evaluate=world.evaluate)
    assert world.calls == [(2, 1.0, 0.0, STEPS), (4, 1.0, 0.0, STEPS), (8, 1.0, 0.0, STEPS)]
    pool = torch.stack([noise(i) for i in range(14)])
    assert torch.equal(found.noise, pool[closeness(pool).argmax()])
    assert [node.stage for node in found.report.lineage.nodes] == [0] * 2 + [1] * 4 + [2] * 8


def test_a_noise_does_not_depend_on_the_size_of_the_pool() -> None:
    world = World()
    run(RandomSearch(rounds=1, pool=6), evaluate=world.evaluate)
    many = run(RandomSearch(rounds=1, pool=6), verifier=lambda images: images[:, 0])
    few = run(RandomSearch(rounds=6, pool=1, growth=1), verifier=lambda images: images[:, 0])
    assert torch.equal(many.noise, few.noise)


def test_drafts_end_with_a_full_run_of_the_best_noise() -> None:
    world = World()
    found = run(RandomSearch(rounds=2, steps=3), evaluate=world.evaluate)
    assert world.calls == [(2, 1.0, 0.0, 3), (4, 1.0, 0.0, 3), (1, 1.0, 0.0, STEPS)]
    assert found.report.facts == {"final_particle_steps": STEPS}
    line = found.report.lineage.ancestry(found.report.selected[0][0])
    assert len(line) == 2
    # As many steps as the final run, or more, is no draft.
    assert run(RandomSearch(rounds=2, steps=50)).report.meter.spent.particle_steps == 6 * STEPS


def test_drafts_keep_the_final_run_in_reserve() -> None:
    found = run(RandomSearch(rounds=3, steps=3), budget=Budget(particle_steps=STEPS + 3 * 3 + 2))
    assert found.report.meter.spent.particle_steps == STEPS + 9
    assert found.report.warnings == ["the budget ended the search in round 1, after 1 of 4 noises"]


def test_a_threshold_ends_the_search() -> None:
    found = run(RandomSearch(rounds=8, pool=1, growth=1, threshold=-2.0))
    rounds = found.report.curve()
    assert rounds[-1][3] >= -2.0 and all(best < -2.0 for *_, best in rounds[:-1])
    assert 1 < len(rounds) < 8


# ------------------------------------------------------------------------------------------------------------ zero-order


@given(seed=st.integers(0, 1000), rho=st.floats(0, 0.999), scale=st.floats(0.1, 100))
def test_a_neighbour_has_the_norm_of_the_pivot_and_the_cosine(seed: int, rho: float, scale: float) -> None:
    pivot, direction = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).unbind()
    near = neighbour(scale * pivot, direction, rho)
    assert float(near.norm()) == pytest.approx(float(scale * pivot.norm()), rel=1e-12)
    assert float((near.flatten() @ pivot.flatten()) / near.norm() / pivot.norm()) == pytest.approx(rho, abs=1e-12)
    assert neighbour(pivot.half(), direction.half(), rho).dtype == torch.float16


def test_the_pivot_is_run_once_and_the_best_neighbour_takes_its_place() -> None:
    world = World()
    method = ZeroOrder(rounds=3, neighbours=4, restart=False)
    found = run(method, evaluate=world.evaluate)
    assert [rows for rows, *_ in world.calls] == [5, 4, 4]
    nodes = found.report.lineage.nodes
    pivots = {node.parent for node in nodes} - {ROOT}
    for pivot in pivots:  # every pivot is the best of those that were known when it was chosen
        rivals = [node.reward for node in nodes if node.stage <= nodes[pivot].stage]
        assert nodes[pivot].reward == max(rivals)
    assert found.report.rewards[0] == max(node.reward for node in nodes)


def test_a_round_without_improvement_is_rejected() -> None:
    world = World()

    def indifferent(images: Tensor) -> Tensor:
        return torch.zeros(len(images))

    found = run(ZeroOrder(rounds=3, neighbours=2), evaluate=world.evaluate, verifier=indifferent)
    assert torch.equal(found.noise, noise(0))
    assert [rows for rows, *_ in world.calls] == [3, 3, 3] and found.report.facts["restarts"] == 3
    roots = [number for number, node in enumerate(found.report.lineage.nodes) if node.parent == ROOT]
    assert roots == [0, 3, 6]
    kept = run(ZeroOrder(rounds=3, neighbours=2, restart=False), verifier=indifferent)
    assert kept.report.facts["restarts"] == 0 and kept.report.meter.spent.particle_steps == 7 * STEPS


def test_gaussian_neighbours_are_distributed_as_noises_are() -> None:
    seen: list[Tensor] = []

    def watching(latents: Tensor, start: float, stop: float, steps: int) -> tuple[Tensor, Tensor]:
        seen.append(latents)
        return evaluate(latents, start, stop, steps)

    search(ZeroOrder(1, 400, rho=0.8, keep="gaussian"), watching, (50,), lambda x: x[:, 0], steps=1)
    pivot, near = seen[0][0], seen[0][1:]
    assert float((near - 0.8 * pivot).std()) == pytest.approx(0.6, abs=0.01)


# ----------------------------------------------------------------------------------------------------- search over paths


def test_the_published_settings_take_five_rounds_down_to_level_0() -> None:
    world = World()
    method = SearchOverPaths(paths=2, branches=5, steps=4)
    run(method, evaluate=world.evaluate)
    assert method.rounds == 5
    first, *rounds = world.calls
    assert first[:3] == (2, 1.0, 0.12) and first[3] == math.ceil(STEPS * 0.88)
    assert [(rows, steps) for rows, _, _, steps in rounds] == [(10, 4)] * 5
    assert [start for _, start, _, _ in rounds] == pytest.approx([0.90, 0.87, 0.84, 0.81, 0.78])
    assert [stop for _, _, stop, _ in rounds] == pytest.approx([0.09, 0.06, 0.03, 0.0, 0.0])


@pytest.mark.parametrize(("keep", "families"), [("overall", 1), ("each", 2)])
def test_the_best_of_all_or_of_each_path_go_on(keep: str, families: int) -> None:
    # With a verifier that every round prefers what came from path 1.
    found = run(SearchOverPaths(paths=2, branches=3, keep=keep, steps=2), seed=3, verifier=lambda x: x[:, 0])
    lineage = found.report.lineage
    for stage in lineage.stages()[2:]:
        at = lineage.at(stage)
        parents = sorted({lineage.nodes[node].parent for node in at})
        before = lineage.at(stage - 1)
        ranked = sorted(before, key=lambda node: -lineage.nodes[node].reward)
        if keep == "overall":
            assert parents == sorted(ranked[:2])
        else:
            best = {max((n for n in before if lineage.ancestry(n)[0] == root), key=lambda n: lineage.nodes[n].reward) for root in (0, 1)}
            assert set(parents) == best
    assert lineage.unique_ancestors() >= families


def test_a_path_keeps_the_distribution_of_the_samples() -> None:
    # One path and one branch: nothing is chosen, so renoising and denoising must leave the samples as they are distributed.
    def plain(images: Tensor) -> Tensor:
        return torch.zeros(len(images))

    method = SearchOverPaths(paths=1, branches=1, start=0.3, forward=0.4, backward=0.5)
    samples = torch.stack([run(method, verifier=plain, seed=seed).latents for seed in range(600)])
    assert float(samples.var()) == pytest.approx(1.0, abs=0.12) and float(samples.mean()) == pytest.approx(0.0, abs=0.1)


def test_a_small_budget_has_fewer_steps_then_fewer_branches_then_fewer_paths_then_none() -> None:
    def plan(particle_steps: int) -> tuple[Any, ...]:
        report = run(SearchOverPaths(), budget=Budget(particle_steps=particle_steps)).report
        return report.facts.get("paths"), report.facts.get("branches"), report.facts.get("steps")

    assert plan(1000) == (2, 5, 8)
    assert plan(18 + 50 * 5) == (2, 5, 5)
    assert plan(18 + 40 * 4) == (2, 4, 4)
    assert plan(9 + 5 * 4) == (1, 1, 4)
    assert plan(9 + 5) == (1, 1, 1)
    found = run(SearchOverPaths(), budget=Budget(particle_steps=13))
    assert found.report.warnings == ["the budget is too small for a search over paths; this is one plain sample"]
    assert found.report.meter.spent.particle_steps == STEPS


# ------------------------------------------------------------------------------------------------ rollover budget forcing


def test_the_published_levels_stay_noisy() -> None:
    levels = rollover_levels(10)
    assert levels[8] == pytest.approx(0.86, abs=0.005) and levels[9] == pytest.approx(0.71, abs=0.005)
    assert levels[0] == 1.0 and levels[10] == 0.0 and levels == sorted(levels, reverse=True)
    assert rollover_levels(4, "even") == [1.0, 0.75, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="spacing must be vp or even, not 'exp'"):
        rollover_levels(3, "exp")


def published(scores: list[float], quota: int, max_steps: int) -> tuple[list[int], list[int]]:
    """The decisions of the published code for one chain: the step of every proposal, and the parent of every proposal (0 is the start,
    i is proposal i)."""
    start, *proposals = scores
    best, step_best, step, used, current, parent = start, (-math.inf, 0), 0, 1, quota, 0
    steps, parents = [], []
    for number, reward in enumerate(proposals, 1):
        steps.append(step)
        parents.append(parent)
        if reward > step_best[0]:
            step_best = (reward, number)
        accept = reward > best
        best = max(best, reward)
        full = used % current == 0 and not accept
        may = step < max_steps - 2
        if accept and may:
            parent, current, used, step, step_best = number, quota + (current - used), 0, step + 1, (-math.inf, 0)
        elif full and may:
            parent, current, used, step, step_best = step_best[1], quota, 0, step + 1, (-math.inf, 0)
        used += 1
    return steps, parents


@given(
    scores=st.lists(st.integers(0, 30).map(float), min_size=2, max_size=40),
    quota=st.integers(1, 5),
    max_steps=st.integers(2, 6),
)
def test_a_chain_decides_as_the_published_code_does(scores: list[float], quota: int, max_steps: int) -> None:
    given_ = iter(scores)
    method = RolloverBudget(len(scores), chains=1, initial=1, max_steps=max_steps, quota=quota, reserve=0, spacing="even")
    found = run(method, verifier=lambda images: torch.tensor([next(given_) for _ in images]))
    steps, parents = published(scores, quota, max_steps)
    nodes = found.report.lineage.nodes
    assert [node.stage - 1 for node in nodes[1:]] == steps
    assert [node.parent for node in nodes[1:]] == parents
    # Best ever, not the best of the last step.
    assert found.report.selected[0][0] == scores.index(max(scores))
    granted, used = found.report.facts["granted"][0], found.report.facts["used"][0]
    assert sum(used) == len(scores) - 1
    # What is granted to a level is its quota and what the one before left: nothing is lost, nothing comes from nowhere.
    for k in range(len(granted) - 1):
        assert granted[k + 1] == quota + granted[k] - used[k] and used[k] <= granted[k]


def test_published_numbers_give_a_quota_of_22_and_500_calls() -> None:
    world = World()
    found = run(RolloverBudget(reserve=0), evaluate=world.evaluate, verifier=lambda images: torch.zeros(len(images)))
    assert found.report.facts["quota"] == 22 and found.report.meter.spent.particle_steps == 500
    assert world.calls[0] == (50, 1.0, 1.0, 1)
    # Without rewards that differ no proposal is accepted: the quota is used up level by level, by both chains.
    assert found.report.facts["used"] == [[22] * 8 + [49]] * 2


def test_the_winner_is_denoised_to_the_end_from_its_level() -> None:
    world = World()
    found = run(RolloverBudget(evaluations=40, initial=3), evaluate=world.evaluate)
    rows, start, stop, steps = world.calls[-1]
    assert (rows, stop) == (1, 0.0) and start == found.level and steps == math.ceil(STEPS * start)
    nodes = found.report.lineage.nodes
    parent = nodes[nodes[found.report.selected[0][0]].parent]
    assert parent.reward == max(node.reward for node in nodes[:-1])
    world = World()
    run(RolloverBudget(evaluations=40, initial=3, reserve=6), evaluate=world.evaluate)
    assert world.calls[-1][3] == 6


def test_of_several_that_are_finished_the_best_sample_wins() -> None:
    """The verifier likes estimates that finish badly: it wants another place of finished samples."""
    world = World()

    def judge(images: Tensor) -> Tensor:
        finished = world.calls[-1][2] == 0.0
        return -closeness(images) if finished else closeness(images)

    one = run(RolloverBudget(evaluations=40, initial=3), evaluate=world.evaluate, verifier=judge)
    world.calls.clear()
    several = run(RolloverBudget(evaluations=40, initial=3, completions=3), evaluate=world.evaluate, verifier=judge)
    ends = [call for call in world.calls if call[2] == 0.0]
    assert len(ends) == 3 and sum(rows for rows, *_ in ends) == 3
    nodes = several.report.lineage.nodes
    finished = sorted(node.reward for node in nodes[-3:])
    assert several.report.rewards[0] == finished[-1] > one.report.rewards[0]
    # The parents are the three best estimates.
    estimates = sorted((node.reward for node in nodes[:-3]), reverse=True)
    assert [nodes[node.parent].reward for node in nodes[-3:]] == estimates[:3]
    # Where the budget is small, at most half of it goes into finishing.
    small = run(RolloverBudget(completions=5), evaluate=World().evaluate, budget=Budget(particle_steps=4 * STEPS))
    assert small.report.facts["completions"] == 2 and small.report.meter.spent.particle_steps <= 4 * STEPS


def test_levels_are_shares_of_the_paths_top() -> None:
    world = World()
    path = NoisePath("variance-preserving", top=0.9)
    run(RolloverBudget(evaluations=20, chains=1, initial=2, max_steps=4, spacing="even"), evaluate=world.evaluate, path=path)
    starts = sorted({start for _, start, _, _ in world.calls})
    assert world.calls[0][1] == 0.9 and starts == pytest.approx([0.9 * k / 4 for k in range(5 - len(starts), 5)])


# -------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomSearch(rounds=0), "rounds must be a whole number of at least 1, not 0"),
        (lambda: RandomSearch(steps=0), "steps must be a whole number of at least 1, or None for full runs, not 0"),
        (lambda: ZeroOrder(neighbours=0), "neighbours must be a whole number of at least 1, not 0"),
        (lambda: ZeroOrder(rho=1.0), "rho must be at least 0 and below 1, not 1.0"),
        (lambda: ZeroOrder(keep="length"), "keep must be norm or gaussian, not 'length'"),
        (lambda: SearchOverPaths(forward=0.9, backward=0.8), "forward above 0 and below backward"),
        (lambda: SearchOverPaths(start=0.3), "start + forward at most 1"),
        (lambda: SearchOverPaths(keep="best"), "keep must be overall or each, not 'best'"),
        (lambda: SearchOverPaths(steps=0), "steps must be a whole number of at least 1, or None, not 0"),
        (lambda: RolloverBudget(max_steps=1), "max_steps must be a whole number of at least 2, not 1"),
        (lambda: RolloverBudget(reserve=-1), "reserve must be a whole number of at least 0, not -1"),
        (lambda: RolloverBudget(spacing="linear"), "spacing must be vp or even, not 'linear'"),
        (lambda: run(RandomSearch(), steps=0), "steps must be a whole number of at least 1, not 0"),
        (lambda: run(RandomSearch(), micro_batch=-1), "micro_batch must be a whole number of at least 1, or None for all rows, not -1"),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
