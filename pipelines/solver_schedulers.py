"""Few-step samplers and solvers as schedulers of diffusers: `pipe.scheduler = EVODiffScheduler.from_config(pipe.scheduler.config)`.

Both run variance-preserving models and rectified flows alike, on the timesteps the pipeline's own scheduler would choose, on the published
grid of consistency models, or on a learned one (`grid=`). They compute in float32 at least, whatever the pipeline's dtype.
"""

from __future__ import annotations

import math
import operator
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import betas_for_alpha_bar, rescale_zero_terminal_snr
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from hasten.accelerators.scheduler_hook import hooked
from hasten.accelerators.solvers.evodiff import Interval, correction, first_order, probe_offset
from hasten.accelerators.solvers.gamma import PREDICTIONS, Estimate, checked_gamma, estimate, flow_landing, gamma_step
from hasten.accelerators.steering.levels import AlphaSigma

CLEAN = AlphaSigma(1.0, 0.0)
LEAST_ALPHA = 2**-12
"""What `sigmas` takes for no signal at all, as diffusers' multistep schedulers do: the ratio of noise to signal must be finite."""

_FEW_STEP = ("LCMScheduler", "TCDScheduler", "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_REFUSED = {
    "sigma_data": "the denoiser's inputs and outputs are scaled in another way",
    "snr_shift_scale": "the noise schedule is shifted",
    "invert_sigmas": "sigmas run backwards",
    "scale_factors": "latents grow from step to step",
    "use_beta_sigmas": "the beta spacing is not offered",
}


