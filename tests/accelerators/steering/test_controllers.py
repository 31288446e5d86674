"""The controllers on a plain loop: budgets, pruning, lineage, and the same result in batches of any size."""

from __future__ import annotations

import math
import re
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.steering.best_of_n import BestOfN, BestOfNPopulation
from hasten.accelerators.steering.budget import Budget, BudgetError, Meter
from hasten.accelerators.steering.controller import Run, SteeringError, SteeringMethod, StepInfo
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.kernels import ddim_eta
from hasten.accelerators.steering.loop import Steered, steer
from hasten.accelerators.steering.mixes import MeanRank
from hasten.accelerators.steering.report import ROOT
from hasten.accelerators.steering.successive_halving import SuccessiveHalving
from hasten.accelerators.steering.svdd import SVDD, CoDe
from hasten.accelerators.steering.verifiers import RewardWarning
from hasten.benchmarks.mixture import flow_path
from tests.accelerators.steering.budgets import limits

METHODS: list[SteeringMethod] = [
    BestOfN(5, select="all"),
    SuccessiveHalving(),
    SuccessiveHalving(6, ((0.3, 3), (0.7, 2)), threshold=0.1),
    FKSteering(particles=6, lambda_=3.0, ess=None, select="all"),
    FKSteering(particles=5, potential="max"),
    SVDD(children=4),
    SVDD(children=3, temperature=0.5),
    CoDe(branches=4, block=3),
    CoDe(branches=4, block=100),
]
STEPS = 10


def halve(latents: Tensor, step: int, owners: Tensor) -> Tensor:
    """A denoiser that does not care about batches: the estimate shrinks, and shifts with the prompt."""
    return latents * 0.5 + 0.25 * owners.view(-1, 1)


def first(images: Tensor) -> Tensor:
    return images[:, 0]


def run(method: SteeringMethod, **more: Any) -> Steered:
    arguments: dict[str, Any] = {"prompts": ["a", "b"], "seed": 1, **more}
    return steer(method, arguments.pop("denoise", halve), flow_path(STEPS), (3,), arguments.pop("verifier", first), **arguments)


def plain_cost(report_: Any) -> tuple[int, int, int, int]:
    spent = report_.meter.spent
    return spent.particle_steps, spent.denoiser_rows, spent.decodes, spent.verifier_rows


# --------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_same_seed_gives_the_same_samples_in_batches_of_any_size(method: SteeringMethod) -> None:
    whole = run(method)
    for size in (1, 3, 7):
        parts = run(method, micro_batch=size)
        assert parts.selection.rows == whole.selection.rows
        assert all(torch.equal(a, b) for a, b in zip(parts.latents, whole.latents, strict=True))
        assert parts.report.lineage.nodes == whole.report.lineage.nodes
    assert not torch.equal(run(method, seed=2).latents[0], whole.latents[0])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_prompt_does_not_depend_on_its_neighbours(method: SteeringMethod) -> None:
    alone, together = run(method, prompts=["a"]), run(method, prompts=["a", "b", "c"])
    assert torch.equal(alone.latents[0], together.latents[0])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_is_returned_is_the_best_of_what_was_finished(method: SteeringMethod) -> None:
    out = run(method)
    for p, samples in enumerate(out.latents):
        rewards = out.selection.rewards[p]
        assert first(samples).tolist() == sorted(first(samples).tolist(), reverse=True)
        assert float(first(samples)[0]) == pytest.approx(float(rewards.max()))
        assert out.report.rewards[p] == pytest.approx(float(rewards.max()))
    torch.testing.assert_close(out.selection.weights.sum(1), torch.ones(2).double())


def test_best_of_n_is_the_best_of_the_first_n_samples() -> None:
    eight = run(BestOfN(8, select="all"))
    for n in (1, 3, 8):
        best = run(BestOfN(n))
        rows = [(row, sample) for row, sample in zip(eight.selection.rows[0], eight.latents[0], strict=True) if row < n]
        assert torch.equal(best.latents[0][0], max(rows, key=lambda pair: float(pair[1][0]))[1])
    assert plain_cost(eight.report) == (2 * 8 * STEPS, 2 * 8 * STEPS, 16, 16)


