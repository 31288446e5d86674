"""Noise search through unmodified pipelines: whole runs are the pipeline's own, stretches between levels meet."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators.steering.controller import SteeringError
from hasten.accelerators.steering.verifiers import VerifierError
from hasten.pipelines.accelerated import denoisers_of
from hasten.pipelines.searching import Evaluator, SearchedPipeline, search
from tests.families import PIPELINES, UNETS, run

FAMILIES = {**UNETS, **{name: PIPELINES[name] for name in ("pixart", "sd3", "flux", "wan")}}
SCHEDULERS: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "dpm++2m": lambda: diffusers.DPMSolverMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "flow": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}
CASES = [("sd", "euler"), ("sdxl", "dpm++2m"), ("pixart", "ddim"), ("pixart", "euler"), ("sd3", "flow"), ("flux", "flow"), ("wan", "flow")]
METHODS = [
    hasten.RandomSearch(rounds=2),
    hasten.ZeroOrder(rounds=2, neighbours=3),
    hasten.SearchOverPaths(paths=2, branches=2),
    hasten.RolloverBudget(evaluations=30, initial=4, max_steps=4),
]


def mean(images: Tensor) -> Tensor:
    return images.flatten(1).double().mean(1)


def latent(latents: Tensor) -> Tensor:
    """The tiny pipelines have no decoder."""
    return latents


def made(family: str, scheduler: str = "") -> tuple[Any, dict[str, Any]]:
    pipe, call = FAMILIES[family](SCHEDULERS[scheduler]() if scheduler else None)
    return pipe, {name: value for name, value in call.items() if name != "latents"}


def searched(pipe: Any, method: Any, verifier: Any = mean, **options: Any) -> SearchedPipeline:
    return search(pipe, verifier, method, **{"decode": latent, **options})


def called(target: Any, call: dict[str, Any], seed: int = 0, **changes: Any) -> Tensor:
    return target(**{**call, **changes, "generator": torch.Generator().manual_seed(seed)})[0]


@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_what_is_found_is_the_pipelines_own_sample_of_its_noise(family: str, scheduler: str) -> None:
    pipe, call = made(family, scheduler)
    target = searched(pipe, hasten.RandomSearch(rounds=2))
    out = called(target, call)
    noise = target.found[0].noise[None]
    plain_scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    plain_scheduler.set_timesteps(6)
    scale = float(getattr(plain_scheduler, "init_noise_sigma", 1.0))
    plain = run(pipe, call, latents=noise / scale)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=5e-5)
    assert target.report is not None and target.report.meter.spent.particle_steps == 6 * 6
    assert target.report.rewards[0] == pytest.approx(float(mean(plain)[0]), abs=1e-4)
    assert type(pipe.scheduler) is type(SCHEDULERS[scheduler]()) and "prepare_latents" not in vars(pipe)


@pytest.mark.parametrize(("family", "scheduler"), CASES)
def test_stretches_meet(family: str, scheduler: str) -> None:
    """From noise to a level and on from there is about the whole way; for the first-order schedulers the same numbers."""
    pipe, call = made(family, scheduler)
    evaluate = Evaluator(pipe, call, 6, {})
    noise = evaluate.path.start_scale * torch.randn(2, *evaluate.shape, generator=torch.Generator().manual_seed(1))
    whole, _ = evaluate(noise, evaluate.path.top, 0.0, 6)
    levels = evaluate.grid(evaluate.path.top, 0.01, 6)
    assert levels is not None and all(a > b for a, b in pairwise(levels))
    middle = levels[3]
    half, _ = evaluate(noise, evaluate.path.top, middle, 3)
    end, clean = evaluate(half, middle, 0.0, 3)
    assert end.shape == whole.shape and torch.equal(end, clean)
    # What is compared moves by much on the way; the grids differ a little where timesteps are whole numbers.
    assert float((end - whole).norm()) < (0.35 if scheduler == "dpm++2m" else 0.2) * float((whole - noise).norm())
    assert torch.equal(evaluate(noise, evaluate.path.top, middle, 3)[0], half)  # whatever was run in between
    _, estimate = evaluate(half, middle, middle, 1)
    assert estimate.shape == whole.shape and torch.allclose(evaluate(half, middle, middle, 1)[0], half, rtol=1e-5)


def test_a_stretch_of_a_flow_is_the_schedulers_own() -> None:
    """Between two of its levels, a noiseless step of ours is the flow's Euler step."""
    pipe, call = made("flux", "flow")
    seen: list[Tensor] = []

    def remember(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(kwargs["hidden_states"].clone())

    evaluate = Evaluator(pipe, call, 6, {})
    noise = torch.randn(2, *evaluate.shape, generator=torch.Generator().manual_seed(1))
    hook = pipe.transformer.register_forward_pre_hook(remember, with_kwargs=True)
    evaluate(noise, evaluate.path.top, 0.0, 6)
    hook.remove()
    levels = [float(sigma) for sigma in pipe.scheduler.sigmas]
    for k in (0, 2, 4):
        after, _ = evaluate(seen[k], levels[k], levels[k + 1], 1)
        torch.testing.assert_close(after, seen[k + 1], rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
@pytest.mark.parametrize("family", ["pixart", "flux"])
def test_every_method_finds_something_within_its_budget(family: str, method: Any) -> None:
    pipe, call = made(family)
    target = searched(pipe, method, budget=hasten.Budget(particle_steps=60), micro_batch=3)
    other = searched(pipe, method, budget=hasten.Budget(particle_steps=60))
    with warnings.catch_warnings(action="ignore"):  # the smaller budget binds some methods
        out = called(target, call, 3)
        again = called(other, call, 3)
    torch.testing.assert_close(out, again, rtol=0, atol=5e-5)
    assert target.report is not None and 6 <= target.report.meter.spent.particle_steps <= 60
    assert target.report.rewards[0] == pytest.approx(float(mean(out)[0]), abs=1e-4)


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_scheduler_that_draws_noise_is_searched_with_the_same_noise_for_all(family: str) -> None:
    stochastic = {
        "sd": diffusers.EulerAncestralDiscreteScheduler(),
        "flux": diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    }
    pipe, call = FAMILIES[family](stochastic[family])
    del call["latents"]
    few = called(searched(pipe, hasten.RandomSearch(rounds=1, pool=3), micro_batch=1), call)
    torch.testing.assert_close(called(searched(pipe, hasten.RandomSearch(rounds=1, pool=3)), call), few, rtol=1e-4, atol=5e-5)


def test_searching_is_better_than_not() -> None:
    pipe, call = made("pixart")
    plain = [float(mean(called(searched(pipe, hasten.RandomSearch(rounds=1, pool=1)), call, seed))[0]) for seed in range(4)]
    found = [float(mean(called(searched(pipe, hasten.ZeroOrder(rounds=3, neighbours=3)), call, seed))[0]) for seed in range(4)]
    assert all(a >= b for a, b in zip(found, plain, strict=True)) and sum(found) > sum(plain) + 0.1


def test_prompts_are_searched_one_by_one_and_returned_together() -> None:
    pipe, call = made("pixart")
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.cat([call[name], 2 * call[name].flip(1)])
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        call[name] = call[name].repeat(2, 1)
    target = searched(pipe, hasten.RandomSearch(rounds=1, pool=3), budget=hasten.Budget(particle_steps=36))
    out = called(target, call)
    assert out.shape[0] == 2 and len(target.reports) == 2
    torch.testing.assert_close(out, torch.stack([found.latents for found in target.found]).to(out))
    first = {name: value[:1] if isinstance(value, Tensor) else value for name, value in call.items()}
    alone = searched(pipe, hasten.RandomSearch(rounds=1, pool=3))
    torch.testing.assert_close(called(alone, first), out[:1], rtol=0, atol=5e-5)


def test_denoiser_rows_are_counted_where_the_budget_limits_them() -> None:
    pipe, call = made("pixart")
    target = searched(pipe, hasten.RandomSearch(rounds=3), budget=hasten.Budget(denoiser_rows=50))
    with warnings.catch_warnings(action="ignore"):
        called(target, call)
    assert target.report is not None and target.report.meter.spent.denoiser_rows == 2 + 4 * 12


def test_an_accelerated_pipeline_is_searched() -> None:
    pipe, call = made("pixart")
    fast = hasten.accelerate(pipe, hasten.DeltaDiT(interval=2))
    target = searched(fast, hasten.RandomSearch(rounds=1, pool=3))
    out = called(target, call)
    plain = run(fast, call, latents=target.found[0].noise[None])
    torch.testing.assert_close(out, plain, rtol=0, atol=5e-5)
    assert fast.report.computed_fraction < 1


@pytest.mark.parametrize("family", ["sd", "pixart", "flux"])
def test_gradients_reach_the_noise_through_the_pipelines_own_call(family: str) -> None:
    pipe, call = made(family)
    method = hasten.ReNO(iterations=6, learning_rate=20.0)
    target = searched(pipe, method, draft_steps=2)
    out = called(target, call, 1)
    assert target.report is not None
    climbed = [node.reward for node in target.report.lineage.nodes]
    assert climbed[-1] > climbed[0] and all(p.grad is None for net in denoisers_of(pipe).values() for p in net.parameters())
    torch.testing.assert_close(out, run(pipe, call, latents=target.found[0].noise[None]), rtol=1e-4, atol=5e-5)
    assert target.report.meter.spent.particle_steps == 6 * 2 + 6


def test_bad_input() -> None:
    pipe, call = made("pixart")
    with pytest.raises(SteeringError, match="latents cannot be given"):
        called(searched(pipe, METHODS[0]), call, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(hasten.BudgetError, match="one sample takes 6"):
        called(searched(pipe, METHODS[0], budget=hasten.Budget(particle_steps=5)), call)
    with pytest.raises(hasten.BudgetError, match="shared among 2"):
        target = searched(pipe, METHODS[0], budget=hasten.Budget(particle_steps=1))
        called(target, {**call, "prompt_embeds": call["prompt_embeds"].repeat(2, 1, 1)})
    with pytest.raises(ValueError, match="draft_steps must be"):
        searched(pipe, hasten.ReNO(), draft_steps=0)
    with pytest.raises(ValueError, match="draft_steps is for methods that climb"):
        searched(pipe, METHODS[0], draft_steps=2)
    with pytest.raises(VerifierError, match="no gradient"):
        called(searched(pipe, hasten.ReNO(iterations=1), hasten.JPEGSize()), call)
    with pytest.raises(VerifierError, match="one score per image"):
        called(searched(pipe, METHODS[0], lambda images: images), call)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and "prepare_latents" not in vars(pipe)
    pipe.scheduler = diffusers.SCMScheduler()
    with pytest.raises(SteeringError, match="SCMScheduler"):
        searched(pipe, METHODS[0])
