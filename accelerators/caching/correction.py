"""Closed-form corrections of a reused value: for every step and channel the scale and shift that bring it closest to the true one.

The cache half of CacheQuant's decoupled error correction (arXiv 2503.01323, section 3.4 of its specification), and the same least
squares for what quantisation does to a layer's output. Nothing is trained: means, variances and covariances are streamed, then solved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.caching.plan import ALL_BRANCHES

VARIANCE_FLOOR = 1e-12
"""A channel that varies less than this has no slope: it is only shifted."""


@dataclass(frozen=True, eq=False)
class AffineCorrection:
    """`true ≈ scale[step] * approximate + shift[step]`, channel by channel.

    Attributes:
        scale: float32 [steps, channels]; 1 where nothing was measured. A negative entry is kept as the fit found it: see `refused`.
        shift: float32 [steps, channels]; 0 where nothing was measured.

    Raises:
        ValueError: The shapes are no [steps, channels] or differ, or an entry is not finite.
    """

    scale: Tensor
    shift: Tensor

    def __post_init__(self) -> None:
        for name in ("scale", "shift"):
            value = getattr(self, name)
            if not isinstance(value, Tensor) or value.ndim != 2:
                raise ValueError(f"{name} must be a tensor of shape [steps, channels], not {getattr(value, 'shape', value)!r}")
            value = value.detach().to(torch.float32, copy=True)  # a copy: the caller's tensor stays the caller's
            if not value.isfinite().all():
                raise ValueError(f"{name} must be finite; {int((~value.isfinite()).sum())} of its {value.numel()} entries are not")
            object.__setattr__(self, name, value)
        if self.scale.shape != self.shift.shape:
            raise ValueError(f"shift must have the shape of scale, {list(self.scale.shape)}, not {list(self.shift.shape)}")

    @classmethod
    def identity(cls, steps: int, channels: int) -> AffineCorrection:
        """The correction that changes nothing."""
        return cls(torch.ones(steps, channels), torch.zeros(steps, channels))

    @property
    def steps(self) -> int:
        return int(self.scale.shape[0])

    @property
    def channels(self) -> int:
        return int(self.scale.shape[1])

    @property
    def decorrelated(self) -> Tensor:
        """bool [steps, channels]: where the reused value moves against the true one."""
        return self.scale < 0

    def refused(self, share: float = 0.0) -> tuple[int, ...]:
        """Steps at which the value should not be reused: more than `share` of the channels are decorrelated (by default, any).

        Raises:
            ValueError: `share` is not from 0 to 1.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share must be from 0 to 1, not {share!r}")
        return tuple(int(k) for k in torch.nonzero(self.decorrelated.float().mean(1) > share).flatten())

    def apply(self, step: int, value: Tensor, dim: int = -1) -> Tensor:
        """The corrected value, a new tensor of the same shape and dtype.

        Args:
            step: Row of the tables.
            value: [..., channels, ...] with the channels along `dim`.
            dim: 1 for pictures [batch, channels, height, width], -1 for tokens [batch, tokens, channels].

        Raises:
            ValueError: `value` has another number of channels along `dim`.
        """
        if value.shape[dim] != self.channels:
            raise ValueError(f"value must have {self.channels} channels along dim {dim}, not the shape {list(value.shape)}")
        shape = [1] * value.ndim
        shape[dim] = -1
        scale, shift = (table[step].to(value.device).view(shape) for table in (self.scale, self.shift))
        return torch.addcmul(shift, value.float(), scale).to(value.dtype)


def solve(
    variance: Tensor, covariance: Tensor, mean_true: Tensor, mean_approx: Tensor, ridge: float, eps: float = VARIANCE_FLOOR
) -> tuple[Tensor, Tensor]:
    """(scale, shift) from biased moments, entry by entry.

    `scale = (covariance + ridge) / (variance + ridge)`, and the shift that then makes the means agree. A large ridge leaves plain
    reuse plus a mean shift; none of them is ever worse on the calibration data than plain reuse, because the squared error is a
    parabola in the scale and the ridge only moves it from the minimum towards 1.

    Raises:
        ValueError: `ridge` is negative or not finite.
    """
    if not 0 <= ridge < float("inf"):
        raise ValueError(f"ridge must be a finite number of at least 0 (in units of the value squared), not {ridge!r}")
    flat = variance < eps
    scale = torch.where(flat, 1.0, (covariance + ridge) / torch.where(flat, 1.0, variance + ridge))
    return scale, mean_true - scale * mean_approx


def affine_fit(
    x_true: Tensor, x_approx: Tensor, dims: int | Sequence[int], ridge: float = 0.0, eps: float = VARIANCE_FLOOR
) -> tuple[Tensor, Tensor]:
    """The least-squares scale and shift that map `x_approx` onto `x_true`.

    Args:
        x_true, x_approx: Two tensors of one shape.
        dims: What the statistics run over, for instance (0, 2, 3) for [batch, channels, height, width].
        ridge: Added to covariance and variance, in units of the value squared; shrinks the scale towards 1.
        eps: A smaller variance means a scale of 1.

    Returns:
        (scale, shift), float32, with the shape that is left when `dims` are gone.

    Raises:
        ValueError: The shapes differ, there is nothing to average over, or `ridge` is negative.
    """
    if x_true.shape != x_approx.shape or x_true.numel() == 0:
        raise ValueError(f"x_true and x_approx must have one shape and entries, not {list(x_true.shape)} and {list(x_approx.shape)}")
    over = (dims,) if isinstance(dims, int) else tuple(dims)
    if not over:
        raise ValueError("dims must name at least one dimension to average over, not none")
    true, approx = x_true.double(), x_approx.double()
    mean_true, mean_approx = true.mean(over, keepdim=True), approx.mean(over, keepdim=True)
    variance = (approx - mean_approx).square().mean(over)
    covariance = ((true - mean_true) * (approx - mean_approx)).mean(over)
    shape = variance.shape
    scale, shift = solve(variance, covariance, mean_true.reshape(shape), mean_approx.reshape(shape), ridge, eps)
    return scale.float(), shift.float()