class Watching(BestOfN):
    """Asks for rewards and does nothing about them."""

    def begin(self, run: Run) -> BestOfNPopulation:
        class Watched(BestOfNPopulation):
            def scheduled(self, step: int) -> bool:
                return step in (3, 6)

        return Watched(self, run)


def test_rewards_that_a_method_only_asks_for_are_written_down_and_change_nothing() -> None:
    watched, plain = run(Watching(4, select="all")), run(BestOfN(4, select="all"))
    assert watched.selection.rows == plain.selection.rows
    assert all(torch.equal(a, b) for a, b in zip(watched.latents, plain.latents, strict=True))
    nodes = watched.report.lineage.nodes
    assert Counter(node.stage for node in nodes) == {3: 8, 6: 8, STEPS: 8}
    assert all(len(watched.report.lineage.ancestry(node)) == 3 for node in watched.report.lineage.at(STEPS))
    assert watched.report.meter.spent.particle_steps == plain.report.meter.spent.particle_steps


def test_successive_halving_costs_the_steps_of_4_4_samples_in_place_of_8() -> None:
    counts: Counter[int] = Counter()

    def counting(latents: Tensor, step: int, owners: Tensor) -> Tensor:
        counts[step] += len(latents)
        return halve(latents, step, owners)

    out = steer(SuccessiveHalving(), counting, flow_path(20), (3,), first, rows_per_step=2)
    assert [counts[step] for step in range(20)] == [8] * 7 + [4] * 5 + [2] * 4 + [1] * 4
    assert plain_cost(out.report) == (88, 176, 8 + 4 + 2 + 1, 15)
    assert round(4.4 * 20) == 88


def test_who_survives_successive_halving_is_what_it_would_have_been_without() -> None:
    out, every = run(SuccessiveHalving()), run(BestOfN(8, select="all"))
    for p in range(2):
        whole = dict(zip(every.selection.rows[p], every.latents[p], strict=True))
        assert torch.equal(out.latents[p][0], whole[out.selection.rows[p][0]])


def test_successive_halving_keeps_the_best_and_never_copies() -> None:
    controller = SuccessiveHalving(4, ((0.3, 2), (0.6, 1))).begin(Run(prompts=1, steps=10, stochastic=False))
    nothing = torch.zeros(0)
    for step in range(10):
        scored = torch.tensor([1.0, 3.0, math.nan, 2.0] if step == 2 else [9.0, 5.0, 9.0, 5.0])
        action = controller.on_step(StepInfo(step, nothing, nothing, scored if controller.scores_at(step) else None))
        assert action.index is None
        wanted = {2: [False, True, False, True], 5: [False, True, False, False]}.get(step)
        assert (action.alive is None) if wanted is None else (action.alive is not None and action.alive.tolist() == wanted)
    assert controller.finish(torch.tensor([9.0, 0.0, 9.0, 9.0])).rows == [[1]]


def test_a_threshold_drops_more_but_never_the_best() -> None:
    method = SuccessiveHalving(4, ((0.3, 3), (0.6, 2)), threshold=5.0)
    controller = method.begin(Run(prompts=2, steps=10))
    nothing = torch.zeros(0)
    for step in range(3):
        rewards = torch.tensor([9.0, 6.0, 1.0, 0.0, 1.0, 2.0, 3.0, 4.0]) if controller.scores_at(step) else None
        action = controller.on_step(StepInfo(step, nothing, nothing, rewards))
    assert action.alive is not None and action.alive.tolist() == [True, True, False, False, False, False, False, True]