@dataclass
class SolverSchedulerOutput(BaseOutput):
    """What a step returns.

    Attributes:
        prev_sample: [N, ...], the latents of the next step, in the dtype of those given.
        pred_original_sample: [N, ...], the estimate of the clean sample, in the same dtype.
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


class SolverScheduler(SchedulerMixin, ConfigMixin):
    """What the schedulers below share: the noise schedule, the grid, and the estimate of the clean sample.

    Attributes:
        timesteps: [N], of falling noise, on the device asked for; float32 unless all are whole numbers of a variance-preserving schedule.
        sigmas: float32 [N + 1] on the CPU: the noise level on a flow, noise over signal elsewhere; the last one is where the run ends.
        path: N + 1 coefficients of signal and noise.
        num_inference_steps: Of the present schedule; None before `set_timesteps`.
    """

    _compatibles: ClassVar[list[str]] = [*(scheduler.name for scheduler in KarrasDiffusionSchedulers), *_FEW_STEP]
    order = 1
    init_noise_sigma = 1.0
    _step_index: int | None
    _begin_index: int | None
    _first: int
    spacing_ends: ClassVar[int]
    """Points by which the "linspace" and "leading" grids are longer than the run, as in the schedulers of the same kind in diffusers."""

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Takes over the configuration of a pipeline's present scheduler.

        A configuration without `prediction_type` that has a `shift` is a flow's (the `FlowMatch` schedulers), and so is one with
        `use_flow_sigmas`; that of an LCM or TCD scheduler brings the published grid.

        Args:
            config: Of a scheduler of diffusers or of this module.
            return_unused_kwargs, kwargs: As in diffusers; settings by keyword replace those of the configuration.

        Raises:
            ValueError: A setting is out of range, or means something that is not done here.
        """
        if isinstance(config, Mapping):
            config = _translated(config)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    def _set_up(self) -> None:
        config = self.config
        _check(config)
        self.is_flow: bool = config.prediction_type == "flow_prediction" or bool(config.use_flow_sigmas)
        steps = config.num_train_timesteps
        if not self.is_flow:
            self.alphas_cumprod = torch.cumprod(1 - _betas(config), 0)
            kept = self.alphas_cumprod.double().numpy()
            # The angle of a level is finite where the ratio of noise to signal is not, and is what is interpolated between timesteps.
            self._angles = np.arctan2(np.sqrt(1 - kept), np.sqrt(kept))
        self.num_inference_steps: int | None = None
        self.generator: torch.Generator | list[torch.Generator] | None = None
        times = np.arange(steps, 0, -1) - (not self.is_flow)
        self._adopt(self._shifted(times / steps, None) * steps if self.is_flow and not config.use_dynamic_shifting else times, None)

    @property
    def step_index(self) -> int | None:
        """How far the run has come; None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where the run begins, if the pipeline has said so."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Says at which of `timesteps` the run begins."""
        self._begin_index = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents themselves: nothing is to be scaled."""
        return sample

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The forward process.

        Args:
            original_samples, noise: [N, ...].
            timesteps: [N], or one for all rows; need not be of the schedule.
        """
        times = torch.as_tensor(timesteps).detach().double().cpu().flatten().numpy()
        shape = (-1,) + (1,) * (original_samples.ndim - 1)
        alpha, sigma = (torch.from_numpy(part).float().to(original_samples.device).view(shape) for part in self._coefficients(times))
        return (alpha * _exact(original_samples) + sigma * _exact(noise)).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """The forward process, as flow pipelines call it; arguments as for `add_noise`."""
        return self.add_noise(sample, noise, timestep)

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    @abstractmethod
    def _end(self) -> AlphaSigma:
        """Where every run ends."""

    def _plan(
        self,
        num_inference_steps: int | None,
        device: str | torch.device | None,
        timesteps: Sequence[float] | None,
        sigmas: Sequence[float] | None,
        mu: float | None,
        original_steps: int | None = None,
        strength: float = 1.0,
    ) -> None:
        """Lays out the run: given timesteps are taken as they are, given sigmas are shifted, and a learned grid goes before both sigmas and
        the configured spacing."""
        given = [name for name, value in (("timesteps", timesteps), ("sigmas", sigmas)) if value is not None]
        if len(given) == 2:
            raise ValueError("timesteps and sigmas were both given; pass one of them")
        if timesteps is None:
            timesteps = self.config.grid
        levels = None if sigmas is None else np.asarray(sigmas, dtype=np.float64)
        if levels is not None and len(levels) > 1 and levels[-1] == 0:
            levels = levels[:-1]
        wanted = num_inference_steps if num_inference_steps is not None else None if levels is None else len(levels)
        if wanted is None and timesteps is None:
            raise ValueError("num_inference_steps, timesteps or sigmas must be given")
        steps = _count(wanted if timesteps is None or wanted is not None else len(timesteps))
        total = self.config.num_train_timesteps
        if timesteps is not None:
            if len(timesteps) != steps:
                name = given[0] if given == ["timesteps"] else "grid"
                raise ValueError(f"{name} must have as many entries as num_inference_steps, {steps}, not {len(timesteps)}")
            self._adopt(np.asarray(timesteps, dtype=np.float64), device)
        elif self.is_flow:
            if levels is None:
                levels = self._flow_levels(steps, original_steps, strength)
            elif len(levels) != steps:
                raise ValueError(f"sigmas must have as many entries as num_inference_steps, {steps}, not {len(levels)}")
            levels = self._shifted(levels, mu)
            self._adopt(self._respaced(levels[-1], levels[0], steps, levels) * total, device)
        else:
            if levels is not None:
                if len(levels) != steps:
                    raise ValueError(f"sigmas must have as many entries as num_inference_steps, {steps}, not {len(levels)}")
                self._adopt(self._times_of(levels), device, levels)
                return
            if self.config.use_karras_sigmas or self.config.use_exponential_sigmas:
                ends = [self._ratio(*self._coefficients(np.array([time]))) for time in (0, total - 1)]
                levels = self._respaced(ends[0][0], ends[1][0], steps, np.empty(0))
                self._adopt(self._times_of(levels), device, levels)
                return
            if steps > total:
                raise ValueError(f"num_inference_steps must be at most num_train_timesteps, {total}, not {steps}")
            self._adopt(self._vp_times(steps, original_steps, strength), device)

    def _adopt(self, times: np.ndarray, device: str | torch.device | None, ratios: np.ndarray | None = None) -> None:
        """Makes these the timesteps; on a variance-preserving path noise over signal may be given as well."""
        total = self.config.num_train_timesteps
        low, high = (0, total) if self.is_flow else (-1, total - 1)
        if not len(times) or not (np.diff(times) < 0).all() or not low < times[-1] or not times[0] <= high * (1 + 1e-9):
            listed = ", ".join(f"{time:.6g}" for time in times[:8]) + (", ..." if len(times) > 8 else "")
            floor = "above 0" if self.is_flow else "of at least 0"
            raise ValueError(f"timesteps must fall, {floor} and at most {high}, not {listed or 'be none'}")
        alpha, sigma = self._coefficients(times) if ratios is None else (1 / np.hypot(1, ratios), ratios / np.hypot(1, ratios))
        self.path = [*(AlphaSigma(float(a), float(s)) for a, s in zip(alpha, sigma, strict=True)), self._end()]
        end = np.array([self.path[-1].sigma if self.is_flow else self.path[-1].sigma / self.path[-1].alpha])
        self.sigmas = torch.from_numpy(np.concatenate([sigma if self.is_flow else self._ratio(alpha, sigma), end])).float()
        whole = not self.is_flow and (times == np.round(times)).all()
        self.timesteps = torch.from_numpy(times.astype(np.int64 if whole else np.float32)).to(device)
        self._times = times
        self._step_index = self._begin_index = None

    def _start(self, timestep: Any) -> int:
        """The index of the step to be taken."""
        if self.num_inference_steps is None:
            raise ValueError("set_timesteps must be called before step")
        if self._step_index is None:
            self._step_index = self._index_of(timestep) if self._begin_index is None else self._begin_index
            self._first = self._step_index
        if not 0 <= self._step_index < len(self.timesteps):
            raise ValueError(f"step {self._step_index} was asked for, but the run has {len(self.timesteps)}: call set_timesteps again")
        return self._step_index

    def _index_of(self, timestep: Any) -> int:
        value = torch.as_tensor(timestep).to(self.timesteps.device).flatten()[:1]
        found = (self.timesteps == value).nonzero().flatten()
        if not len(found):
            raise ValueError(f"timestep must be one of the scheduler's timesteps, not {value.item():.6g}")
        return int(found[0])

    def _estimated(self, model_output: Tensor, sample: Tensor, at: AlphaSigma) -> Estimate:
        """The denoiser's estimate, the clean sample kept in bounds if so configured."""
        config = self.config
        given = estimate(_exact(model_output), _exact(sample), at, config.prediction_type)
        x0 = given.x0
        if config.thresholding:
            quantile = torch.quantile(x0.abs().flatten(1), config.dynamic_thresholding_ratio, 1).clamp(1, config.sample_max_value)
            bound = quantile.view(-1, *[1] * (x0.ndim - 1))
            x0 = torch.minimum(torch.maximum(x0, -bound), bound) / bound
        elif config.clip_sample:
            x0 = x0.clamp(-config.clip_sample_range, config.clip_sample_range)
        return Estimate(x0, given.noise)

    def _coefficients(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Signal and noise at timesteps, which may lie between those of the training."""
        if self.is_flow:
            sigma = np.minimum(times / self.config.num_train_timesteps, 1.0)
            return 1 - sigma, sigma
        angles = np.interp(times, np.arange(len(self._angles)), self._angles)
        alpha = np.cos(angles)
        return np.where(alpha < 1e-12, 0.0, alpha), np.sin(angles)

    @staticmethod
    def _ratio(alpha: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        return sigma / np.maximum(alpha, LEAST_ALPHA)

    def _times_of(self, ratios: np.ndarray) -> np.ndarray:
        """Timesteps of noise over signal."""
        if not len(ratios) or not (np.diff(ratios) < 0).all() or not ratios[-1] > 0:
            raise ValueError(f"sigmas must fall and be above 0, not {[round(float(ratio), 6) for ratio in ratios]}")
        return np.interp(np.arctan(ratios), self._angles, np.arange(len(self._angles)))

    def _vp_times(self, steps: int, original_steps: int | None, strength: float) -> np.ndarray:
        config, total = self.config, self.config.num_train_timesteps
        if original_steps is not None:
            return _original(steps, total, original_steps, strength)
        if config.timestep_spacing == "trailing":
            return np.round(np.arange(total, 0, -total / steps))[:steps] - 1
        points = steps + self.spacing_ends
        if config.timestep_spacing == "linspace":
            return np.linspace(0, total - 1, points).round()[::-1][:steps]
        return (np.arange(points) * (total // points))[::-1][:steps] + float(config.steps_offset)

    def _flow_levels(self, steps: int, original_steps: int | None, strength: float) -> np.ndarray:
        config, total = self.config, self.config.num_train_timesteps
        if original_steps is not None:
            return (_original(steps, total, original_steps, strength) + 1) / total
        if config.timestep_spacing == "trailing":
            return np.linspace(1, 0, steps + 1)[:-1]
        low = np.array([1 / total])
        if not (self.spacing_ends or config.use_dynamic_shifting):
            # The flow-matching schedulers of diffusers end at a level that is shifted already, and shift it again.
            low = self._shifted(low, None, stretch=False)
        return np.linspace(1, low[0], steps + self.spacing_ends)[:steps]

    def _shifted(self, levels: np.ndarray, mu: float | None, stretch: bool = True) -> np.ndarray:
        """Noise levels of a flow, shifted for the resolution."""
        config = self.config
        if not len(levels) or levels[-1] <= 0 or levels[0] > 1:
            raise ValueError(f"sigmas of a flow must be above 0 and at most 1, not {[round(float(level), 6) for level in levels]}")
        if config.use_dynamic_shifting:
            if mu is None:
                raise ValueError("mu must be given where use_dynamic_shifting is set")
            shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
        else:
            shift = config.shift
        levels = shift * levels / (1 + (shift - 1) * levels)
        if stretch and config.shift_terminal and levels[-1] < 1:
            levels = 1 - (1 - levels) * (1 - config.shift_terminal) / (1 - levels[-1])
        return levels

    def _respaced(self, low: float, high: float, steps: int, levels: np.ndarray) -> np.ndarray:
        """The same ends in Karras' (arXiv 2206.00364) or in exponential spacing, or the levels as they are."""
        ramp = np.linspace(0, 1, steps)
        if self.config.use_karras_sigmas:
            root = 1 / 7  # rho of 7 is the paper's
            return (high**root + ramp * (low**root - high**root)) ** 7
        if self.config.use_exponential_sigmas:
            return np.exp(math.log(high) + ramp * (math.log(low) - math.log(high)))
        return levels


class GammaScheduler(SolverScheduler):
    """DDIM, TCD, LCM and flow LCM in one (`accelerators.solvers.gamma`).

    With gamma above 0 a step draws noise, from the generator or generators (one a row) that the pipeline hands to `step`. Pipelines of flow
    models hand over none: set `scheduler.generator` for a run that can be repeated.

    Args:
        gamma: From 0 (deterministic: DDIM, Euler) to 1 (LCM). Above 0 for consistency-distilled denoisers only; TCD's default is 0.3.
        num_train_timesteps: Of the training.
        beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: Of a variance-preserving model; "linear",
            "scaled_linear" or "squaredcos_cap_v2".
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        use_flow_sigmas: Whether the path is a rectified flow; None follows `prediction_type`.
        shift, use_dynamic_shifting, time_shift_type, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal: Of a
            flow, as in `FlowMatchEulerDiscreteScheduler`.
        timestep_spacing: "trailing", "linspace" or "leading" (not on a flow), as in `DDIMScheduler` and, on a flow, "linspace" as in
            `FlowMatchEulerDiscreteScheduler`.
        steps_offset: Added to "leading" timesteps.
        original_inference_steps: The grid of the distillation, 50 steps for LCM and TCD, of which the run takes some. None for the spacing.
        grid: Timesteps, falling, of every run that gives none itself, such as learned ones.
        use_karras_sigmas, use_exponential_sigmas: Other spacings.
        clip_sample, clip_sample_range, thresholding, dynamic_thresholding_ratio, sample_max_value: Bounds of the estimated clean sample.
        set_alpha_to_one: Whether the run ends at the clean sample, or at timestep 0 as diffusers' TCD does. A flow ends clean.

    Raises:
        ValueError: A setting is out of range.
    """

    spacing_ends = 0

    @register_to_config
    def __init__(
        self,
        gamma: float = 0.3,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        use_flow_sigmas: bool | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        original_inference_steps: int | None = None,
        grid: Sequence[float] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        set_alpha_to_one: bool = True,
    ) -> None:
        checked_gamma(gamma)
        self._set_up()

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        original_inference_steps: int | None = None,
        timesteps: Sequence[float] | None = None,
        strength: float = 1.0,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares for a run.

        Args:
            num_inference_steps: Steps of the run; may be left out where timesteps or sigmas are given.
            device: Of `timesteps`.
            original_inference_steps: The grid of the distillation for this run.
            timesteps: Falling; taken as they are.
            strength: Share of the distillation's grid that is used, for image-to-image runs.
            sigmas: Falling: levels of a flow before shifting, or noise over signal. A last one of 0 is not a step.
            mu: The shift's logarithm, or the shift, where `use_dynamic_shifting` is set.

        Raises:
            ValueError: A value is out of range, or they do not fit together.
        """
        original = self.config.original_inference_steps if original_inference_steps is None else original_inference_steps
        if original is None and strength != 1:
            raise ValueError(f"strength must be 1 unless original_inference_steps is set, not {strength!r}")
        self._plan(num_inference_steps, device, timesteps, sigmas, mu, original, strength)
        self.num_inference_steps = len(self.timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SolverSchedulerOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: [N, ...], the denoiser's.
            timestep: Where the run begins, in its first step; not read afterwards.
            sample: [N, ...], the latents.
            generator: Of the noise, or one a row.
            return_dict: False gives the output's fields as a tuple.

        Raises:
            ValueError: There is no such step.
        """
        index = self._start(timestep)
        given = self._estimated(model_output, sample, self.path[index])
        moved = gamma_step(given, self._landing(index + 1), self.path[index + 1])
        noise = None
        if moved.std > 0:
            source = self.generator if generator is None else generator
            noise = randn_tensor(moved.mean.shape, generator=source, device=moved.mean.device, dtype=moved.mean.dtype)
        self._step_index = index + 1
        output = SolverSchedulerOutput(moved.sample(noise).to(sample.dtype), given.x0.to(sample.dtype))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def _end(self) -> AlphaSigma:
        if self.is_flow or self.config.set_alpha_to_one:
            return CLEAN
        alpha, sigma = self._coefficients(np.zeros(1))
        return AlphaSigma(float(alpha[0]), float(sigma[0]))

    def _landing(self, index: int) -> AlphaSigma:
        """Where the step to `path[index]` touches down."""
        gamma, then = self.config.gamma, self.path[index]
        if gamma == 0 or index == len(self.timesteps):
            return then
        if self.is_flow:
            return flow_landing(then, gamma)
        if gamma == 1:
            return self._end()
        # Whole timesteps, in single precision: where the product is a whole number, rounding decides, and this is how TCD rounds.
        time = math.floor(np.float32(1 - gamma) * np.float32(self._times[index]))
        alpha, sigma = self._coefficients(np.array([float(time)]))
        return AlphaSigma(float(alpha[0]), float(sigma[0]))


class EVODiffScheduler(SolverScheduler):
    """EVODiff (`accelerators.solvers.evodiff`): data prediction, one denoiser call a step, no noise drawn.

    What it corrects is what the pipeline hands back: latents that were masked or moved between two steps stay so.

    Args:
        solver_order: 2, or 1, which is DDIM (Euler on a flow).
        disable_corrector: Steps whose interval is not corrected.
        lower_order_final: Whether the last step is of first order; a step to the clean sample always is.
        final_sigmas_type: "zero" ends at the clean sample, "sigma_min" at timestep 0 (not on a flow).
        short_run: Most steps of a run that is corrected as a short one; 20 in the authors' code.
        balanced: Whether differences of estimates are balanced as published. Without, constant estimates are integrated exactly. None is
            as published, except on a flow: where the noise falls to 0 evenly, the balanced error does not vanish with many steps.
        timestep_spacing: "trailing", "linspace" or "leading" (not on a flow), as in `UniPCMultistepScheduler`.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr, prediction_type, use_flow_sigmas,
        shift, use_dynamic_shifting, time_shift_type, base_shift, max_shift, base_image_seq_len, max_image_seq_len, shift_terminal,
        steps_offset, grid, use_karras_sigmas, use_exponential_sigmas, clip_sample, clip_sample_range, thresholding,
        dynamic_thresholding_ratio, sample_max_value: As for `GammaScheduler`.

    Attributes:
        model_outputs: Up to 2 [N, ...], the last estimates of the clean sample.

    Raises:
        ValueError: A setting is out of range.
    """

    spacing_ends = 1

    @register_to_config
    def __init__(
        self,
        solver_order: int = 2,
        disable_corrector: Sequence[int] = (),
        lower_order_final: bool = True,
        final_sigmas_type: str = "zero",
        short_run: int = 20,
        balanced: bool | None = None,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        use_flow_sigmas: bool | None = None,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        timestep_spacing: str = "trailing",
        steps_offset: int = 0,
        grid: Sequence[float] | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
    ) -> None:
        if solver_order not in (1, 2):
            raise ValueError(f"solver_order must be 1 or 2, not {solver_order!r}")
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', not {final_sigmas_type!r}")
        self.model_outputs: list[Tensor] = []
        self._interval: Interval | None = None
        self._set_up()
        if self.is_flow and final_sigmas_type == "sigma_min":
            raise ValueError("final_sigmas_type must be 'zero' on a flow, which has no least sigma, not 'sigma_min'")

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Prepares for a run; arguments and errors as for `GammaScheduler.set_timesteps`."""
        self._plan(num_inference_steps, device, timesteps, sigmas, mu)
        self.num_inference_steps = len(self.timesteps)
        self.model_outputs, self._interval = [], None

    def step(
        self, model_output: Tensor, timestep: float | Tensor, sample: Tensor, return_dict: bool = True
    ) -> SolverSchedulerOutput | tuple[Tensor, Tensor]:
        """Corrects the last interval with what the denoiser said of its end, and predicts the next one.

        Args:
            model_output: [N, ...], the denoiser's.
            timestep: Where the run begins, in its first step; not read afterwards.
            sample: [N, ...], the latents.
            return_dict: False gives the output's fields as a tuple.

        Raises:
            ValueError: There is no such step.
        """
        index = self._start(timestep)
        now, then = self.path[index], self.path[index + 1]
        latents, x0 = _exact(sample), self._estimated(model_output, sample, now).x0
        if self._interval is not None:
            latents = latents + correction(x0, self.model_outputs[-1], self.model_outputs[-2], self._interval)
        moved, self._interval = first_order(latents, x0, now, then), None
        last = index == len(self.timesteps) - 1
        if self.config.solver_order == 2 and self.model_outputs and then.sigma > 0 and not (last and self.config.lower_order_final):
            balanced = not self.is_flow if self.config.balanced is None else self.config.balanced
            interval = Interval(self.path[index - 1], now, then, self._progress(index + 1), self._short, balanced)
            moved = moved + probe_offset(x0, self.model_outputs[-1], interval)
            if index not in self.config.disable_corrector:
                self._interval = interval
        self.model_outputs = [*self.model_outputs[-1:], x0]
        self._step_index = index + 1
        output = SolverSchedulerOutput(moved.to(sample.dtype), x0.to(sample.dtype))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    @property
    def _short(self) -> bool:
        return len(self.timesteps) <= self.config.short_run

    def _progress(self, index: int) -> float:
        """From 1 where the run begins to 0 where it ends, at the noise level on a flow and the timestep elsewhere."""
        shift = 0 if self.is_flow else 1
        return float(self._times[index] + shift) / float(self._times[self._first] + shift) if index < len(self._times) else 0.0

    def _end(self) -> AlphaSigma:
        if self.is_flow or self.config.final_sigmas_type == "zero":
            return CLEAN
        alpha, sigma = self._coefficients(np.zeros(1))
        return AlphaSigma(float(alpha[0]), float(sigma[0]))


@dataclass
class Recording:
    """A run as `accelerators.solvers.grids` reads it.

    Attributes:
        states: M + 1 tensors [N, ...], the latents before each step, and after the last one.
        x0: M tensors [N, ...], the estimates of the clean sample.
        path: M + 1 coefficients.
        timesteps: M timesteps: those of a learned grid are its nodes but the last.
    """

    states: list[Tensor] = field(default_factory=list)
    x0: list[Tensor] = field(default_factory=list)
    path: list[AlphaSigma] = field(default_factory=list)
    timesteps: list[float] = field(default_factory=list)

    def timesteps_of(self, grid: Sequence[int]) -> list[float]:
        """The timesteps of a grid of nodes, to be given to a scheduler."""
        return [self.timesteps[node] for node in grid[:-1]]


class _Recorder:
    def __init__(self, recording: Recording) -> None:
        self.recording = recording

    def timesteps_set(self, scheduler: Any) -> None:
        """Called when a run begins: only the last one is kept."""
        recording = self.recording
        recording.states, recording.x0 = [], []
        recording.path, recording.timesteps = list(scheduler.path), [float(time) for time in scheduler.timesteps]

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """Nothing to record."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """Called when a step is done."""
        recording, at = self.recording, scheduler.path[scheduler.step_index - 1]
        recording.states.append(_exact(sample))
        recording.x0.append(scheduler._estimated(model_output, sample, at).x0)
        if len(recording.x0) == len(recording.timesteps):
            recording.states.append(first_order(recording.states[-1], recording.x0[-1], at, recording.path[-1]))

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        """Rows have moved, and their past goes with them."""
        self.recording.states = [state[index] for state in self.recording.states]
        self.recording.x0 = [x0[index] for x0 in self.recording.x0]


@contextmanager
def recorded(scheduler: SolverScheduler) -> Iterator[Recording]:
    """Records the last run of a scheduler, for a learned grid.

        pipe.scheduler = GammaScheduler.from_config(pipe.scheduler.config, gamma=0)
        with recorded(pipe.scheduler) as run:
            pipe(prompts, num_inference_steps=50)
        grid = run.timesteps_of(learned_grid(first_order_errors(run.states, run.x0, run.path), 8))
        pipe.scheduler = GammaScheduler.from_config(pipe.scheduler.config, grid=grid)

    Args:
        scheduler: A deterministic first-order one of this module: what lies between the steps of another is not its run.

    Raises:
        ValueError: The scheduler is another.
    """
    plain = isinstance(scheduler, GammaScheduler) and scheduler.config.gamma == 0
    if not plain and not (isinstance(scheduler, EVODiffScheduler) and scheduler.config.solver_order == 1):
        kind = type(scheduler).__name__
        raise ValueError(f"scheduler must be a GammaScheduler of gamma 0 or an EVODiffScheduler of solver_order 1, not this {kind}")
    recording = Recording()
    with hooked(scheduler, _Recorder(recording)):
        yield recording


def _translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the words of this module."""
    # diffusers takes the new class's defaults for values the old one had by default, though the two differ (in the betas, say).
    settings = {name: value for name, value in config.items() if name != "_use_default_values"}
    for name, meaning in _REFUSED.items():
        value = settings.get(name)
        if value is True or value not in (None, False, 1.0):
            raise ValueError(f"a scheduler with {name} {value!r} cannot be replaced: {meaning}")
    if "shift" in settings and not {"prediction_type", "beta_start"} & set(settings):
        settings = {"timestep_spacing": "linspace", **settings, "prediction_type": "flow_prediction"}
    if settings.get("use_flow_sigmas") and "flow_shift" in settings and not {"gamma", "short_run"} & set(settings):
        settings["shift"] = settings["flow_shift"]  # the multistep solvers' name; configurations of this module may still carry it
    return settings


def _check(config: Any) -> None:
    if config.prediction_type not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, not {config.prediction_type!r}")
    flow = config.prediction_type == "flow_prediction"
    if config.use_flow_sigmas is False and flow:
        raise ValueError("use_flow_sigmas must be True or None where prediction_type is 'flow_prediction', not False")
    if config.use_flow_sigmas and config.prediction_type == "v_prediction":
        raise ValueError("prediction_type must not be 'v_prediction' where use_flow_sigmas is set")
    if config.timestep_spacing not in ("trailing", "linspace", "leading"):
        raise ValueError(f"timestep_spacing must be 'trailing', 'linspace' or 'leading', not {config.timestep_spacing!r}")
    if config.timestep_spacing == "leading" and (flow or config.use_flow_sigmas):
        raise ValueError("timestep_spacing must be 'trailing' or 'linspace' on a flow, which begins at pure noise, not 'leading'")
    if config.time_shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type must be 'exponential' or 'linear', not {config.time_shift_type!r}")
    if type(config.num_train_timesteps) is not int or config.num_train_timesteps < 1:
        raise ValueError(f"num_train_timesteps must be a whole number of at least 1, not {config.num_train_timesteps!r}")
    if not config.shift > 0:
        raise ValueError(f"shift must be above 0, not {config.shift!r}")
    if config.use_karras_sigmas and config.use_exponential_sigmas:
        raise ValueError("use_karras_sigmas and use_exponential_sigmas exclude each other")


def _betas(config: Any) -> Tensor:
    total = config.num_train_timesteps
    if config.trained_betas is not None:
        betas = torch.tensor(config.trained_betas, dtype=torch.float32)
        if betas.shape != (total,):
            raise ValueError(f"trained_betas must have num_train_timesteps entries, {total}, not {len(betas)}")
    elif config.beta_schedule == "linear":
        betas = torch.linspace(config.beta_start, config.beta_end, total)
    elif config.beta_schedule == "scaled_linear":
        betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, total) ** 2
    elif config.beta_schedule == "squaredcos_cap_v2":
        betas = betas_for_alpha_bar(total)
    else:
        raise ValueError(f"beta_schedule must be 'linear', 'scaled_linear' or 'squaredcos_cap_v2', not {config.beta_schedule!r}")
    return rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas


def _original(steps: int, total: int, original_steps: int, strength: float) -> np.ndarray:
    """The grid of LCM (arXiv 2310.04378) and TCD: evenly spread over the distillation's own, noisiest first."""
    if not 1 <= original_steps <= total:
        raise ValueError(f"original_inference_steps must be from 1 to num_train_timesteps, {total}, not {original_steps!r}")
    used = int(original_steps * strength)
    if not 1 <= steps <= used:
        share = "" if strength == 1 else f" x strength, {original_steps} x {strength:g}"
        raise ValueError(f"num_inference_steps must be at most original_inference_steps{share}, {used}, not {steps}")
    distilled = np.arange(used, 0, -1) * (total // original_steps) - 1
    return distilled[np.floor(np.linspace(0, used, steps, endpoint=False)).astype(np.int64)].astype(np.float64)


def _count(steps: Any) -> int:
    if isinstance(steps, bool) or not hasattr(steps, "__index__") or operator.index(steps) < 1:
        raise ValueError(f"num_inference_steps must be a whole number of at least 1, not {steps!r}")
    return operator.index(steps)


def _exact(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
