"""What every distillation loss stands on: the grid of noise levels that the teacher's solver walks, and exact moves between its nodes.

Node 0 is the clean sample and node N is where sampling begins. All coefficients belong to rows, so that the rows of a batch may be at
different nodes. Everything is computed in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.solvers.gamma import PREDICTIONS, Estimate


class Denoiser(Protocol):
    """A denoiser with its adapters on (the student) or off (the teacher)."""

    def __call__(self, latents: Tensor, timesteps: Tensor, conditions: Any) -> Tensor:
        """The prediction [B, ...] for latents [B, ...] at timesteps [B]; the conditions are handed on as they are."""
        ...


class Conditions(NamedTuple):
    """What the denoiser is told about each row.

    Attributes:
        told: The prompt's encoding, in whatever form the denoiser takes it.
        untold: That of the empty prompt, row for row; None where the teacher knows no guidance, or has it embedded.
    """

    told: Any
    untold: Any | None = None


@dataclass(frozen=True)
class Grid:
    """N + 1 noise levels.

    Attributes:
        timesteps: [N + 1], rising, as the denoiser is told; the entry of the clean sample is never told.
        alpha: [N + 1] float64 coefficients of the signal.
        sigma: [N + 1] float64 coefficients of the noise, 0 at node 0.
        prediction_type: One of `PREDICTIONS` in `accelerators.solvers.gamma`.
        scale: What the denoiser is told of one whole training: 1000 timesteps, or 1 where it is told the noise level of a flow.

    Raises:
        ValueError: The lengths differ, the levels do not rise from none, the prediction type is unknown, or a noise prediction is to be
            read where there is no signal.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    prediction_type: str
    scale: float = 1000.0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {self.prediction_type!r}")
        if not self.timesteps.shape == self.alpha.shape == self.sigma.shape or self.alpha.ndim != 1 or len(self.alpha) < 2:
            shapes = [list(part.shape) for part in (self.timesteps, self.alpha, self.sigma)]
            raise ValueError(f"timesteps, alpha and sigma must all be [N + 1] with N of at least 1, not {shapes}")
        level = self.sigma / (self.alpha + self.sigma)
        if level[0] != 0 or not (level.diff() > 0).all():
            raise ValueError(f"noise levels must rise from 0, not be {[round(float(one), 4) for one in level[:8]]}")
        if self.prediction_type == "epsilon" and float(self.alpha.min()) <= 0:
            raise ValueError("prediction_type 'epsilon' gives no sample where there is noise only (alpha 0): begin at a lower noise level")

    @classmethod
    def variance_preserving(cls, alphas_cumprod: Tensor, steps: int, prediction_type: str = "epsilon", top: int | None = None) -> Grid:
        """Even timesteps of a variance-preserving schedule.

        Args:
            alphas_cumprod: [T] of the training, from clean to noisy.
            steps: N.
            prediction_type: "epsilon", "v_prediction" or "sample".
            top: The timestep of node N: T - 1 by default. With noise predictions lower is better for one step: what a float rounds away in
                the prediction is multiplied by sigma over alpha, 157 at the last timestep of the usual linear schedule and 17 at 749.

        Raises:
            ValueError: `top` is no timestep of the schedule, or there are more steps than timesteps up to it.
        """
        top = len(alphas_cumprod) - 1 if top is None else top
        check_whole(1, steps=steps)
        if type(top) is not int or not 0 <= top < len(alphas_cumprod):
            raise ValueError(f"top must be a timestep from 0 to {len(alphas_cumprod) - 1}, not {top!r}")
        if steps > top + 1:
            raise ValueError(f"steps must be at most the number of timesteps up to top, {top + 1}, not {steps}")
        times = torch.round(torch.arange(steps + 1, dtype=torch.float64) * (top + 1) / steps).long() - 1
        kept = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod.double().cpu()[times[1:]]])
        return cls(times.clamp(min=0), kept.sqrt(), (1 - kept).sqrt(), prediction_type, float(len(alphas_cumprod)))

    @classmethod
    def flow(cls, steps: int, shift: float = 1.0, scale: float = 1000.0, top: float = 1.0) -> Grid:
        """Even levels of a rectified flow, shifted for the resolution.

        Args:
            steps: N.
            shift: As in diffusers' flow schedulers.
            scale: Timesteps are the noise level times this.
            top: The noise level before the shift of node N.

        Raises:
            ValueError: A value is out of range.
        """
        check_whole(1, steps=steps)
        if not (shift > 0 and scale > 0 and 0 < top <= 1):
            raise ValueError(f"shift and scale must be above 0 and top above 0 and at most 1, not {shift!r}, {scale!r} and {top!r}")
        level = top * torch.arange(steps + 1, dtype=torch.float64) / steps
        sigma = shift * level / (1 + (shift - 1) * level)
        return cls(scale * sigma, 1 - sigma, sigma, "flow_prediction", scale)

    @property
    def steps(self) -> int:
        """N."""
        return len(self.alpha) - 1

    def at(self, index: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha and sigma of nodes [B], shaped to multiply `like` [B, ...]."""
        shape = (-1, *[1] * (like.ndim - 1))
        return tuple(table.to(like.device)[index].to(like.dtype).view(shape) for table in (self.alpha, self.sigma))  # type: ignore[return-value]

    def times(self, index: Tensor) -> Tensor:
        """What the denoiser is told at nodes [B]."""
        return self.timesteps.to(index.device)[index]

    def thousandths(self, index: Tensor) -> Tensor:
        """Time at nodes [B] in thousandths of the training, 0 where the sample is clean."""
        return torch.where(index == 0, 0.0, 1000.0 / self.scale * self.times(index).double())

    def noised(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """The forward process from clean samples [B, ...] to nodes [B]; at node N there is noise alone, as when sampling begins."""
        x0, noise = exact(x0), exact(noise)
        alpha, sigma = self.at(index, x0)
        top = (index == self.steps).view(alpha.shape)
        return torch.where(top, noise, alpha * x0 + sigma * noise)

    def renoised(self, latents: Tensor, index: Tensor, to: Tensor, noise: Tensor) -> Tensor:
        """The forward process between nodes, exactly: latents [B, ...] at nodes [B], carried to nodes [B] at least as noisy.

        Raises:
            ValueError: A row would have to lose noise.
        """
        if (to < index).any():
            raise ValueError("noise can only be added: each of `to` must be at least the node in `index`")
        latents = exact(latents)
        (alpha, sigma), (alpha_to, sigma_to) = self.at(index, latents), self.at(to, latents)
        ratio = alpha_to / alpha
        return ratio * latents + (sigma_to.square() - (ratio * sigma).square()).clamp(min=0).sqrt() * noise.to(latents)

    def estimate(self, output: Tensor, latents: Tensor, index: Tensor) -> Estimate:
        """Splits latents [B, ...] at nodes [B] into clean sample and noise by the denoiser's output [B, ...]."""
        output, latents = exact(output), exact(latents)
        alpha, sigma = self.at(index, latents)
        if self.prediction_type == "flow_prediction":
            return Estimate(latents - sigma * output, latents + alpha * output)
        if self.prediction_type == "v_prediction":
            return Estimate(alpha * latents - sigma * output, alpha * output + sigma * latents)
        if self.prediction_type == "sample":
            return Estimate(output, (latents - alpha * output) / sigma)
        return Estimate((latents - sigma * output) / alpha, output)

    def jump(self, given: Estimate, to: Tensor) -> Tensor:
        """The deterministic step (DDIM, Euler) to nodes [B]."""
        alpha, sigma = self.at(to, given.x0)
        return alpha * given.x0 + sigma * given.noise

    def segment_start(self, index: Tensor, segments: int) -> Tensor:
        """The clean end [B] of the segment that the step from nodes [B], of at least 1, to the next cleaner one lies in.

        Raises:
            ValueError: There are more segments than steps.
        """
        if not 1 <= segments <= self.steps:
            raise ValueError(f"segments must be from 1 to the grid's steps, {self.steps}, not {segments}")
        ends = torch.arange(segments, device=index.device) * self.steps // segments
        return ends[torch.searchsorted(ends, index - 1, right=True) - 1]


def exact(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
