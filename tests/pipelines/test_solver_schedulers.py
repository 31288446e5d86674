"""The few-step schedulers against diffusers' own, on exact denoisers, and inside pipelines that know nothing of them."""

from __future__ import annotations

import copy
import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PixArtAlphaPipeline,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hasten.accelerators.solvers.grids import first_order_errors, learned_grid
from hasten.accelerators.steering.levels import AlphaSigma
from hasten.pipelines.solver_schedulers import EVODiffScheduler, GammaScheduler, SolverScheduler, recorded
from tests.accelerators.solvers import runs

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
BOTH = pytest.mark.parametrize("cls", [GammaScheduler, EVODiffScheduler])


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape or (2, 4, 6, 6), generator=torch.Generator().manual_seed(seed))


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(x: Tensor, t: float) -> Tensor:
    """Some smooth function of latents and timestep."""
    return 0.6 * torch.sin(1.3 * x + t / 400) + 0.2 * x.roll(1, -1) - 0.1


def sampled(scheduler: Any, steps: int | None, x: Tensor | None = None, output: Any = network, given: Any = None, **step: Any) -> Tensor:
    """The end of a run."""
    scheduler.set_timesteps(steps, **(given or {}))
    x = latents() if x is None else x
    for t in scheduler.timesteps:
        x = scheduler.step(output(x, float(t)), t, x, **step, return_dict=False)[0]
    return x


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)


# --- the gamma sampler is its special cases


@pytest.mark.parametrize("steps", [1, 5, 10])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("to_one", [True, False])
def test_gamma_0_is_ddim(steps: int, kind: str, spacing: str, to_one: bool) -> None:
    ddim = DDIMScheduler(
        prediction_type=kind,
        timestep_spacing=spacing,
        set_alpha_to_one=to_one,
        clip_sample=steps == 5,
        steps_offset=int(spacing == "leading"),
    )
    gamma = GammaScheduler.from_config(ddim.config, gamma=0.0)
    same(sampled(gamma, steps), sampled(ddim, steps))
    assert torch.equal(gamma.timesteps, ddim.timesteps)


def test_gamma_0_is_ddim_at_zero_terminal_signal_and_with_thresholding() -> None:
    for options in ({"rescale_betas_zero_snr": True}, {"thresholding": True, "sample_max_value": 1.5}):
        ddim = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False, **options)
        gamma = GammaScheduler.from_config(ddim.config, gamma=0.0)
        same(sampled(gamma, 8), sampled(ddim, 8))
        assert torch.isfinite(gamma.sigmas).all()


@pytest.mark.parametrize(
    "schedule", [{"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, {"beta_schedule": "squaredcos_cap_v2"}]
)
def test_noise_schedules_are_those_of_diffusers(schedule: dict[str, Any]) -> None:
    ddim = DDIMScheduler(**schedule)
    gamma = GammaScheduler.from_config(ddim.config)
    assert torch.equal(gamma.alphas_cumprod, ddim.alphas_cumprod)
    times = torch.tensor([0, 500])
    x, noise = latents(seed=1), latents(seed=2)
    same(gamma.add_noise(x, noise, times), ddim.add_noise(x, noise, times))
    taught = GammaScheduler(trained_betas=ddim.betas.tolist())
    torch.testing.assert_close(taught.alphas_cumprod, ddim.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_gamma_1_is_lcm_with_the_same_noise(steps: int, kind: str) -> None:
    # A large scaling turns off the boundary conditions, which are 1e-5 at most otherwise.
    lcm = LCMScheduler(prediction_type=kind, timestep_scaling=1e6)
    gamma = GammaScheduler.from_config(lcm.config, gamma=1.0)
    same(sampled(gamma, steps, generator=seeded()), sampled(lcm, steps, generator=seeded()))
    assert torch.equal(gamma.timesteps, lcm.timesteps)


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("steps", [1, 3, 4, 8])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_every_gamma_is_tcd_with_the_same_noise(gamma: float, steps: int, kind: str) -> None:
    tcd = TCDScheduler(prediction_type=kind)
    ours = GammaScheduler.from_config(tcd.config, gamma=gamma, set_alpha_to_one=False)
    same(sampled(ours, steps, generator=seeded()), sampled(tcd, steps, eta=gamma, generator=seeded()))
    assert torch.equal(ours.timesteps, tcd.timesteps)


FLOWS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"shift": 3.0}, {}),
    ({"shift": 3.0}, {"sigmas": [1.0, 0.7, 0.45, 0.2, 0.1]}),
    ({"use_dynamic_shifting": True}, {"mu": 0.8}),
    ({"use_dynamic_shifting": True}, {"mu": 0.8, "sigmas": np.linspace(1, 0.2, 5)}),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.1, "time_shift_type": "linear"}, {"mu": 0.8}),
    ({"use_karras_sigmas": True}, {}),
    ({"use_exponential_sigmas": True, "shift": 2.0}, {}),
]