@pytest.mark.parametrize("method", [SVDD(children=4), CoDe(branches=4, block=1)], ids=str)
def test_svdd_takes_the_best_child_at_every_step_for_m_calls_a_step(method: SteeringMethod) -> None:
    seen: list[Tensor] = []

    def watching(latents: Tensor, step: int, owners: Tensor) -> Tensor:
        seen.append(latents.clone())
        return halve(latents, step, owners)

    out = run(method, denoise=watching, prompts=["a"])
    assert [len(rows) for rows in seen] == [4] * STEPS
    assert plain_cost(out.report) == (4 * STEPS, 4 * STEPS, 4 * (STEPS - 1) + 1, 4 * (STEPS - 1) + 1)
    path = flow_path(STEPS)
    for step in range(1, STEPS - 1):
        parent = seen[step][first(halve(seen[step], step, torch.zeros(4))).argmax()][None]
        move = ddim_eta(parent, halve(parent, step, torch.zeros(1)), path[step], path[step + 1])
        # All children are draws around the one parent.
        assert ((seen[step + 1] - move.mean).abs() < 6 * move.std).all() and len(seen[step + 1].unique(dim=0)) == 4
    last = halve(seen[-1], STEPS - 1, torch.zeros(4))
    assert torch.equal(out.latents[0][0], last[first(last).argmax()])


def test_code_with_one_block_is_best_of_n() -> None:
    block, best = run(CoDe(branches=5, block=STEPS)), run(BestOfN(5))
    assert all(torch.equal(a, b) for a, b in zip(block.latents, best.latents, strict=True))
    assert plain_cost(block.report) == plain_cost(best.report)


def test_code_scores_once_in_a_block() -> None:
    out = run(CoDe(branches=4, block=3), prompts=["a"])
    # After 3 and 6 steps all four, and after 9, which is the last step, whose choice alone is finished.
    assert plain_cost(out.report) == (4 * STEPS, 4 * STEPS, 13, 13)
    assert plain_cost(run(CoDe(branches=4, block=4), prompts=["a"]).report) == (4 * STEPS, 4 * STEPS, 12, 12)


def test_a_soft_choice_follows_the_rewards() -> None:
    chosen: Counter[int] = Counter()
    nothing = torch.zeros(0)
    for seed in range(300):
        controller = SVDD(children=2, temperature=2.0).begin(Run(prompts=1, steps=5, seed=seed))
        controller.on_step(StepInfo(0, nothing, nothing, None))
        index = controller.on_step(StepInfo(1, nothing, nothing, torch.tensor([0.0, 2 * math.log(3.0)]))).index
        assert index is not None and index[0] == index[1]
        chosen[int(index[0])] += 1
    assert chosen[1] / 300 == pytest.approx(0.75, abs=0.1)
    controller = SVDD(children=3, temperature=1.0).begin(Run(prompts=1, steps=5))
    assert controller.on_step(StepInfo(1, nothing, nothing, torch.tensor([math.nan] * 3))).index is not None


@pytest.mark.parametrize("method", [SVDD(), CoDe()], ids=str)
def test_a_sampler_that_draws_no_noise_is_refused(method: SteeringMethod) -> None:
    with pytest.raises(SteeringError, match="draws no noise would keep the copies the same; use a stochastic step"):
        method.begin(Run(prompts=1, steps=10, stochastic=False))
    CoDe(branches=4, block=10).begin(Run(prompts=1, steps=10, stochastic=False))  # is best-of-N


def test_lost_rewards_never_win() -> None:
    def lost(images: Tensor) -> Tensor:
        return torch.where(images[:, 0] > images[:, 0].median(), torch.nan, images[:, 0])

    for method in METHODS:
        with pytest.warns(RewardWarning):
            out = run(method, verifier=lost, prompts=["a"])
        assert math.isfinite(out.report.rewards[0]), method
        with pytest.warns(RewardWarning):
            out = run(method, verifier=lambda images: torch.full((len(images),), math.nan), prompts=["a"])
        assert out.latents[0].shape[1:] == (3,)


