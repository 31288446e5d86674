"""The gamma sampler: strategic stochastic sampling of Trajectory Consistency Distillation (arXiv 2402.19159), on any path.

A step jumps deterministically past its target to a cleaner landing, then noises forward to the target. Where the landing is the target
itself (gamma 0) that is DDIM, and Euler on a flow; where it is the clean sample (gamma 1) it is the sampler of latent consistency models.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from torch import Tensor

from hasten.accelerators.steering.kernels import Transition
from hasten.accelerators.steering.levels import AlphaSigma

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")
"""What a denoiser's output may be: the noise, the velocity of a variance-preserving path, the clean sample, or noise minus sample."""


class Estimate(NamedTuple):
    """What a denoiser's output says about the latents it was given."""

    x0: Tensor  # [N, ...] the clean sample
    noise: Tensor  # [N, ...] the noise


def estimate(output: Tensor, latents: Tensor, at: AlphaSigma, prediction_type: str) -> Estimate:
    """Splits latents into sample and noise.

    Args:
        output: [N, ...] the denoiser's; its dtype, and that of `latents`, is what is computed in.
        latents: [N, ...] that the denoiser was given, at `at`.
        at: Coefficients of the latents.
        prediction_type: One of `PREDICTIONS`. "v_prediction" means alpha^2 + sigma^2 = 1 and "flow_prediction" alpha + sigma = 1.

    Raises:
        ValueError: There is no such type, or the output says nothing of the sample: a noise prediction where there is noise only.
    """
    if prediction_type == "flow_prediction":
        return Estimate(latents - at.sigma * output, latents + at.alpha * output)
    if prediction_type == "v_prediction":
        return Estimate(at.alpha * latents - at.sigma * output, at.alpha * output + at.sigma * latents)
    if prediction_type == "sample":
        return Estimate(output, (latents - at.alpha * output) / at.sigma)
    if prediction_type == "epsilon":
        if at.alpha == 0:
            raise ValueError("prediction_type 'epsilon' gives no sample where there is noise only (alpha 0): start at a lower noise level")
        return Estimate((latents - at.sigma * output) / at.alpha, output)
    raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {prediction_type!r}")


def gamma_step(given: Estimate, landing: AlphaSigma, then: AlphaSigma) -> Transition:
    """The step to `then` by way of `landing`.

    Only a consistency-distilled denoiser should be given a landing cleaner than the target: the noise of a step does not vanish as steps
    become many, so that on any other denoiser modes are lost (on a mixture of variance 2.22, 50 steps: 2.13 at gamma 0, 1.45 at 1).

    Args:
        given: The estimate at the present level.
        landing: At least as clean as `then`.
        then: Where the step leads.

    Raises:
        ValueError: The landing is noisier than the target.
    """
    if landing.sigma * then.alpha > landing.alpha * then.sigma * (1 + 1e-9):  # the same level may have been rounded twice
        raise ValueError(f"the landing must not be noisier than the target, level {then.level:.4g}, as level {landing.level:.4g} is")
    ratio = then.alpha / landing.alpha
    std = math.sqrt(max(0.0, then.sigma**2 - (ratio * landing.sigma) ** 2))
    return Transition(then.alpha * given.x0 + ratio * landing.sigma * given.noise, std)


def flow_landing(then: AlphaSigma, gamma: float) -> AlphaSigma:
    """The landing on a flow: the noise level (1 - gamma) * sigma.

    Raises:
        ValueError: `gamma` is not from 0 to 1.
    """
    sigma = (1 - checked_gamma(gamma)) * then.sigma
    return AlphaSigma(1 - sigma, sigma)


def checked_gamma(gamma: float) -> float:
    """The gamma that was given.

    Raises:
        ValueError: It is not a number from 0 to 1.
    """
    if isinstance(gamma, bool) or not isinstance(gamma, int | float) or not 0 <= gamma <= 1:
        raise ValueError(f"gamma must be a number from 0 (DDIM) to 1 (LCM), not {gamma!r}")
    return gamma