@pytest.mark.parametrize(("options", "given"), FLOWS)
def test_on_a_flow_gamma_0_is_euler_and_gamma_1_is_flow_lcm(options: dict[str, Any], given: dict[str, Any]) -> None:
    euler, lcm = FlowMatchEulerDiscreteScheduler(**options), FlowMatchLCMScheduler(**options)
    ours = GammaScheduler.from_config(euler.config, gamma=0.0)
    same(sampled(ours, 5, given=given), sampled(euler, 5, given=given))
    same(ours.sigmas, euler.sigmas)
    same(ours.timesteps, euler.timesteps)
    consistent = GammaScheduler.from_config(lcm.config, gamma=1.0)
    same(sampled(consistent, 5, given=given, generator=seeded()), sampled(lcm, 5, given=given, generator=seeded()))
    if "shift_terminal" not in options:
        same(sampled(ours, 1, given={"mu": given.get("mu")}), sampled(euler, 1, given={"mu": given.get("mu")}))


def test_a_list_of_generators_gives_every_row_its_own_noise() -> None:
    x, steps = latents(3, 4, 6, 6), 4
    for options in ({}, FLOW):
        whole = sampled(GammaScheduler(gamma=0.5, **options), steps, x, generator=[seeded(i) for i in range(3)])
        for row in range(3):
            same(sampled(GammaScheduler(gamma=0.5, **options), steps, x[row : row + 1], generator=seeded(row)), whole[row : row + 1])


def test_a_pipeline_that_hands_over_no_generator_can_still_be_repeated() -> None:
    scheduler = GammaScheduler(gamma=1.0, **FLOW)
    runs_ = []
    for seed in (3, 3, 4):
        scheduler.generator = seeded(seed)
        runs_.append(sampled(scheduler, 4))
    assert torch.equal(runs_[0], runs_[1]) and not torch.equal(runs_[0], runs_[2])


def test_the_estimate_of_the_clean_sample_is_returned() -> None:
    x0, noise = latents(seed=1), latents(seed=2)
    for options in ({}, FLOW):
        for scheduler in (GammaScheduler(**options), EVODiffScheduler(**options)):
            scheduler.set_timesteps(4)
            at = scheduler.path[1]
            output = noise - x0 if options else noise
            scheduler.set_begin_index(1)
            step = scheduler.step(output, scheduler.timesteps[1], at.alpha * x0 + at.sigma * noise)
            same(step.pred_original_sample, x0)
            assert step.prev_sample.shape == x0.shape and scheduler.step_index == 2


# --- EVODiff