def test_a_mean_rank_may_steer() -> None:
    for method in METHODS:
        out = run(method, verifier=MeanRank((first, lambda images: images[:, 1])))  # type: ignore[arg-type]
        assert all(len(samples) for samples in out.latents)


# --------------------------------------------------------------------------------------------------------------- lineage


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_lineage_is_that_of_the_samples(method: SteeringMethod) -> None:
    """Every row carries in its third entry, which the world leaves alone, the row that it began as."""

    def carrying(latents: Tensor, step: int, owners: Tensor) -> Tensor:
        x0 = halve(latents, step, owners)
        x0[:, 2] = latents[:, 2]
        return x0

    def still(latents: Tensor, x0: Tensor, now: Any, then: Any) -> Any:
        move = ddim_eta(latents[:, :2], x0[:, :2], now, then)
        return type(move)(torch.cat([move.mean, latents[:, 2:]], 1), move.std)

    class Marked:
        def __call__(self, latents: Tensor, x0: Tensor, now: Any, then: Any) -> Any:
            move = still(latents, x0, now, then)
            noise_free = torch.tensor([1.0, 1.0, 0.0])

            class Masked(type(move)):  # type: ignore[misc]
                def sample(self, noise: Tensor | None = None) -> Tensor:
                    return super().sample(None if noise is None else noise * noise_free)

            return Masked(*move)

    began: dict[float, int] = {}

    def remembering(latents: Tensor, step: int, owners: Tensor) -> Tensor:
        if step == 0:
            began.update({float(mark): row for row, mark in enumerate(latents[:, 2])})
        return carrying(latents, step, owners)

    out = run(method, denoise=remembering, kernel=Marked(), prompts=["a"])
    nodes = out.report.lineage.nodes
    for sample, selected in zip(out.latents[0], out.report.selected[0], strict=True):
        line = out.report.lineage.ancestry(selected)
        root = nodes[line[0]]
        assert root.parent == ROOT and root.slot == began[float(sample[2])]
        assert nodes[line[-1]].stage == STEPS and nodes[line[-1]].reward == pytest.approx(float(sample[0]))
        stages = [nodes[node].stage for node in line]
        assert stages == sorted(set(stages))
    roots = {out.report.lineage.ancestry(node)[0] for node in out.report.lineage.at(STEPS)}
    assert out.report.lineage.unique_ancestors() == len(roots)


# --------------------------------------------------------------------------------------------------------------- budgets


methods = st.one_of(
    st.builds(BestOfN, st.integers(1, 9)),
    st.builds(SuccessiveHalving, st.integers(1, 9), st.sampled_from([((0.5, 1),), ((0.3, 4), (0.6, 2)), ((0.35, 4), (0.6, 2), (0.8, 1))])),
    st.builds(FKSteering, particles=st.integers(1, 9), ess=st.sampled_from([None, 0.5]), select=st.sampled_from(["best", "all"])),
    st.builds(SVDD, st.integers(1, 6)),
    st.builds(CoDe, st.integers(1, 6), st.integers(1, 12)),
)


@settings(max_examples=150)
@given(method=methods, limit=limits, prompts=st.integers(1, 3), judges=st.integers(1, 2))
def test_no_budget_is_exceeded_and_one_below_a_sample_is_refused(
    method: SteeringMethod, limit: dict[str, int], prompts: int, judges: int
) -> None:
    one = {"particle_steps": STEPS, "denoiser_rows": 2 * STEPS, "decodes": 1, "verifier_rows": judges}
    enough = all(limit.get(name, math.inf) >= prompts * cost for name, cost in one.items())
    verifier = first if judges == 1 else MeanRank((first,) * judges)  # type: ignore[arg-type]
    arguments = {"prompts": ["a"] * prompts, "budget": Budget(**limit), "rows_per_step": 2, "verifier": verifier}
    if not enough:
        with pytest.raises(BudgetError, match="but one sample takes"):
            run(method, **arguments)
        return
    out = run(method, **arguments)
    for name, most in limit.items():
        assert getattr(out.report.meter.spent, name) <= most
    assert len(out.latents) == prompts and all(len(samples) >= 1 for samples in out.latents)
    # Nothing is left that another particle would have fitted into.
    free = run(method, prompts=["a"] * prompts, rows_per_step=2, verifier=verifier)
    wanted = {name: getattr(free.report.meter.spent, name) for name in one}
    if all(limit.get(name, math.inf) >= amount for name, amount in wanted.items()):
        assert out.report.meter.spent == free.report.meter.spent


