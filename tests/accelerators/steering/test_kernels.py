"""The stochastic steps against a mixture whose moments are known, and against the formulas they generalise."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from hasten.accelerators.steering.kernels import Kernel, add_noise, ddim_eta, full_renoise, linear_sde
from hasten.accelerators.steering.levels import AlphaSigma, NoisePath
from hasten.benchmarks.mixture import MEAN, VARIANCE, flow_path, sampled, tilted, vp_path

KERNELS = {
    "eta 1": ddim_eta,
    "eta 0.5": partial(ddim_eta, eta=0.5),
    "eta 0": partial(ddim_eta, eta=0.0),
    "linear SDE": linear_sde,
}


def test_the_mixture_has_the_moments_that_the_tests_rely_on() -> None:
    assert tilted(0.0) == pytest.approx((MEAN, VARIANCE, -0.9099), abs=1e-4)
    assert tilted(1.0) == pytest.approx((0.7705, 1.1515, -0.5069), abs=1e-4)
    assert tilted(3.0) == pytest.approx((1.1826, 0.4657, -0.2707), abs=1e-4)


@pytest.mark.parametrize("path", [vp_path, flow_path])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
def test_every_kernel_keeps_the_variance_within_6_percent_at_50_steps(kernel: Kernel, path) -> None:  # type: ignore[no-untyped-def]
    x = sampled(kernel, path(50), 60_000)
    assert float(x.var()) == pytest.approx(VARIANCE, rel=0.06)
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.03)


def test_full_renoising_loses_modes_of_a_model_that_is_not_distilled() -> None:
    assert float(sampled(full_renoise, flow_path(50), 20_000).var()) < 0.75 * VARIANCE


def test_eta_0_is_ddim_and_euler() -> None:
    x, x0 = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    now, then = vp_path(10)[2:4]
    noise = (x - now.alpha * x0) / now.sigma
    step = ddim_eta(x, x0, now, then, eta=0.0)
    torch.testing.assert_close(step.mean, then.alpha * x0 + then.sigma * noise)
    assert step.std == 0 and torch.equal(step.sample(), step.mean)
    now, then = flow_path(10)[2:4]
    velocity = (x - x0) / now.sigma
    torch.testing.assert_close(ddim_eta(x, x0, now, then, eta=0.0).mean, x + (then.sigma - now.sigma) * velocity)


def test_eta_1_is_the_posterior_of_ddpm() -> None:
    x, x0 = torch.randn(2, 5, 3, dtype=torch.float64).unbind()
    now, then = vp_path(10)[2:4]
    beta = 1 - (now.alpha / then.alpha) ** 2
    mean = (then.alpha * beta * x0 + now.alpha / then.alpha * then.sigma**2 * x) / now.sigma**2
    step = ddim_eta(x, x0, now, then)
    torch.testing.assert_close(step.mean, mean)
    assert step.std == pytest.approx(then.sigma / now.sigma * math.sqrt(beta))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=list(KERNELS))
@pytest.mark.parametrize("kind", ["flow", "variance-preserving", "variance-exploding"])
def test_a_kernel_does_the_same_on_every_path_up_to_its_scale(kernel: Kernel, kind: str) -> None:
    x, x0 = torch.randn(2, 4, 2, dtype=torch.float64).unbind()
    flow, other = NoisePath(), NoisePath(kind, top=0.99)
    now, then = (other.at(level) for level in (0.7, 0.4))
    assert now.level == pytest.approx(0.7) and then.level == pytest.approx(0.4)
    into, out = now.alpha + now.sigma, then.alpha + then.sigma
    here, there = kernel(x, x0, flow.at(0.7), flow.at(0.4)), kernel(into * x, x0, now, then)
    torch.testing.assert_close(there.mean, out * here.mean)
    assert there.std == pytest.approx(out * here.std)


@pytest.mark.parametrize("kernel", [*KERNELS.values(), full_renoise])
def test_the_last_step_is_the_estimate_and_draws_nothing(kernel: Kernel) -> None:
    x, x0 = torch.randn(2, 4, 2).unbind()
    step = kernel(x, x0, *flow_path(10)[-2:])
    torch.testing.assert_close(step.mean, x0)
    assert step.std == 0


def test_the_linear_sde_is_the_equation_of_the_paper() -> None:
    x, x0 = torch.randn(2, 4, 2, dtype=torch.float64).unbind()
    t, step = 0.6, 0.1
    velocity = (x - x0) / t
    score = -(x + (1 - t) * velocity) / t
    g = 3 * t**2
    got = linear_sde(x, x0, AlphaSigma(1 - t, t), AlphaSigma(1 - t + step, t - step))
    torch.testing.assert_close(got.mean, x + (-velocity + 0.5 * g**2 * score) * step)
    assert got.std == pytest.approx(g * math.sqrt(step))


@pytest.mark.parametrize("kind", ["flow", "variance-preserving", "variance-exploding"])
def test_noise_that_is_added_leads_exactly_to_the_noisier_level(kind: str) -> None:
    path = NoisePath(kind, top=0.99)
    now, then = path.at(0.12), path.at(0.9)
    step = add_noise(torch.ones(1), now, then)
    ratio = float(step.mean)
    assert ratio * now.alpha == pytest.approx(then.alpha)
    assert (ratio * now.sigma) ** 2 + step.std**2 == pytest.approx(then.sigma**2)
    clean = add_noise(torch.ones(1), path.at(0.0), then)
    assert clean.std == pytest.approx(then.sigma) and float(clean.mean) == pytest.approx(then.alpha)


def test_half_precision_is_computed_in_float32() -> None:
    x = torch.randn(3, 2).half()
    step = ddim_eta(x, x, AlphaSigma(0.3, 0.7), AlphaSigma(0.4, 0.6))
    assert step.mean.dtype == torch.float32
    torch.testing.assert_close(step.mean, ddim_eta(x.float(), x.float(), AlphaSigma(0.3, 0.7), AlphaSigma(0.4, 0.6)).mean)


def test_levels_above_the_top_are_the_top_and_start_scale_is_that_of_the_path() -> None:
    path = NoisePath("variance-exploding", top=0.936)
    assert path.at(1.0) == path.at(0.936) and path.start_scale == pytest.approx(0.936 / 0.064)
    assert NoisePath("variance-preserving", top=0.936).start_scale == NoisePath().start_scale == 1.0
    assert NoisePath().at(0.25) == (0.75, 0.25)


def test_arguments_are_checked() -> None:
    x = torch.zeros(1, 1)
    clean, noisy = AlphaSigma(0.9, 0.1), AlphaSigma(0.1, 0.9)
    with pytest.raises(ValueError, match=r"eta must be from 0 to 1, not 1\.5"):
        ddim_eta(x, x, noisy, clean, eta=1.5)
    with pytest.raises(ValueError, match=r"a step must lead to less noise, not from level 0\.1 to 0\.9"):
        ddim_eta(x, x, clean, noisy)
    with pytest.raises(ValueError, match=r"add_noise goes to more noise, not from level 0\.9 to 0\.1"):
        add_noise(x, noisy, clean)
    with pytest.raises(ValueError, match="norm must be at least 0"):
        linear_sde(x, x, noisy, clean, norm=-1)
    with pytest.raises(ValueError, match="kind must be one of flow, variance-preserving, variance-exploding, not 'vp'"):
        NoisePath("vp")
    with pytest.raises(ValueError, match="top must be below 1 on a variance-exploding path"):
        NoisePath("variance-exploding")
    with pytest.raises(ValueError, match=r"top must be above 0 and at most 1, not 0"):
        NoisePath(top=0)
    with pytest.raises(ValueError, match=r"a noise level must be from 0 to 1, not 1\.2"):
        NoisePath().at(1.2)