def output_of(denoise: runs.Denoiser, scheduler: Any) -> Any:
    """What a network with this scheduler's prediction type would say, from the exact estimate of the clean sample."""

    def output(x: Tensor, t: float) -> Tensor:
        sigma = float(scheduler.sigmas[scheduler.step_index or 0])
        if "flow" in scheduler.config.prediction_type:
            return (x - denoise(x, AlphaSigma(1 - sigma, sigma))) / sigma
        at = AlphaSigma(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
        return (x - at.alpha * denoise(x, at)) / at.sigma

    return output


@pytest.mark.parametrize("options", [{}, FLOW, {**FLOW, "shift": 3.0}, {"use_karras_sigmas": True}])
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 24])
def test_a_run_of_the_scheduler_is_a_run_of_the_method(options: dict[str, Any], steps: int) -> None:
    scheduler = EVODiffScheduler(**options, balanced=True)
    found = sampled(scheduler, steps, runs.noise(2), output_of(runs.pictures, scheduler))
    path = scheduler.path
    if not scheduler.is_flow:  # its clock is the timestep
        clock = [*(float(t) + 1 for t in scheduler.timesteps), 0.0]
    else:
        clock = [at.sigma for at in path]
    torch.testing.assert_close(found, runs.evodiff(runs.pictures, runs.noise(2), path, clock=clock), rtol=1e-4, atol=1e-4)


def test_order_1_is_ddim_and_euler_on_any_grid() -> None:
    ddim = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    same(sampled(EVODiffScheduler.from_config(ddim.config, solver_order=1), 10), sampled(ddim, 10))
    sigmas = {"sigmas": [0.9, 0.5, 0.3]}
    euler = FlowMatchEulerDiscreteScheduler(shift=2.0)
    same(sampled(EVODiffScheduler.from_config(euler.config, solver_order=1), 3, given=sigmas), sampled(euler, 3, given=sigmas))


def test_estimates_that_stay_the_same_give_ddim() -> None:
    target = latents(1, 4, 6, 6, seed=5).expand(2, -1, -1, -1)
    for options in ({"balanced": False}, FLOW):
        second = EVODiffScheduler(**{**options, "prediction_type": "sample"}, final_sigmas_type="zero" if options == FLOW else "sigma_min")
        first = type(second).from_config(second.config, solver_order=1)
        same(sampled(second, 9, output=lambda x, t: target), sampled(first, 9, output=lambda x, t: target))


def test_what_the_pipeline_does_to_the_latents_between_two_steps_is_kept() -> None:
    """A pipeline that masks latents hands back others than the probe; the correction is added to those."""
    ends = []
    for bump in (torch.zeros(2, 4, 6, 6), 0.1 * latents(seed=7)):
        scheduler, x = EVODiffScheduler(prediction_type="sample"), latents()
        scheduler.set_timesteps(6)
        for i in range(3):
            x = scheduler.step(latents(seed=20 + i), scheduler.timesteps[i], x + bump * (i == 2)).prev_sample
        ends.append(x)
    same(ends[1] - ends[0], scheduler.path[3].sigma / scheduler.path[2].sigma * bump)


def test_correctors_can_be_left_out_and_the_last_step_can_be_of_second_order() -> None:
    base = sampled(EVODiffScheduler(), 6)
    assert not torch.equal(sampled(EVODiffScheduler(disable_corrector=[2]), 6), base)
    without = EVODiffScheduler(disable_corrector=list(range(6)))
    never = sampled(without, 6)
    assert without._interval is None and not torch.equal(never, base)
    options = {"final_sigmas_type": "sigma_min"}
    low, high = (sampled(EVODiffScheduler(**options, lower_order_final=flag), 6) for flag in (True, False))
    assert not torch.equal(low, high)
    assert not torch.equal(sampled(EVODiffScheduler(short_run=5), 6), base)


def test_a_second_run_is_as_the_first_and_a_broken_off_one_leaves_nothing() -> None:
    scheduler = EVODiffScheduler()
    first = sampled(scheduler, 6)
    scheduler.set_timesteps(8)
    for t in scheduler.timesteps[:3]:
        scheduler.step(latents(seed=9), t, latents())
    assert torch.equal(sampled(scheduler, 6), first)


