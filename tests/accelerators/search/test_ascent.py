"""Gradient noise optimisation against torch's own optimiser, and what is said of functions without a gradient."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.search.ascent import AscentMethod, clipped, norm_gradient, optimise
from hasten.accelerators.search.carinox import CARINOX
from hasten.accelerators.search.ditto2 import optimise_then_decode, rank_agreement
from hasten.accelerators.search.reno import ReNO
from hasten.accelerators.search.task import Found
from hasten.accelerators.steering.budget import Budget, BudgetError, Meter
from hasten.accelerators.steering.mixes import CARINOX_CATEGORIES, CategoryMix, MeanRank, WeightedSum
from hasten.accelerators.steering.noise import stream
from hasten.accelerators.steering.verifiers import Brightness, JPEGSize, RewardWarning, VerifierError

SHAPE = (3, 4, 4)
TARGET = torch.rand(SHAPE, generator=torch.Generator().manual_seed(7))


def generate(noises: Tensor) -> Tensor:
    """A smooth one-step model whose images lie in 0 to 1."""
    return torch.sigmoid(noises + 0.3 * noises.roll(1, -1))


def closeness(images: Tensor) -> Tensor:
    return -(images - TARGET).square().flatten(1).sum(1)


def redness(images: Tensor) -> Tensor:
    return images[:, 0].mean((1, 2))


def run(method: AscentMethod, **more: Any) -> Found:
    arguments: dict[str, Any] = {"seed": 1, **more}
    return optimise(method, arguments.pop("generate", generate), SHAPE, arguments.pop("verifier", closeness), **arguments)


def by_torch(noise: Tensor, method: ReNO) -> tuple[list[float], Tensor]:
    """Rewards of all iterates and the best one, by torch.optim.SGD as the published code does it."""
    noise = noise.clone()[None].requires_grad_(True)
    optimiser = torch.optim.SGD([noise], lr=method.learning_rate, momentum=method.momentum, nesterov=True)
    rewards, best, kept = [], -math.inf, noise.detach()
    for _ in range(method.iterations):
        optimiser.zero_grad()
        reward = closeness(generate(noise)).sum()
        rewards.append(reward.item())
        if reward.item() > best:
            best, kept = reward.item(), noise.detach().clone()
        norm = noise.norm()
        (-reward + method.regularisation * (0.5 * norm**2 - (noise.numel() - 1) * norm.log())).backward()
        torch.nn.utils.clip_grad_norm_([noise], method.clip)
        optimiser.step()
    return rewards, kept[0]


def test_an_ascent_is_nesterovs_with_clipping_and_the_norms_regulariser() -> None:
    method = ReNO(iterations=20, learning_rate=3.0)
    found = run(method)
    rewards, best = by_torch(torch.randn(SHAPE, generator=stream(1, 0, 0)), method)
    torch.testing.assert_close(
        torch.tensor([node.reward for node in found.report.lineage.nodes]), torch.tensor(rewards), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(found.noise, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.latents, generate(found.noise[None])[0])
    assert max(rewards) == pytest.approx(found.report.rewards[0], abs=1e-5) and max(rewards) > rewards[0]


def test_candidates_climb_as_if_they_were_alone_in_batches_of_any_size() -> None:
    together = run(ReNO(iterations=6, candidates=3))
    nodes = together.report.lineage.nodes
    for row in range(3):
        rewards, _ = by_torch(torch.randn(SHAPE, generator=stream(1, 0, row)), ReNO(iterations=6))
        mine = torch.tensor([node.reward for node in nodes if node.slot == row])
        torch.testing.assert_close(mine, torch.tensor(rewards), rtol=1e-4, atol=1e-5)
    for size in (1, 2):
        # The world's functions round differently by the size of the batch.
        torch.testing.assert_close(run(ReNO(iterations=6, candidates=3), micro_batch=size).noise, together.noise, rtol=1e-5, atol=1e-6)
    line = together.report.lineage.ancestry(together.report.selected[0][0])
    assert [nodes[node].stage for node in line] == list(range(len(line))) and len({nodes[node].slot for node in line}) == 1


def test_the_regulariser_is_at_rest_on_the_sphere_of_gaussian_noise() -> None:
    noise = torch.randn(2, *SHAPE, dtype=torch.float64)
    dimension = noise[0].numel()
    on_sphere = noise / noise.flatten(1).norm(dim=1).view(2, 1, 1, 1) * math.sqrt(dimension - 1)
    assert float(norm_gradient(on_sphere).abs().max()) < 1e-12
    leaf = noise.clone().requires_grad_(True)
    norms = leaf.flatten(1).norm(dim=1)
    (exact,) = torch.autograd.grad((0.5 * norms**2 - (dimension - 1) * norms.log()).sum(), leaf)
    torch.testing.assert_close(norm_gradient(noise), exact)


def test_gradients_are_clipped_row_by_row() -> None:
    rows = torch.tensor([[3.0, 4.0], [0.03, 0.04], [0.0, 0.0]])
    torch.testing.assert_close(clipped(rows, 0.1), torch.tensor([[0.06, 0.08], [0.03, 0.04], [0.0, 0.0]]))


def test_a_reward_of_another_scale_does_not_drown_the_others_when_each_is_clipped() -> None:
    mix = WeightedSum((closeness, redness), (1.0, 1e6))  # type: ignore[arg-type]
    method = ReNO(iterations=2, regularisation=0.0, momentum=0.0, learning_rate=1.0)
    noise = torch.randn(SHAPE, generator=stream(1, 0, 0))

    def moved(clip_each: float | None) -> Tensor:
        seen: list[Tensor] = []

        def watching(noises: Tensor) -> Tensor:
            seen.append(noises.detach().clone())
            return generate(noises)

        run(ReNO(**{**method.__dict__, "clip_each": clip_each}), generate=watching, verifier=mix)
        assert torch.equal(seen[0][0], noise)
        return seen[1][0] - noise

    def unit(reward: Any) -> Tensor:
        leaf = noise[None].clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(reward(generate(leaf)).sum(), leaf)
        return gradient[0] / gradient.norm()

    wanted = 0.1 * unit(closeness) + 0.1 * unit(redness)
    torch.testing.assert_close(moved(0.1), wanted * min(1.0, 0.1 / float(wanted.norm())))
    torch.testing.assert_close(moved(None), 0.1 * unit(redness), rtol=1e-3, atol=1e-5)


def test_carinox_climbs_from_its_seeds_whatever_the_seed_of_the_call() -> None:
    method = CARINOX(iterations=3)
    a, b = run(method, seed=1), run(method, seed=2)
    assert torch.equal(a.noise, b.noise)
    starts = torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in (0, 94, 58, 45, 15)])
    first = [node.reward for node in a.report.lineage.nodes if node.stage == 0]
    torch.testing.assert_close(torch.tensor(first), closeness(generate(starts)))
    assert a.report.rewards[0] == max(node.reward for node in a.report.lineage.nodes)


def test_carinox_mixes_by_category_or_by_the_fixed_weights() -> None:
    named: dict[str, Any] = {"hps": closeness, "vqa": redness}
    fixed = CARINOX().mix(named)
    assert isinstance(fixed, WeightedSum) and fixed.weights == (5.0, 1.0)
    assert ReNO().mix({"clip": redness, "hps": closeness, "own": redness}).weights == (0.01, 5.0, 1.0)
    by_category = CARINOX(category=lambda prompt: "color").mix(named)
    assert isinstance(by_category, CategoryMix)
    assert by_category.weights_of("x") == pytest.approx([5 * CARINOX_CATEGORIES["color"]["hps"], CARINOX_CATEGORIES["color"]["vqa"]])
    assert run(CARINOX(iterations=2), verifier=by_category, prompt="a red cube").scores.shape == (2,)


def test_functions_without_a_gradient_are_told() -> None:
    def no_grad(noises: Tensor) -> Tensor:
        with torch.no_grad():
            return generate(noises)

    with pytest.raises(VerifierError, match=r"generate returned images without a gradient path to the noise; .* runs under torch\.no_grad"):
        run(ReNO(), generate=no_grad)
    with pytest.raises(VerifierError, match="detached detaches its scores from the images; gradients must pass through it"):

        def detached(images: Tensor) -> Tensor:
            return closeness(images).detach()

        run(ReNO(), verifier=detached)
    with pytest.raises(VerifierError, match="JPEGSize has no gradient; use differentiable verifiers"):
        run(ReNO(), verifier=JPEGSize())
    with pytest.raises(VerifierError, match="MeanRank has no gradient; use differentiable verifiers, and a weighted sum in place of ranks"):
        run(ReNO(), verifier=MeanRank((closeness,)))  # type: ignore[arg-type]
    with torch.no_grad():  # a caller's no_grad does not reach inside
        run(ReNO(iterations=2))


def test_a_row_whose_gradient_is_not_finite_stays_where_it_is() -> None:
    def sometimes(images: Tensor) -> Tensor:
        scores = closeness(images)
        return torch.cat([scores[:1], scores[1:] * math.nan])

    with pytest.warns(RewardWarning):
        found = run(ReNO(iterations=4, candidates=2), verifier=sometimes)
    assert "4 gradients were not finite and were left out; half precision overflows easily" in found.report.warnings
    assert math.isfinite(found.report.rewards[0])


@settings(max_examples=40)
@given(
    candidates=st.integers(1, 4),
    limit=st.fixed_dictionaries(
        {}, optional={"particle_steps": st.integers(1, 60), "decodes": st.integers(1, 20), "verifier_rows": st.integers(1, 20)}
    ),
    carinox=st.booleans(),
)
def test_no_budget_is_exceeded_and_one_below_a_sample_is_refused(candidates: int, limit: dict[str, int], carinox: bool) -> None:
    method: AscentMethod = CARINOX(tuple(range(candidates)), iterations=5) if carinox else ReNO(5, candidates=candidates)
    if limit.get("particle_steps", 99) < 3:
        with pytest.raises(BudgetError, match="but one sample takes 3"):
            run(method, steps=3, budget=Budget(**limit))
        return
    found = run(method, steps=3, budget=Budget(**limit))
    for name, most in limit.items():
        assert getattr(found.report.meter.spent, name) <= most
    affordable = min([limit.get("particle_steps", 999) // 3, limit.get("decodes", 999), limit.get("verifier_rows", 999)])
    assert len(found.report.lineage) == min(5 * candidates, affordable)


def test_the_time_is_not_exceeded_once_the_pace_is_known() -> None:
    now = 0.0

    def slow(noises: Tensor) -> Tensor:
        nonlocal now
        now += len(noises)
        return generate(noises)

    found = run(ReNO(iterations=50, candidates=3), generate=slow, budget=Meter(Budget(seconds=20.0), lambda: now))
    assert 19.0 <= now <= 20.0 and found.report.warnings == ["the budget ended the ascent in iteration 6 of 50"]


# ---------------------------------------------------------------------------------------------------------------- DITTO-2


def test_the_best_noise_is_decoded_by_the_final_model_and_paid_from_the_same_budget() -> None:
    made: list[Tensor] = []

    def final(noises: Tensor) -> Tensor:
        made.append(noises)
        return generate(noises) ** 2

    out = optimise_then_decode(
        ReNO(10), generate, final, SHAPE, closeness, final_steps=8, budget=Budget(particle_steps=15, decodes=30), seed=1
    )
    assert len(made) == 1 and torch.equal(made[0][0], out.found.noise)
    assert out.reward == pytest.approx(float(closeness(out.image[None])))
    assert out.found.report.meter.spent.particle_steps == 15 and len(out.found.report.lineage) == 7
    with pytest.raises(BudgetError, match="the budget has 8 particle_steps left, but one sample takes 9"):
        optimise_then_decode(ReNO(10), generate, final, SHAPE, closeness, final_steps=8, budget=Budget(particle_steps=8))


def test_rank_agreement_is_one_for_the_same_map_and_minus_one_for_the_opposite() -> None:
    noises = torch.randn(16, *SHAPE, generator=torch.Generator().manual_seed(0))
    assert rank_agreement(generate, lambda z: generate(z) ** 3, noises, Brightness()) > 0.9
    assert rank_agreement(generate, lambda z: 1 - generate(z), noises, Brightness()) == pytest.approx(-1.0)


# --------------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ReNO(iterations=0), "iterations must be a whole number of at least 1, not 0"),
        (lambda: ReNO(learning_rate=0.0), r"learning_rate must be above 0 and finite, not 0\.0"),
        (lambda: ReNO(clip_each=-1.0), r"clip_each must be above 0 and finite, not -1\.0"),
        (lambda: ReNO(momentum=1.0), r"momentum must be at least 0 and below 1, not 1\.0"),
        (lambda: ReNO(regularisation=-0.1), r"regularisation must be at least 0 and finite, not -0\.1"),
        (lambda: ReNO(candidates=0), "candidates must be a whole number of at least 1, not 0"),
        (lambda: CARINOX(seeds=(1, 1)), r"seeds must be different whole numbers of at least 0, not \(1, 1\)"),
        (lambda: CARINOX(seeds=()), "seeds must be different whole numbers"),
        (lambda: CARINOX(clip=math.nan), "clip must be above 0 and finite, not nan"),
    ],
)
def test_settings_are_checked(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
