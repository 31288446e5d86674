"""Closed-form corrections of a reused value: for every step and channel the scale and shift that bring it closest to the true one.

The cache half of CacheQuant's decoupled error correction (arXiv 2503.01323, section 3.4 of its specification), and the same least
squares for what quantisation does to a layer's output. Nothing is trained: means, variances and covariances are streamed, then solved.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.caching.plan import ALL_BRANCHES

VARIANCE_FLOOR = 1e-12
"""A channel that varies less than this has no slope: it is only shifted."""


@dataclass(frozen=True, eq=False)
class AffineCorrection:
    """`true ≈ scale[step] * approximate + shift[step]`, channel by channel, as it was fitted; `Affine` carries a step of it out.

    Attributes:
        scale: float32 [steps, channels]; 1 where nothing was measured. A negative entry is kept as the fit found it: the reused value
            moves against the true one there.
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


class Moments(NamedTuple):
    """What was measured of one branch, [steps, channels] each; sums are divided by the count, not by one less."""

    seen: Tensor  # bool: whether anything was
    mean_true: Tensor
    mean_approx: Tensor
    variance_true: Tensor
    variance_approx: Tensor
    covariance: Tensor


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

    def moments(self, branch: str = ALL_BRANCHES) -> Moments:
        """Means, variances and covariances of one branch; 0 at steps that were never seen.

        Raises:
            ValueError: Nothing was measured of this branch.
        """
        if branch not in self._moments:
            raise ValueError(f"branch must be one that was measured, {list(self._moments)}, not {branch!r}")
        count, mean_true, mean_approx, *sums = self._moments[branch]
        return Moments(count > 0, mean_true, mean_approx, *(total / count.clamp_min(1) for total in sums))

    def fit(self, ridge: float = 0.0, *, branch: str = ALL_BRANCHES, eps: float = VARIANCE_FLOOR) -> AffineCorrection:
        """The correction of one branch; steps that were never seen change nothing.

        Args:
            ridge: In units of the value squared; shrinks the scale towards 1 where few samples were seen.
            branch: One of `branches`.
            eps: A smaller variance means a scale of 1.

        Raises:
            ValueError: Nothing was measured of this branch, or `ridge` is negative.
        """
        found = self.moments(branch)
        scale, shift = solve(found.variance_approx, found.covariance, found.mean_true, found.mean_approx, ridge, eps)
        return AffineCorrection(torch.where(found.seen, scale, 1.0), torch.where(found.seen, shift, 0.0))

    def errors(self, correction: AffineCorrection | None = None, *, branch: str = ALL_BRANCHES) -> Tensor:
        """float64 [steps, channels]: mean squared error over what was taken in, under a correction or, without one, of plain reuse.

        Raises:
            ValueError: Nothing was measured of this branch, or the correction has another shape.
        """
        found = self.moments(branch)
        fit = correction or AffineCorrection.identity(self.steps, self.channels)
        if fit.scale.shape != (self.steps, self.channels):
            raise ValueError(f"correction must be of shape {[self.steps, self.channels]}, not {list(fit.scale.shape)}")
        scale, shift = fit.scale.double(), fit.shift.double()
        offset = found.mean_true - scale * found.mean_approx - shift
        return found.variance_true - 2 * scale * found.covariance + scale.square() * found.variance_approx + offset.square()