# --- the contract


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("options", [{}, FLOW])
def test_every_dtype_is_kept_and_computed_in_float32_at_least(
    cls: type[SolverScheduler], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    scheduler = cls(**options, **({"gamma": 0.0} if cls is GammaScheduler else {}))
    reference = sampled(scheduler, 5, latents().double(), lambda x, t: network(x.to(dtype).double(), t))
    found = sampled(scheduler, 5, latents().to(dtype), lambda x, t: network(x.double(), t).to(dtype))
    assert found.dtype == dtype
    assert runs.apart(found.double(), reference) < {torch.float16: 0.02, torch.bfloat16: 0.1}.get(dtype, 1e-5)
    scheduler.set_timesteps(5)
    step = scheduler.step(network(latents(), 0).to(dtype), scheduler.timesteps[0], latents())
    assert step.prev_sample.dtype == step.pred_original_sample.dtype == torch.float32, "the latents decide, not the autocast output"


@BOTH
def test_it_is_saved_and_loaded(cls: type[SolverScheduler], tmp_path: Path) -> None:
    scheduler = cls(**FLOW, shift=2.0, grid=[1000.0, 700.0, 300.0])
    scheduler.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    for name, value in scheduler.config.items():
        assert name.startswith("_") or loaded.config[name] == (list(value) if isinstance(value, tuple) else value)
    x = latents()
    same(sampled(loaded, 3, x, given={}, **_generator(cls)), sampled(scheduler, 3, x, **_generator(cls)))
    copied = copy.deepcopy(scheduler)
    same(sampled(copied, 3, x, **_generator(cls)), sampled(scheduler, 3, x, **_generator(cls)))


def _generator(cls: type[SolverScheduler]) -> dict[str, Any]:
    return {"generator": seeded()} if cls is GammaScheduler else {}


@BOTH
def test_the_configuration_of_the_present_scheduler_is_taken_over(cls: type[SolverScheduler], tmp_path: Path) -> None:
    other = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    for source in (
        DDPMScheduler,
        DDIMScheduler,
        EulerDiscreteScheduler,
        DPMSolverMultistepScheduler,
        UniPCMultistepScheduler,
        TCDScheduler,
    ):
        # TCD has these values by default: they must come over all the same.
        scheduler = cls.from_config(source(**(other if source is not TCDScheduler else {}), prediction_type="v_prediction").config)
        assert scheduler.config.prediction_type == "v_prediction" and not scheduler.is_flow
        torch.testing.assert_close(scheduler.alphas_cumprod, source(**other).alphas_cumprod)
    for source in (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler, FlowMatchLCMScheduler):
        scheduler = cls.from_config(source(shift=3.0).config)
        assert scheduler.is_flow and scheduler.config.shift == 3.0
    for source in (DPMSolverMultistepScheduler, UniPCMultistepScheduler):
        scheduler = cls.from_config(source(**FLOW, flow_shift=5.0).config)
        assert scheduler.is_flow and scheduler.config.shift == 5.0
    unipc = UniPCMultistepScheduler.from_config(FlowMatchEulerDiscreteScheduler(shift=3.0).config, **FLOW, flow_shift=5.0)
    scheduler = cls.from_config(unipc.config)
    assert scheduler.config.shift == 5.0
    assert (
        cls.from_config(scheduler.config, shift=2.0).config.shift
        == cls.from_config(cls.from_config(scheduler.config, shift=2.0).config).config.shift
        == 2.0
    )
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path)
    assert cls.from_pretrained(tmp_path).config.prediction_type == "sample"
    back = DDIMScheduler.from_config(cls.from_config(DDIMScheduler(**other, clip_sample=False, timestep_spacing="trailing").config).config)
    assert back.config.beta_start == 0.00085 and back.config.timestep_spacing == "trailing"


