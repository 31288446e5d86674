"""Steering through the scheduler of unmodified pipelines: exact when it changes nothing, and right when it does."""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import hasten
from hasten.accelerators.scheduler_hook import driven
from hasten.accelerators.steering.best_of_n import BestOfN
from hasten.accelerators.steering.budget import Budget, BudgetError, Cost
from hasten.accelerators.steering.controller import Population, Run, SteeringError, StepAction, StepInfo
from hasten.accelerators.steering.fk import FKSteering
from hasten.accelerators.steering.successive_halving import SuccessiveHalving
from hasten.accelerators.steering.verifiers import RewardWarning, VerifierError
from hasten.pipelines.scheduler_levels import SchedulerLevels
from hasten.pipelines.steering import SteeredPipeline, steer
from tests.families import PIPELINES, UNETS, run

STEPS = 6
FAMILIES = {**UNETS, **{name: PIPELINES[name] for name in ("pixart", "sd3", "flux", "wan")}}

VP: dict[str, Callable[[], Any]] = {
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "ddpm": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "dpm++2m": lambda: diffusers.DPMSolverMultistepScheduler(),
    "dpm++2m sde": lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "unipc": lambda: diffusers.UniPCMultistepScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
    "euler a": lambda: diffusers.EulerAncestralDiscreteScheduler(),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "lcm": lambda: diffusers.LCMScheduler(),
    "tcd": lambda: diffusers.TCDScheduler(),
    "deis": lambda: diffusers.DEISMultistepScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "gamma": lambda: hasten.GammaScheduler(gamma=1.0),
}
FLOW: dict[str, Callable[[], Any]] = {
    "flow euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "flow heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "flow unipc": lambda: diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
    "flow dpm++": lambda: diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0),
}
TAKES = {
    "pixart": tuple(VP),
    "sd": ("ddim", "dpm++2m", "unipc", "euler", "heun", "lcm"),
    "sdxl": ("dpm++2m", "euler", "euler a"),
    "sd3": ("flow euler", "flow heun"),
    "flux": ("flow euler", "flow unipc"),
    "wan": ("flow euler", "flow heun", "flow unipc", "flow dpm++"),
}
PAIRS = [(family, name) for family, names in TAKES.items() for name in names]
HISTORY = ("ddim", "dpm++2m", "unipc", "euler", "heun", "deis", "pndm", *FLOW)
"""Deterministic ones, most with a history."""
OF_STREAMS = [name for name, of in {**VP, **FLOW}.items() if SchedulerLevels(of()).draws_noise]
"""Their noise comes from the particle's stream, and not from the call's generator as in a plain run."""


def made(family: str, scheduler: str = "") -> tuple[Any, dict[str, Any]]:
    return FAMILIES[family]({**VP, **FLOW}[scheduler]() if scheduler else None)


def mean(images: Tensor) -> Tensor:
    return images.flatten(1).double().mean(1)


def latent(latents: Tensor) -> Tensor:
    """The tiny pipelines have no decoder."""
    return latents


def steered(pipe: Any, method: Any, verifier: Any = mean, **options: Any) -> SteeredPipeline:
    return steer(pipe, verifier, method, **{"decode": latent, **options})


def noise(call: dict[str, Any], rows: int, seed: int = 5) -> Tensor:
    return torch.randn(rows, *call["latents"].shape[1:], generator=torch.Generator().manual_seed(seed))


def drawn(target: Any, call: dict[str, Any], seed: int = 0, **changes: Any) -> Tensor:
    """As `run`, with noise from a generator where the call brings none."""
    return target(**{**call, **changes, "generator": torch.Generator().manual_seed(seed)})[0]


@dataclass(frozen=True)
class Scripted:
    """Does at the given steps what it is told; all particles are returned in their order."""

    particles: int
    actions: dict[int, StepAction] = field(default_factory=dict)
    needs_noise: bool = False

    def begin(self, run: Run) -> Population:
        return Script(self, run)