def test_fewer_particles_than_asked_for_are_told() -> None:
    out = run(FKSteering(particles=8), budget=Budget(particle_steps=2 * 3 * STEPS))
    assert out.report.facts["particles"] == 3
    assert out.report.warnings == ["the budget affords 3 of 8 particles"]


class Slow:
    """A world in which a row takes a second in the denoiser, a quarter of one to decode and to judge."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def denoise(self, latents: Tensor, step: int, owners: Tensor) -> Tensor:
        self.now += len(latents)
        return halve(latents, step, owners)

    def judge(self, images: Tensor) -> Tensor:
        self.now += 0.25 * len(images)
        return first(images)


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("seconds", [17.0, 20.0, 33.3, 70.0])
def test_the_time_is_not_exceeded_once_the_pace_is_known(method: SteeringMethod, seconds: float) -> None:
    clock = Slow()
    meter = Meter(Budget(seconds=seconds), clock)
    out = run(method, denoise=clock.denoise, verifier=clock.judge, budget=meter, prompts=["a"])
    # The first step of all particles must be known before there is a pace, and one judgement of them before there is one for that.
    particles = out.report.facts["particles"]
    assert meter.elapsed <= max(seconds, particles * 1.25 + STEPS - 1 + 0.5)
    if meter.elapsed > seconds - 2 and seconds < 1.25 * particles * STEPS:
        assert out.report.warnings


def test_where_not_even_one_sample_can_be_finished_the_estimate_is_returned() -> None:
    clock = Slow()
    out = run(BestOfN(3), denoise=clock.denoise, verifier=clock.judge, budget=Meter(Budget(seconds=5.0), clock), prompts=["a"])
    assert out.report.warnings == [f"the budget ran out: stopped at step 0 of {STEPS}, the samples are its estimates"]
    assert clock.now == 3.25 and out.latents[0].shape == (1, 3)


# -------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BestOfN(0), "candidates must be a whole number of at least 1, not 0"),
        (lambda: BestOfN(select="sample"), "select must be best or all, not 'sample'"),
        (lambda: SuccessiveHalving(rungs=()), "rungs must lie at ascending fractions between 0 and 1"),
        (lambda: SuccessiveHalving(rungs=((0.6, 2), (0.5, 1))), "rungs must lie at ascending fractions between 0 and 1"),
        (lambda: SuccessiveHalving(rungs=((0.5, 2), (0.6, 2))), "rungs must keep fewer and fewer candidates"),
        (lambda: SVDD(children=0), "children must be a whole number of at least 1, not 0"),
        (lambda: CoDe(block=0), "block must be a whole number of at least 1, not 0"),
        (lambda: CoDe(temperature=0.0), "temperature must be above 0 and finite, or None for the best, not 0.0"),
        (lambda: SuccessiveHalving().begin(Run(prompts=1, steps=2)), "2 steps are too few for rungs at [0.35, 0.6, 0.8]"),
        (lambda: Run(prompts=0, steps=3), "prompts must be a whole number of at least 1, not 0"),
        (lambda: run(BestOfN(2), micro_batch=0), "micro_batch must be a whole number of at least 1, or None for all rows, not 0"),
        (
            lambda: BestOfN(2).begin(Run(prompts=1, steps=3)).finish(torch.zeros(3)),
            "rewards must have shape [2], one for each row, not [3]",
        ),
    ],
)
def test_arguments_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