@pytest.mark.parametrize(
    "source",
    [UniPCMultistepScheduler, DPMSolverMultistepScheduler],
)
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_evodiff_lays_out_the_grid_of_the_multistep_solvers(source: Any, spacing: str) -> None:
    for options in ({}, {"use_karras_sigmas": True}):
        theirs = source(timestep_spacing=spacing, steps_offset=1, **options)
        ours = EVODiffScheduler.from_config(theirs.config)
        for steps in (1, 7, 20):
            theirs.set_timesteps(steps)
            ours.set_timesteps(steps)
            torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=2e-3, atol=1e-4)
            torch.testing.assert_close(ours.timesteps.float(), theirs.timesteps.float(), rtol=0, atol=0.5 if options else 0)
    theirs = UniPCMultistepScheduler(**FLOW, flow_shift=3.0)
    ours = EVODiffScheduler.from_config(theirs.config)
    theirs.set_timesteps(9)
    ours.set_timesteps(9)
    torch.testing.assert_close(ours.sigmas, theirs.sigmas, rtol=1e-4, atol=1e-5)


@BOTH
@pytest.mark.parametrize("options", [{}, FLOW])
def test_grids_are_taken_as_they_are(cls: type[SolverScheduler], options: dict[str, Any]) -> None:
    grid = [900.0, 500.5, 100.0]
    scheduler = cls(**options, shift=3.0, grid=grid)
    for given in ({"num_inference_steps": 3}, {"num_inference_steps": 3, "sigmas": [1.0, 0.6, 0.2]}, {"timesteps": np.array(grid)}):
        scheduler.set_timesteps(**given)
        assert scheduler.timesteps.tolist() == grid and scheduler.num_inference_steps == 3
    assert scheduler.path[-1] == AlphaSigma(1.0, 0.0)
    scheduler.set_timesteps(timesteps=[700, 300])
    assert scheduler.timesteps.tolist() == [700, 300]
    x, noise = latents(seed=1), latents(seed=2)
    for index, t in enumerate(scheduler.timesteps):
        at = scheduler.path[index]
        same(scheduler.add_noise(x, noise, t[None]), at.alpha * x + at.sigma * noise)
        same(scheduler.scale_noise(x, torch.stack([t, t]), noise), at.alpha * x + at.sigma * noise)


@BOTH
def test_noise_over_signal_may_be_given(cls: type[SolverScheduler]) -> None:
    scheduler = cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    scheduler.set_timesteps(sigmas=[14.6, 2.697, 0.652, 0.0])
    torch.testing.assert_close(scheduler.sigmas, torch.tensor([14.6, 2.697, 0.652, 0.0]))
    kept = scheduler.alphas_cumprod.double()
    between = np.interp(scheduler.timesteps.double(), np.arange(1000), ((1 - kept) / kept).sqrt())
    np.testing.assert_allclose(between, [14.6, 2.697, 0.652], rtol=1e-3)


@BOTH
@pytest.mark.parametrize("options", [{}, FLOW])
def test_a_run_may_begin_late(cls: type[SolverScheduler], options: dict[str, Any]) -> None:
    """Image-to-image: by `set_begin_index`, or by the first timestep."""
    found = []
    for say in (True, False):
        scheduler = cls(**options)
        scheduler.set_timesteps(6)
        assert scheduler.begin_index is None and scheduler.step_index is None
        if say:
            scheduler.set_begin_index(2)
        x = latents()
        for t in scheduler.timesteps[2:]:
            assert scheduler.scale_model_input(x, t) is x
            x = scheduler.step(network(x, float(t)), t, x, **_generator(cls)).prev_sample
        assert scheduler.step_index == 6
        found.append(x)
        with pytest.raises(ValueError, match=r"^step 6 was asked for, but the run has 6: call set_timesteps again$"):
            scheduler.step(x, scheduler.timesteps[-1], x)
    same(found[1], found[0])
    assert scheduler.order == 1 and scheduler.init_noise_sigma == 1 and len(scheduler) == 1000