class Script(Population):
    def __init__(self, settings: Scripted, run: Run) -> None:
        super().__init__(run, settings.particles, "scripted", "all")
        self.settings = settings
        self.seen: list[tuple[int, Tensor]] = []

    def cost(self, particles: int, after: int) -> Cost:
        return self.run.cost(particles * (self.run.steps - 1 - after), particles)

    def on_step(self, info: StepInfo) -> StepAction:
        self.seen.append((info.step, info.x0))
        action = self.settings.actions.get(info.step, StepAction())
        if action.alive is not None:
            self.alive = action.alive.view(self.alive.shape).clone()
        return action

    def choose(self, rewards: Tensor) -> tuple[list[list[int]], Tensor]:
        return [row.nonzero()[:, 0].tolist() for row in self.alive], self.alive.double()


# ------------------------------------------------------------------------------------------------------------------ exact


class Silent:
    """A driver that leaves everything to the scheduler."""

    def __init__(self) -> None:
        self.calls = 0

    def timesteps_set(self, scheduler: Any) -> None:
        pass

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        self.calls += 1
        return proceed(*arguments.args, **arguments.kwargs)


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_driver_that_does_nothing_changes_nothing(family: str, name: str) -> None:
    pipe, call = made(family, name)
    plain, driver, kind = drawn(pipe, call), Silent(), type(pipe.scheduler)
    with driven(pipe.scheduler, driver):
        assert torch.equal(drawn(pipe, call), plain)
        assert isinstance(pipe.scheduler, kind) and type(pipe.scheduler).__name__ == kind.__name__
    assert type(pipe.scheduler) is kind and driver.calls == len(pipe.scheduler.timesteps)


@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[1] not in OF_STREAMS])
def test_one_particle_that_is_left_alone_is_the_plain_sample(family: str, name: str) -> None:
    """Everything is in place: the rows, the denoiser's wrapper, the estimates, the last step's choice."""
    pipe, call = made(family, name)
    assert torch.equal(run(steered(pipe, Scripted(1)), call), run(pipe, call))