class AffineStatistics:
    """Takes pairs of a true and an approximate value, step by step and in any number of batches, and fits the correction.

    The guidance branches are kept apart: unconditional trajectories have statistics of their own. Six float64 numbers are held per
    branch, step and channel, however much data streams by; means and moments are merged as Chan, Golub and LeVeque do it, so that
    nothing cancels.

    Args:
        steps: Of a run.
        channels: Of the value.

    Raises:
        ValueError: Either is below 1.
    """

    def __init__(self, steps: int, channels: int) -> None:
        for name, count in (("steps", steps), ("channels", channels)):
            if type(count) is not int or count < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {count!r}")
        self.steps, self.channels = steps, channels
        self._moments: dict[str, Tensor] = {}
        """[6, steps, channels] per branch: count, both means, both sums of squares about the means, and of products."""

    @property
    def branches(self) -> tuple[str, ...]:
        """Guidance branches that were seen, in that order."""
        return tuple(self._moments)

    def add(self, step: int, x_true: Tensor, x_approx: Tensor, *, dim: int = -1, branch: str = ALL_BRANCHES) -> None:
        """Takes in one batch.

        Args:
            step: Executed step the values belong to.
            x_true, x_approx: Two tensors of one shape with the channels along `dim`; statistics run over all else.
            dim: 1 for pictures, -1 for tokens.
            branch: Guidance branch.

        Raises:
            ValueError: The shapes differ, have other channels, hold nothing or something not finite, or there is no such step.
        """
        if not 0 <= step < self.steps:
            raise ValueError(f"step must be from 0 to {self.steps - 1}, not {step!r}")
        if x_true.shape != x_approx.shape or x_true.ndim == 0 or x_true.numel() == 0 or x_true.shape[dim] != self.channels:
            raise ValueError(
                f"x_true and x_approx must have one shape with {self.channels} channels along dim {dim}, "
                f"not {list(x_true.shape)} and {list(x_approx.shape)}"
            )
        true, approx = (x.detach().movedim(dim, -1).reshape(-1, self.channels).cpu().double() for x in (x_true, x_approx))
        new = torch.empty(6, self.channels, dtype=torch.float64)
        new[0] = len(true)
        new[1], new[2] = true.mean(0), approx.mean(0)
        true, approx = true - new[1], approx - new[2]
        new[3], new[4], new[5] = true.square().sum(0), approx.square().sum(0), (true * approx).sum(0)
        if not new.isfinite().all():
            raise ValueError(f"x_true and x_approx must be finite; at step {step} they are not")
        if branch not in self._moments:
            self._moments[branch] = torch.zeros(6, self.steps, self.channels, dtype=torch.float64)
        old = self._moments[branch][:, step]
        count = old[0] + new[0]
        gap_true, gap_approx = new[1] - old[1], new[2] - old[2]
        between = old[0] * new[0] / count
        old[3:] += new[3:] + between * torch.stack([gap_true**2, gap_approx**2, gap_true * gap_approx])
        old[1:3] += torch.stack([gap_true, gap_approx]) * (new[0] / count)
        old[0] = count

    def _of(self, branch: str) -> tuple[Tensor, Tensor]:
        """bool [steps, channels] of what was measured, and [5, steps, channels]: both means, variances and the covariance, biased."""
        if branch not in self._moments:
            raise ValueError(f"branch must be one that was measured, {list(self._moments)}, not {branch!r}")
        moments = self._moments[branch]
        count = moments[0].clamp_min(1)
        return moments[0] > 0, torch.cat([moments[1:3], moments[3:] / count])

    def fit(self, ridge: float = 0.0, *, branch: str = ALL_BRANCHES, eps: float = VARIANCE_FLOOR) -> AffineCorrection:
        """The correction of one branch; steps that were never seen change nothing.

        Args:
            ridge: In units of the value squared; shrinks the scale towards 1 where few samples were seen.
            branch: One of `branches`.
            eps: A smaller variance means a scale of 1.

        Raises:
            ValueError: Nothing was measured of this branch, or `ridge` is negative.
        """
        seen, (mean_true, mean_approx, _, variance, covariance) = self._of(branch)
        scale, shift = solve(variance, covariance, mean_true, mean_approx, ridge, eps)
        return AffineCorrection(torch.where(seen, scale, 1.0), torch.where(seen, shift, 0.0))

    def errors(self, correction: AffineCorrection | None = None, *, branch: str = ALL_BRANCHES) -> Tensor:
        """float64 [steps, channels]: mean squared error over what was taken in, under a correction or, without one, of plain reuse.

        Raises:
            ValueError: Nothing was measured of this branch, or the correction has another shape.
        """
        _, (mean_true, mean_approx, variance_true, variance, covariance) = self._of(branch)
        fit = correction or AffineCorrection.identity(self.steps, self.channels)
        if fit.scale.shape != (self.steps, self.channels):
            raise ValueError(f"correction must be of shape {[self.steps, self.channels]}, not {list(fit.scale.shape)}")
        scale, shift = fit.scale.double(), fit.shift.double()
        offset = mean_true - scale * mean_approx - shift
        return variance_true - 2 * scale * covariance + scale.square() * variance + offset.square()