def test_strength_shortens_the_grid_of_the_distillation() -> None:
    lcm, ours = LCMScheduler(), GammaScheduler(original_inference_steps=50)
    for given in ({}, {"strength": 0.5}, {"original_inference_steps": 100}):
        lcm.set_timesteps(4, **given)
        ours.set_timesteps(4, **given)
        assert torch.equal(ours.timesteps, lcm.timesteps)
    ours = GammaScheduler(**FLOW, original_inference_steps=50)
    ours.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, torch.tensor([1.0, 0.76, 0.5, 0.26, 0.0]))


BAD: list[tuple[Any, str]] = [
    (lambda: GammaScheduler(gamma=1.5), "gamma must be a number from 0 (DDIM) to 1 (LCM), not 1.5"),
    (
        lambda: GammaScheduler(prediction_type="x0"),
        "prediction_type must be one of epsilon, v_prediction, sample, flow_prediction, not 'x0'",
    ),
    (lambda: GammaScheduler(beta_schedule="cubic"), "beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', not 'cubic'"),
    (lambda: GammaScheduler(timestep_spacing="even"), "timestep_spacing must be 'trailing', 'linspace' or 'leading', not 'even'"),
    (lambda: GammaScheduler(**FLOW, timestep_spacing="leading"), "timestep_spacing must be 'trailing' or 'linspace' on a flow"),
    (lambda: GammaScheduler(prediction_type="v_prediction", use_flow_sigmas=True), "prediction_type must not be 'v_prediction' where"),
    (lambda: GammaScheduler(prediction_type="flow_prediction", use_flow_sigmas=False), "use_flow_sigmas must be True or None where"),
    (lambda: GammaScheduler(time_shift_type="square"), "time_shift_type must be 'exponential' or 'linear', not 'square'"),
    (lambda: GammaScheduler(num_train_timesteps=0), "num_train_timesteps must be a whole number of at least 1, not 0"),
    (lambda: GammaScheduler(shift=0.0), "shift must be above 0, not 0.0"),
    (lambda: GammaScheduler(trained_betas=[0.1]), "trained_betas must have num_train_timesteps entries, 1000, not 1"),
    (lambda: GammaScheduler(use_karras_sigmas=True, use_exponential_sigmas=True), "use_karras_sigmas and use_exponential_sigmas exclude"),
    (lambda: EVODiffScheduler(solver_order=3), "solver_order must be 1 or 2, not 3"),
    (lambda: EVODiffScheduler(final_sigmas_type="one"), "final_sigmas_type must be 'zero' or 'sigma_min', not 'one'"),
    (lambda: EVODiffScheduler(**FLOW, final_sigmas_type="sigma_min"), "final_sigmas_type must be 'zero' on a flow"),
    (lambda: GammaScheduler.from_config({"sigma_data": 0.5}), "a scheduler with sigma_data 0.5 cannot be replaced: the denoiser's inputs"),
    (lambda: GammaScheduler.from_config({"snr_shift_scale": 3.0}), "a scheduler with snr_shift_scale 3.0 cannot be replaced: the noise"),
    (lambda: GammaScheduler.from_config({"invert_sigmas": True}), "a scheduler with invert_sigmas True cannot be replaced: sigmas run"),
    (lambda: GammaScheduler().set_timesteps(), "num_inference_steps, timesteps or sigmas must be given"),
    (lambda: GammaScheduler().set_timesteps(0), "num_inference_steps must be a whole number of at least 1, not 0"),
    (lambda: GammaScheduler().set_timesteps(2.5), "num_inference_steps must be a whole number of at least 1, not 2.5"),
    (lambda: GammaScheduler().set_timesteps(1001), "num_inference_steps must be at most num_train_timesteps, 1000, not 1001"),
    (lambda: GammaScheduler().set_timesteps(4, timesteps=[9, 5]), "timesteps must have as many entries as num_inference_steps, 4, not 2"),
    (lambda: GammaScheduler(grid=[9, 5]).set_timesteps(4), "grid must have as many entries as num_inference_steps, 4, not 2"),
    (lambda: GammaScheduler().set_timesteps(4, sigmas=[9, 5]), "sigmas must have as many entries as num_inference_steps, 4, not 2"),
    (lambda: GammaScheduler().set_timesteps(timesteps=[9, 5], sigmas=[9, 5]), "timesteps and sigmas were both given; pass one of them"),
    (lambda: GammaScheduler().set_timesteps(timesteps=[5, 9]), "timesteps must fall, of at least 0 and at most 999, not 5, 9"),
    (lambda: GammaScheduler().set_timesteps(timesteps=[1000, 9]), "timesteps must fall, of at least 0 and at most 999, not 1000, 9"),
    (lambda: GammaScheduler(**FLOW).set_timesteps(timesteps=[900, 0]), "timesteps must fall, above 0 and at most 1000, not 900, 0"),
    (lambda: GammaScheduler().set_timesteps(timesteps=[]), "num_inference_steps must be a whole number of at least 1, not 0"),
    (lambda: GammaScheduler().set_timesteps(sigmas=[1.0, 2.0]), "sigmas must fall and be above 0, not [1.0, 2.0]"),
    (lambda: GammaScheduler(**FLOW).set_timesteps(sigmas=[1.5, 0.5]), "sigmas of a flow must be above 0 and at most 1, not [1.5, 0.5]"),
    (lambda: GammaScheduler(**FLOW, use_dynamic_shifting=True).set_timesteps(4), "mu must be given where use_dynamic_shifting is set"),
    (lambda: GammaScheduler().set_timesteps(4, strength=0.5), "strength must be 1 unless original_inference_steps is set, not 0.5"),
    (
        lambda: GammaScheduler(original_inference_steps=50).set_timesteps(51),
        "num_inference_steps must be at most original_inference_steps, 50, not 51",
    ),
    (
        lambda: GammaScheduler(original_inference_steps=50).set_timesteps(30, strength=0.5),
        "num_inference_steps must be at most original_inference_steps x strength, 50 x 0.5, 25, not 30",
    ),
    (
        lambda: GammaScheduler().set_timesteps(4, original_inference_steps=2000),
        "original_inference_steps must be from 1 to num_train_timesteps",
    ),
    (lambda: GammaScheduler().step(latents(), 9, latents()), "set_timesteps must be called before step"),
    (
        lambda: sampled(GammaScheduler(rescale_betas_zero_snr=True), 4),
        "prediction_type 'epsilon' gives no sample where there is noise only",
    ),
    (lambda: recorded(GammaScheduler(gamma=0.3)).__enter__(), "scheduler must be a GammaScheduler of gamma 0 or an EVODiffScheduler of"),
    (lambda: recorded(DDIMScheduler()).__enter__(), "scheduler must be a GammaScheduler of gamma 0 or an EVODiffScheduler of"),
]