@pytest.mark.parametrize(("family", "name"), [pair for pair in PAIRS if pair[1] in HISTORY])
def test_a_permuted_run_is_the_permuted_reference(family: str, name: str) -> None:
    pipe, call = made(family, name)
    latents, first, second = noise(call, 4), torch.tensor([2, 0, 2, 1]), torch.tensor([3, 3, 1, 0])
    plain = run(steered(pipe, Scripted(4)), call, latents=latents)
    assert plain.flatten(1).std(0).max() > 1e-2  # rows differ
    moved = run(steered(pipe, Scripted(4, {2: StepAction(index=first), 4: StepAction(index=second)})), call, latents=latents)
    torch.testing.assert_close(moved, plain[first][second], rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", [hasten.DeltaDiT(interval=3), hasten.Forecast(interval=2)], ids=str)
@pytest.mark.parametrize("family", ["pixart", "sd3", "flux", "wan"])
def test_cached_blocks_follow_their_particle(family: str, method: Any) -> None:
    """Rows move in the middle of a cached stretch, and some are no longer computed."""
    pipe, call = made(family)
    latents, index = noise(call, 4), torch.tensor([2, 0, 2, 1])
    alive = [torch.tensor([True, True, False, True]), torch.tensor([False, True, False, True])]
    fast = hasten.accelerate(pipe, method)
    plain = run(steered(fast, Scripted(4)), call, latents=latents)
    assert fast.report.computed_fraction < 1
    script = {1: StepAction(index=index, alive=alive[0]), 3: StepAction(alive=alive[1])}
    moved = run(steered(fast, Scripted(4, script)), call, latents=latents)
    torch.testing.assert_close(moved, plain[index][alive[1]], rtol=0, atol=5e-5)
    assert not fast.report.reasons and fast.report.computed_fraction < 1


def test_prompts_keep_their_particles_and_dead_rows_are_not_computed() -> None:
    pipe, call = made("pixart")
    rows: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        call[name] = torch.cat([call[name], 2 * call[name].flip(1)])
    for name in ("prompt_attention_mask", "negative_prompt_attention_mask"):
        call[name] = call[name].repeat(2, 1)
    latents = noise(call, 6)
    plain = run(steered(pipe, Scripted(3)), call, latents=latents)
    separate = [
        run(pipe, call, latents=latents[r : r + 1], **{name: call[name][r // 3 : r // 3 + 1] for name in call if "prompt_" in name})
        for r in range(6)
    ]
    torch.testing.assert_close(plain, torch.cat(separate), rtol=0, atol=5e-5)
    rows.clear()
    alive = torch.tensor([True, False, True, False, False, True])
    method = steered(pipe, Scripted(3, {2: StepAction(alive=alive)}))
    some = run(method, call, latents=latents)
    torch.testing.assert_close(some, plain[alive], rtol=0, atol=5e-5)
    assert rows == [12] * 3 + [6] * 3
    assert method.report is not None
    spent = method.report.meter.spent
    assert (spent.particle_steps, spent.denoiser_rows, spent.decodes) == (6 * 3 + 3 * 3, 2 * (6 * 3 + 3 * 3), 3)


def test_a_run_can_end_early_with_its_estimates() -> None:
    pipe, call = made("pixart", "ddim")
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(1))
    method = steered(pipe, Scripted(2, {3: StepAction(alive=torch.tensor([False, True]), stop=True)}))
    made_of = run(method, call, latents=noise(call, 2))
    assert len(calls) == 4 and made_of.shape[0] == 1
    assert method.selection is not None and method.selection.rows == [[1]]


# --------------------------------------------------------------------------------------------------------- noise and rows


def test_same_seed_same_result_whatever_the_micro_batch() -> None:
    pipe, call = made("pixart")
    del call["latents"]
    whole, parts = steered(pipe, FKSteering(particles=5)), steered(pipe, FKSteering(particles=5), micro_batch=2)
    other, one = drawn(whole, call, 8), drawn(whole, call, 7)
    assert torch.equal(one, drawn(whole, call, 7)) and not torch.equal(one, other)
    torch.testing.assert_close(drawn(parts, call, 7), one, rtol=0, atol=5e-5)
    assert whole.selection is not None and parts.selection is not None and whole.selection.rows == parts.selection.rows


@pytest.mark.parametrize("family", ["pixart", "flux", "wan"])
@pytest.mark.parametrize("kernel", ["ddim", "linear-sde", "renoise"])
def test_the_noise_of_a_particle_does_not_depend_on_their_number(family: str, kernel: str) -> None:
    pipe, call = made(family)
    del call["latents"]
    few, many = (drawn(steered(pipe, Scripted(k), kernel=kernel), call) for k in (2, 5))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=5e-5)
    assert not torch.allclose(many[0], many[1])


@pytest.mark.parametrize("name", ["ddpm", "dpm++2m sde", "euler a", "lcm", "tcd", "gamma"])
def test_a_scheduler_that_draws_noise_draws_it_for_every_particle_alone(name: str) -> None:
    pipe, call = made("sd", name)
    del call["latents"]
    changes = {"eta": 0.5} if name == "tcd" else {}
    few, many = (drawn(steered(pipe, Scripted(k), kernel="scheduler"), call, **changes) for k in (2, 5))
    torch.testing.assert_close(many[:2], few, rtol=0, atol=5e-5)


@pytest.mark.parametrize("family", ["flux", "sd3", "wan"])
def test_a_stochastic_flow_scheduler_gets_the_generators_that_its_pipeline_forgets(family: str) -> None:
    pipe, call = FAMILIES[family](diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True))
    del call["latents"]
    few, again, many = (drawn(steered(pipe, Scripted(k), kernel="scheduler"), call) for k in (2, 2, 5))
    assert torch.equal(few, again)
    torch.testing.assert_close(many[:2], few, rtol=0, atol=5e-5)


def test_copies_part_at_the_step_of_their_making() -> None:
    """Siblings share the estimate and not the noise; the pipelines of flows are not given a generator by themselves."""
    for family, kernel in (("flux", "auto"), ("sd", "auto"), ("wan", "linear-sde")):
        pipe, call = made(family)
        script = Scripted(2, {2: StepAction(index=torch.tensor([0, 0]))}, needs_noise=True)
        method = steered(pipe, script, kernel=kernel)
        out = drawn(method, call, latents=noise(call, 2))
        assert not torch.allclose(out[0], out[1], atol=1e-2)
        assert method.report is not None and method.report.facts["stochastic"]


def test_prompts_are_encoded_once(tiny_pipeline_folder: Any) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    batches: list[int] = []
    pipe.text_encoder.register_forward_pre_hook(lambda module, args: batches.append(len(args[0])))
    method = steer(pipe, mean, SuccessiveHalving(candidates=4, rungs=((0.5, 2),)))
    out = method(["a red circle", "a blue square"], num_inference_steps=4, use_resolution_binning=False, output_type="pt")
    assert max(batches) <= 2 and out.images.shape == (2, 3, 64, 64)
    assert "encode_prompt" not in vars(pipe)
    before = len(batches)
    method(["a red circle", "a blue square"], num_inference_steps=4, use_resolution_binning=False)
    assert len(batches) == before


def test_estimates_may_have_a_judge_of_their_own() -> None:
    """It steers; the choice among finished samples, and what is reported of them, is the verifier's."""
    pipe, call = made("pixart")

    @dataclass
    class Judge:
        sign: float
        calls: list[int] = field(default_factory=list)
        for_estimates: Any = None
        differentiable = False
        range_hint = None

        def score(self, images: Tensor, prompts: Any) -> Tensor:
            self.calls.append(len(images))
            return self.sign * mean(images)

    fk = FKSteering(3, start=0.3, end=0.7, every=0.2, lambda_=50.0, select="all")
    strict, loose = Judge(-1.0), Judge(1.0)
    target = steered(pipe, fk, strict, estimates=loose)
    out = run(target, call)
    assert strict.calls == [3] and set(loose.calls) == {3} and target.selection is not None
    assert target.report is not None and target.report.meter.spent.verifier_rows == 3 + sum(loose.calls)
    torch.testing.assert_close(target.selection.rewards[0].sort(descending=True).values, -mean(out))
    # What a verifier says of itself is the same; and either can be told to judge both.
    assert torch.equal(run(steered(pipe, fk, Judge(-1.0, for_estimates=Judge(1.0))), call), out)
    both = run(steered(pipe, fk, Judge(1.0)), call)
    assert torch.equal(both.flip(0), out), "the same particles, in the other order"
    assert torch.equal(run(steered(pipe, fk, Judge(1.0, for_estimates=loose), estimates=Judge(1.0)), call), both)


def test_the_decoder_is_the_pipelines_own(tiny_pipeline_folder: Any) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(tiny_pipeline_folder)
    pipe.set_progress_bar_config(disable=True)
    seen: list[Tensor] = []
    method = steer(pipe, lambda images: (seen.append(images), mean(images))[1], BestOfN(3, select="all"))
    out = method("a red circle", num_inference_steps=3, use_resolution_binning=False, output_type="pt")
    assert method.selection is not None
    torch.testing.assert_close(out.images, seen[-1][method.selection.rows[0]], rtol=0, atol=1e-5)
    assert (mean(out.images).diff() <= 0).all()


# ----------------------------------------------------------------------------------------------------- the clean sample


PREDICTIONS = [(name, kind) for name in ("ddim", "ddpm", "euler", "euler a", "heun", "tcd", "lcm") for kind in ("epsilon", "v_prediction")]


@pytest.mark.parametrize(("name", "prediction"), PREDICTIONS)
def test_the_clean_sample_is_the_schedulers_own(name: str, prediction: str) -> None:
    scheduler = type(VP[name]()).from_config(VP[name]().config, prediction_type=prediction)
    scheduler.set_timesteps(8)
    levels = SchedulerLevels(scheduler)
    sample = 3 * torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for call, timestep in enumerate(scheduler.timesteps[:7]):
        output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(call))
        x0 = levels.clean(output, sample, levels.at(call))
        out = scheduler.step(output, timestep, sample)
        own = getattr(out, "pred_original_sample", None)
        if own is not None:
            torch.testing.assert_close(x0, own, rtol=1e-4, atol=1e-4)
        else:
            scaled = {"tcd": None, "lcm": "denoised"}[name]
            if scaled == "denoised" and prediction == "epsilon":
                skip, kept = scheduler.get_scalings_for_boundary_condition_discrete(timestep)
                torch.testing.assert_close(skip * sample + kept * x0, out.denoised, rtol=1e-4, atol=1e-4)
        sample = out.prev_sample


