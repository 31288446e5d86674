"""The gamma sampler against the steps it generalises, and what its noise does to a model that is not distilled."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.solvers.gamma import PREDICTIONS, Estimate, checked_gamma, estimate, flow_landing, gamma_step
from hasten.accelerators.steering.kernels import ddim_eta, full_renoise
from hasten.accelerators.steering.levels import AlphaSigma
from hasten.benchmarks.mixture import VARIANCE, denoised, flow_path, vp_path


def vp(angle: float) -> AlphaSigma:
    return AlphaSigma(math.cos(angle), math.sin(angle))


def even(level: float) -> AlphaSigma:
    return AlphaSigma(1 - level, level)


@given(st.sampled_from(PREDICTIONS), st.floats(0.05, 0.95), st.integers(0, 99))
def test_every_prediction_gives_back_the_sample_and_the_noise_that_were_mixed(kind: str, level: float, seed: int) -> None:
    x0, noise = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for at in (even(level), vp(level * math.pi / 2)):
        outputs = {"epsilon": noise, "sample": x0}
        if at == even(level):
            outputs["flow_prediction"] = noise - x0
        else:
            outputs["v_prediction"] = at.alpha * noise - at.sigma * x0
        if kind in outputs:
            found = estimate(outputs[kind], at.alpha * x0 + at.sigma * noise, at, kind)
            torch.testing.assert_close(found, Estimate(x0, noise), rtol=1e-9, atol=1e-9)


@given(st.floats(0, 1), st.floats(0.01, 0.99), st.booleans())
def test_a_step_keeps_the_forward_process(gamma: float, level: float, on_flow: bool) -> None:
    """With the true sample and noise, the outcome has the mean and the standard deviation of the forward process at the target."""
    x0, noise = torch.tensor([1.3], dtype=torch.float64), torch.tensor([-0.4], dtype=torch.float64)
    then = even(level) if on_flow else vp(level * math.pi / 2)
    landing = flow_landing(then, gamma) if on_flow else vp((1 - gamma) * level * math.pi / 2)
    step = gamma_step(Estimate(x0, noise), landing, then)
    kept = float((step.mean - then.alpha * x0) / noise)
    assert kept**2 + step.std**2 == pytest.approx(then.sigma**2, abs=1e-12)
    assert kept == pytest.approx(then.alpha / landing.alpha * landing.sigma, abs=1e-12)


@pytest.mark.parametrize("path", [vp_path(10), flow_path(10)], ids=["vp", "flow"])
def test_gamma_0_is_ddim_and_gamma_1_renoises_in_full(path: list[AlphaSigma]) -> None:
    x, x0 = torch.randn(2, 4, 3, dtype=torch.float64).unbind()
    now, then = path[3:5]
    given = Estimate(x0, (x - now.alpha * x0) / now.sigma)
    ddim, lcm = gamma_step(given, then, then), gamma_step(given, AlphaSigma(1.0, 0.0), then)
    torch.testing.assert_close(ddim.mean, ddim_eta(x, x0, now, then, eta=0.0).mean)
    assert ddim.std == 0
    torch.testing.assert_close(lcm.mean, full_renoise(x, x0, now, then).mean)
    assert lcm.std == then.sigma


def test_gamma_is_biased_on_a_model_that_is_not_distilled() -> None:
    """The variances that the docstring states: 50 steps of a flow."""
    generator = torch.Generator().manual_seed(0)
    spread = {}
    for gamma in (0.0, 0.3, 1.0):
        x = torch.randn(20_000, generator=generator, dtype=torch.float64)
        for now, then in pairwise(flow_path(50)):
            x0 = denoised(x, now)
            step = gamma_step(Estimate(x0, (x - now.alpha * x0) / now.sigma), flow_landing(then, gamma), then)
            x = step.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
        spread[gamma] = float(x.var())
    assert spread[0.0] == pytest.approx(2.13, abs=0.06)
    assert spread[0.3] == pytest.approx(1.91, abs=0.06)
    assert spread[1.0] == pytest.approx(1.45, abs=0.06)
    assert spread[0.0] == pytest.approx(VARIANCE, rel=0.06)


def test_what_cannot_be_done_is_refused_in_one_line() -> None:
    x = torch.zeros(1)
    with pytest.raises(ValueError, match=r"^prediction_type 'epsilon' gives no sample where there is noise only.*$"):
        estimate(x, x, AlphaSigma(0.0, 1.0), "epsilon")
    with pytest.raises(ValueError, match=r"^prediction_type must be one of epsilon, .*, not 'noise'$"):
        estimate(x, x, even(0.5), "noise")
    with pytest.raises(ValueError, match=r"^the landing must not be noisier than the target, level 0.4, as level 0.5 is$"):
        gamma_step(Estimate(x, x), even(0.5), even(0.4))
    for gamma in (-0.1, 1.1, True, None, "0.3", math.nan):
        with pytest.raises(ValueError, match=r"^gamma must be a number from 0 \(DDIM\) to 1 \(LCM\), not .*$"):
            checked_gamma(gamma)  # type: ignore[arg-type]