@pytest.mark.parametrize(("call", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_refused_in_one_line(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match="^" + re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_timestep_of_another_run_is_refused() -> None:
    scheduler = GammaScheduler()
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"^timestep must be one of the scheduler's timesteps, not 998$"):
        scheduler.step(latents(), torch.tensor(998), latents())


# --- learned grids


@pytest.mark.parametrize("options", [{}, FLOW])
def test_a_recorded_run_gives_a_better_grid(options: dict[str, Any]) -> None:
    long = GammaScheduler.from_config(DPMSolverMultistepScheduler(**options, timestep_spacing="trailing").config, gamma=0.0)
    with recorded(long) as run:
        end = sampled(long, 40, runs.noise(8, 1), output_of(runs.DENOISERS["numbers"], long))
    assert type(long) is GammaScheduler, "nothing is left on the scheduler"
    assert len(run.states) == 41 and len(run.x0) == 40
    torch.testing.assert_close(run.states[-1], end)
    grid = run.timesteps_of(learned_grid(first_order_errors(run.states, run.x0, run.path), 8))
    x = runs.noise(16, 2)
    reference = sampled(long, 200, x, output_of(runs.DENOISERS["numbers"], long))
    even, learned = GammaScheduler(gamma=0.0, **options), GammaScheduler(gamma=0.0, **options, grid=grid)
    errors = [
        runs.apart(sampled(scheduler, 8, x, output_of(runs.DENOISERS["numbers"], scheduler)), reference) for scheduler in (even, learned)
    ]
    assert errors[1] < 0.95 * errors[0]


# --- in pipelines


def pixart(folder: Path) -> Any:
    pipe = PixArtAlphaPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe: Any, steps: int, **options: Any) -> Tensor:
    call = {
        "use_resolution_binning": False,
        "clean_caption": False,
        "output_type": "latent",
        "guidance_scale": 2.0,
        "max_sequence_length": 8,
    }
    return pipe("a red circle", num_inference_steps=steps, generator=seeded(), **call, **options).images


def test_pixart_runs_with_both_and_keeps_them(tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    pipe = pixart(tiny_pipeline_folder)
    before = drawn(pipe, 5)
    config = pipe.scheduler.config
    pipe.scheduler = GammaScheduler.from_config(config, gamma=0.0)
    torch.testing.assert_close(drawn(pipe, 5), before, rtol=1e-4, atol=1e-4)
    pipe.scheduler = GammaScheduler.from_config(config, gamma=0.5)
    assert torch.equal(drawn(pipe, 4), drawn(pipe, 4)) and torch.isfinite(drawn(pipe, 1)).all()
    pipe.scheduler = EVODiffScheduler.from_config(config, grid=[999.0, 700.0, 350.0])
    short = drawn(pipe, 3)
    torch.testing.assert_close(drawn(pipe, 0, timesteps=[999, 700, 350]), short)
    pipe.save_pretrained(tmp_path)
    again = pixart(tmp_path)
    assert type(again.scheduler) is EVODiffScheduler
    torch.testing.assert_close(drawn(again, 3), short)


def flux() -> Any:
    """A tiny random Flux, which packs its latents, shifts by resolution, gives sigmas of its own and hands over no generator."""
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=12, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(8,), latent_channels=4, norm_num_groups=4, shift_factor=0.0, scaling_factor=1.0)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = FluxPipeline(scheduler, vae, None, None, None, None, transformer)  # type: ignore[arg-type]
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_flux_runs_with_both() -> None:
    pipe = flux()
    call = {"prompt_embeds": latents(1, 5, 24), "pooled_prompt_embeds": latents(1, 12), "height": 8, "width": 8, "output_type": "latent"}

    def draw(steps: int) -> Tensor:
        return pipe(**call, num_inference_steps=steps, generator=seeded()).images

    config, before = pipe.scheduler.config, draw(4)
    pipe.scheduler = GammaScheduler.from_config(config, gamma=0.0)
    torch.testing.assert_close(draw(4), before, rtol=1e-4, atol=1e-4)
    assert torch.isfinite(draw(1)).all()
    pipe.scheduler = EVODiffScheduler.from_config(config, grid=[1000.0, 800.0, 500.0, 200.0])
    assert torch.isfinite(draw(4)).all() and pipe.scheduler.timesteps.tolist() == [1000.0, 800.0, 500.0, 200.0]
    pipe.scheduler = GammaScheduler.from_config(config, gamma=1.0)
    drawn_twice = []
    for _ in range(2):
        pipe.scheduler.generator = seeded(1)
        drawn_twice.append(draw(4))
    assert torch.equal(*drawn_twice)


def test_noise_levels_fall_and_end_clean() -> None:
    for scheduler in (GammaScheduler(), GammaScheduler(**FLOW, shift=3.0), EVODiffScheduler(timestep_spacing="leading")):
        for steps in (1, 3, 50):
            scheduler.set_timesteps(steps, device="cpu")
            levels = [at.level for at in scheduler.path]
            assert len(scheduler.timesteps) == steps and len(scheduler.sigmas) == steps + 1
            assert all(a > b for a, b in pairwise(levels)) and levels[-1] == 0 == float(scheduler.sigmas[-1])