@pytest.mark.parametrize("name", ["dpm++2m", "unipc", "flow unipc", "flow dpm++"])
def test_the_clean_sample_is_what_multistep_schedulers_keep(name: str) -> None:
    scheduler = {**VP, **FLOW}[name]()
    scheduler.set_timesteps(8)
    levels = SchedulerLevels(scheduler)
    sample = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for call, timestep in enumerate(scheduler.timesteps):
        output = torch.randn(sample.shape, generator=torch.Generator().manual_seed(call))
        x0 = levels.clean(output, sample, levels.at(call))
        sample = scheduler.step(output, timestep, sample).prev_sample
        torch.testing.assert_close(x0, scheduler.model_outputs[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", [*VP, *FLOW])
def test_levels_fall_to_the_clean_sample(name: str) -> None:
    scheduler = {**VP, **FLOW}[name]()
    scheduler.set_timesteps(8)
    levels = SchedulerLevels(scheduler)
    found = [levels.at(call).level for call in range(len(scheduler.timesteps) + 1)]
    assert all(a >= b for a, b in pairwise(found)) and found[-1] == 0 and found[0] > 0.9
    assert levels.steps() == (9 if name == "pndm" else 8)


@pytest.mark.parametrize(("family", "name"), [("sd", "ddim"), ("sd", "euler"), ("flux", "flow euler"), ("wan", "flow euler")])
def test_the_ddim_kernel_without_noise_is_the_schedulers_step(family: str, name: str) -> None:
    pipe, call = made(family, name)
    latents = noise(call, 2)
    own = run(steered(pipe, Scripted(2)), call, latents=latents)
    torch.testing.assert_close(run(steered(pipe, Scripted(2), kernel="ddim", eta=0.0), call, latents=latents), own, rtol=1e-4, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------- budgets


@pytest.mark.parametrize("unit", ["particle_steps", "denoiser_rows", "decodes", "verifier_rows"])
@pytest.mark.parametrize("limit", [15, 20, 31, 60])
@pytest.mark.parametrize("method", [FKSteering(particles=4), BestOfN(4), SuccessiveHalving()], ids=lambda m: type(m).__name__)
def test_a_budget_is_never_exceeded(unit: str, limit: int, method: Any) -> None:
    pipe, call = made("pixart")
    target = steered(pipe, method, budget=Budget(**{unit: limit}))
    with warnings.catch_warnings(action="ignore"):  # it says how many particles it affords
        drawn(target, {**call, "latents": None}, num_inference_steps=STEPS)
    assert target.report is not None
    assert 0 < getattr(target.report.meter.spent, unit) <= limit


# -------------------------------------------------------------------------------------------------------------- bad input


def test_what_cannot_be_steered_is_refused() -> None:
    pipe, call = made("pixart", "ddim")
    with pytest.raises(SteeringError, match="draws no noise"):
        run(steered(pipe, FKSteering(), eta=0.0), call)
    with pytest.raises(SteeringError, match="draws no noise"):
        run(steered(pipe, FKSteering(), kernel="scheduler"), call)
    with pytest.raises(SteeringError, match="no step of 1"):
        run(steered(pipe, FKSteering()), call, num_inference_steps=1)
    with pytest.raises(SteeringError, match="num_images_per_prompt must be 1"):
        run(steered(pipe, BestOfN(2)), call, num_images_per_prompt=2)
    with pytest.raises(SteeringError, match="latents must have 1 or 2 rows"):
        run(steered(pipe, BestOfN(2)), call, latents=noise(call, 3))
    with pytest.raises(BudgetError, match="one sample takes 6"):
        run(steered(pipe, BestOfN(2), budget=Budget(particle_steps=5)), call)
    with pytest.raises(SteeringError, match="one generator"):
        run(steered(pipe, BestOfN(2)), call, generator=[torch.Generator(), torch.Generator()])
    with pytest.raises(TypeError, match="steps"):
        steered(made("flux")[0], BestOfN(2))(steps=3)
    for options in ({"kernel": "euler"}, {"eta": 1.5}, {"micro_batch": 0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            steered(pipe, BestOfN(2), **options)
    with pytest.raises(ValueError, match="not both"):
        steer(pipe, mean, BestOfN(2), particles=3)
    with pytest.raises(SteeringError, match="micro_batch"):
        steered(hasten.accelerate(pipe, hasten.DeltaDiT()), BestOfN(2), micro_batch=2)
    heun, _ = made("pixart", "heun")
    with pytest.raises(SteeringError, match="two denoiser calls"):
        run(steered(heun, FKSteering()), call)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler


def test_a_scheduler_without_a_rule_is_refused() -> None:
    pipe, _ = made("pixart")
    pipe.scheduler = diffusers.SCMScheduler()
    with pytest.raises(SteeringError, match="SCMScheduler"):
        steered(pipe, BestOfN(2))


def test_verifiers_that_are_wrong_are_refused_and_nothing_stays_behind() -> None:
    pipe, call = made("pixart")
    with pytest.raises(VerifierError, match="one score per image"):
        run(steered(pipe, BestOfN(2), lambda images: images.mean()), call)
    with pytest.raises(ZeroDivisionError):
        run(steered(pipe, BestOfN(2), lambda images: 1 / 0), call)
    assert type(pipe.scheduler) is diffusers.DDIMScheduler and "_compiled_call_impl" not in vars(pipe.transformer)
    plain = run(pipe, call)
    with pytest.warns(RewardWarning, match="NaN"):
        out = steered(pipe, BestOfN(3), lambda images: mean(images).where(torch.arange(3) != 1, torch.nan))
        run(out, call, latents=noise(call, 3))
    assert out.selection is not None and out.selection.rows[0][0] != 1
    assert torch.equal(run(pipe, call), plain)


def test_a_pipeline_is_steered_once_at_a_time() -> None:
    pipe, call = made("pixart")
    inner = steered(pipe, BestOfN(2))

    def nested(images: Tensor) -> Tensor:
        run(inner, call)
        return mean(images)

    with pytest.raises(RuntimeError, match="steered already"):
        run(steered(pipe, BestOfN(2), nested), call)
    run(inner, call)


def test_a_copied_scheduler_is_left_alone() -> None:
    """Pipelines that sample a second thing copy their scheduler."""
    pipe, _ = made("pixart")
    with driven(pipe.scheduler, Silent()) as _:
        copied = copy.deepcopy(pipe.scheduler)
        copied.set_timesteps(3)
        sample = torch.randn(1, 4, 8, 8)
        assert copied.step(sample, copied.timesteps[0], sample).prev_sample.shape == sample.shape


def test_the_documents_examples_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "steering.md").read_text()
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 4
    with warnings.catch_warnings(action="ignore"):  # a budget that binds is told of
        for example in examples:
            exec(compile(example, "docs/steering.md", "exec"), {})
    assert (tmp_path / "steered.png").is_file()
