"""Where a diffusers scheduler stands: the coefficients of signal and noise at each of its steps, and the clean sample behind a prediction.

Schedulers keep this in three forms: a flow's sigmas, variance-preserving tables (by timestep or by sigma), and the latents of k-diffusion,
which are clean sample plus sigma times noise. A scheduler of none of these is refused rather than guessed at.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.steering.controller import SteeringError
from hasten.accelerators.steering.levels import AlphaSigma

CLEAN = AlphaSigma(1.0, 0.0)

SCALED = frozenset({
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "DPMSolverSDEScheduler",
})  # fmt: skip
"""Schedulers whose latents are clean sample plus sigma times noise."""
FLOWS = frozenset({
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "LTXEulerAncestralRFScheduler",
})  # fmt: skip
DRAWING = frozenset({
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "FlowMatchLCMScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "LCMScheduler",
    "LTXEulerAncestralRFScheduler",
    "SASolverScheduler",
})  # fmt: skip
"""Schedulers that draw noise at their steps however they are configured."""


@dataclass(frozen=True)
class SchedulerLevels:
    """A scheduler's noise levels.

    Args:
        scheduler: Of one of diffusers' families.

    Attributes:
        kind: "flow", "variance-preserving" or "variance-exploding", as in `NoisePath`.
        prediction: "epsilon", "v_prediction", "sample" or "flow".

    Raises:
        SteeringError: Its family is not known.
    """

    scheduler: Any

    def __post_init__(self) -> None:
        _ = self.kind, self.prediction

    @property
    def name(self) -> str:
        """The class."""
        return type(self.scheduler).__name__

    @property
    def kind(self) -> str:
        config = self.scheduler.config
        flowing = config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
        if (flowing or self.name in FLOWS) and not config.get("invert_sigmas"):
            return "flow"
        if hasattr(self.scheduler, "alphas_cumprod") and self.name not in ("UnCLIPScheduler", "RePaintScheduler"):
            return "variance-exploding" if self.name in SCALED else "variance-preserving"
        raise SteeringError(
            f"no rule gives the clean sample behind a prediction of {self.name}; use DDIM, DPM-Solver++, UniPC, Euler or a flow scheduler "
            "(`pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)`)"
        )

    @property
    def prediction(self) -> str:
        found = "flow_prediction" if self.kind == "flow" else self.scheduler.config.get("prediction_type", "epsilon")
        if found not in ("epsilon", "v_prediction", "sample", "flow_prediction"):
            raise SteeringError(f"no rule gives the clean sample behind a prediction of type {found!r} ({self.name})")
        return "flow" if found == "flow_prediction" else str(found)

    @property
    def draws_noise(self) -> bool:
        """Whether the scheduler's own steps draw noise, as it is configured; the argument `eta` of a call may make DDIM's do so too."""
        config = self.scheduler.config
        drawing = str(config.get("algorithm_type", "")).startswith("sde-") or bool(config.get("stochastic_sampling"))
        return self.name in DRAWING or drawing or float(config.get("gamma") or 0) > 0

    def steps(self, begin: int = 0) -> int:
        """Completed steps from call `begin` of `step` to the end; the two calls of a Heun-like step are one."""
        return math.ceil((len(self.scheduler.timesteps) - begin) / self.order)

    @property
    def order(self) -> int:
        """Calls of `step` in a completed step."""
        return max(1, int(getattr(self.scheduler, "order", 1)))

    def at(self, call: int) -> AlphaSigma:
        """Coefficients before call number `call` of `step`; after the last one the sample is clean."""
        timesteps = self.scheduler.timesteps
        if call >= len(timesteps):
            return CLEAN
        sigmas = getattr(self.scheduler, "sigmas", None)
        if sigmas is None:
            return self.at_timestep(timesteps[call])
        return self.of_sigma(float(sigmas[call]))

    def of_sigma(self, sigma: float) -> AlphaSigma:
        """Coefficients for an entry of the scheduler's table of sigmas."""
        if self.kind == "flow":
            return AlphaSigma(1 - sigma, sigma)
        if self.kind == "variance-exploding":
            return AlphaSigma(1.0, sigma)
        alpha = 1 / math.sqrt(1 + sigma * sigma)
        return AlphaSigma(alpha, sigma * alpha)

    def at_timestep(self, timestep: Any) -> AlphaSigma:
        """Variance-preserving coefficients at a timestep of training."""
        table = self.scheduler.alphas_cumprod
        kept = float(table[min(max(int(timestep), 0), len(table) - 1)])
        return AlphaSigma(math.sqrt(kept), math.sqrt(1 - kept))

    def clean(self, model_output: Tensor, sample: Tensor, now: AlphaSigma) -> Tensor:
        """The estimate [N, ...] of the clean sample in at least float32, from the guided prediction and the latents [N, ...] at `now`."""
        if model_output.shape[1:2] == (2 * sample.shape[1],) and model_output.ndim == sample.ndim:
            model_output = model_output.chunk(2, 1)[0]  # the other half is a learned variance
        output, latents = (t if t.dtype == torch.float64 else t.float() for t in (model_output, sample))
        alpha, sigma = now
        if self.prediction == "sample":
            x0 = output
        elif self.prediction == "flow":
            x0 = latents - sigma * output
        elif self.kind == "variance-exploding":
            length = math.sqrt(1 + sigma * sigma)
            x0 = latents - sigma * output if self.prediction == "epsilon" else latents / length**2 - sigma / length * output
        elif self.prediction == "epsilon":
            x0 = (latents - sigma * output) / alpha
        else:
            x0 = alpha * latents - sigma * output
        config = self.scheduler.config
        if config.get("thresholding"):
            thresholded: Tensor = self.scheduler._threshold_sample(x0)
            return thresholded
        if config.get("clip_sample"):
            limit = float(config.get("clip_sample_range") or 1.0)
            return x0.clamp(-limit, limit)
        return x0
