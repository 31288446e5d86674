"""Closed-form corrections against least squares, and what they promise about the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.correction import AffineCorrection, AffineStatistics


def pair(seed: int, *shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A value and what is left of it: related, with offsets and spreads of every size."""
    g = torch.Generator().manual_seed(seed)
    approx = torch.randn(shape, generator=g) * 10 ** float(torch.empty(1).uniform_(-2, 2, generator=g))
    approx = approx + 3 * torch.randn(1, generator=g)
    slope, noise = torch.randn(2, generator=g)
    return slope * approx + noise * torch.randn(shape, generator=g) + torch.randn(1, generator=g), approx


def fitted(true: torch.Tensor, approx: torch.Tensor, dim: int = -1, ridge: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and shift [channels] of one batch."""
    statistics = AffineStatistics(1, approx.shape[dim])
    statistics.add(0, true, approx, dim=dim)
    fit = statistics.fit(ridge)
    return fit.scale[0], fit.shift[0]


def at_step(fit: AffineCorrection, step: int) -> Affine:
    """What the runtime makes of a step."""
    return Affine(fit.scale[step].numpy(), fit.shift[step].numpy())


def test_finds_an_affine_map_again() -> None:
    approx = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    a, b = torch.tensor([1.0, -2.0, 0.5, 0.0, 3.0]), torch.tensor([0.0, 1.0, -1.0, 2.0, 0.25])
    scale, shift = fitted(approx * a.view(5, 1, 1) + b.view(5, 1, 1), approx, 1)
    torch.testing.assert_close(scale, a, atol=1e-6, rtol=0)
    torch.testing.assert_close(shift, b, atol=1e-6, rtol=0)


def test_equals_least_squares() -> None:
    true, approx = pair(1, 200)
    scale, shift = fitted(true[:, None], approx[:, None])
    design = np.stack([approx.double().numpy(), np.ones(200)], 1)
    expected = np.linalg.lstsq(design, true.double().numpy(), rcond=None)[0]
    np.testing.assert_allclose([float(scale), float(shift)], expected, rtol=1e-5)


@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.0, 1e-3, 1.0, 100.0]))
def test_is_never_worse_than_reuse(seed: int, rows: int, channels: int, ridge: float) -> None:
    """With and without a ridge: it moves the scale from the least-squares one towards 1, never past either."""
    true, approx = pair(seed, rows, channels, 3)
    statistics = AffineStatistics(1, channels)
    statistics.add(0, true, approx, dim=1)
    fit = statistics.fit(ridge)
    reuse = (true - approx).double().square().mean((0, 2))
    corrected = (true - at_step(fit, 0).apply(approx, 1)).double().square().mean((0, 2))
    slack = 1e-5 * (reuse + true.double().square().mean((0, 2)) + approx.double().square().mean((0, 2)))
    assert (corrected <= reuse + slack).all()
    assert (statistics.errors(fit)[0] <= statistics.errors()[0] + slack).all()
    torch.testing.assert_close(statistics.errors()[0], reuse, rtol=1e-5, atol=float(slack.max()))
    torch.testing.assert_close(statistics.errors(fit)[0], corrected, rtol=1e-4, atol=float(slack.max()))


def test_a_ridge_shrinks_to_reuse_and_a_shift_of_the_mean() -> None:
    true, approx = pair(3, 50, 4)
    free, _ = fitted(true, approx)
    before = (free - 1).abs()
    for ridge in (0.1, 10.0, 1e4, 1e12):
        scale, shift = fitted(true, approx, ridge=ridge)
        assert ((scale - 1).abs() <= before + 1e-6).all() and ((scale - 1) * (free - 1) >= -1e-6).all()
        before = (scale - 1).abs()
    torch.testing.assert_close(scale, torch.ones(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(shift, (true - approx).mean(0), atol=1e-3, rtol=1e-4)


def test_a_flat_channel_is_only_shifted() -> None:
    approx = torch.full((10, 2), 3.0)
    true = approx + torch.tensor([0.5, -1.0])
    scale, shift = fitted(true, approx)
    assert scale.tolist() == [1, 1] and shift.tolist() == [0.5, -1.0]


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_streaming_equals_one_batch(seed: int, sizes: list[int]) -> None:
    true, approx = pair(seed, sum(sizes), 7, 3)
    statistics = AffineStatistics(4, 3)
    for a, b in zip(true.split(sizes), approx.split(sizes), strict=True):
        statistics.add(2, a, b)
    fit, once = statistics.fit(0.01), fitted(true, approx, ridge=0.01)
    torch.testing.assert_close((fit.scale[2], fit.shift[2]), once, rtol=1e-5, atol=1e-5)
    assert (fit.scale[[0, 1, 3]] == 1).all() and (fit.shift[[0, 1, 3]] == 0).all()


def test_nothing_cancels_far_from_zero() -> None:
    approx = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)) + 1e4
    statistics = AffineStatistics(1, 1)
    for part in approx.split(10):
        statistics.add(0, 2 * (part - 1e4) + 5, part)
    assert float(statistics.fit().scale) == pytest.approx(2, rel=1e-4)


def test_branches_are_kept_apart() -> None:
    statistics = AffineStatistics(1, 2)
    approx = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    statistics.add(0, approx * 2, approx, branch="cond")
    statistics.add(0, approx * 0.5 + 1, approx, branch="uncond")
    assert statistics.branches == ("cond", "uncond")
    torch.testing.assert_close(statistics.fit(branch="cond").scale, torch.full((1, 2), 2.0))
    torch.testing.assert_close(statistics.fit(branch="uncond").shift, torch.ones(1, 2))
    with pytest.raises(ValueError, match=r"branch must be one that was measured, \['cond', 'uncond'\], not '\*'"):
        statistics.fit()


def test_a_value_that_moves_against_the_true_one_keeps_its_negative_scale() -> None:
    statistics = AffineStatistics(2, 2)
    approx = torch.randn(30, 2, generator=torch.Generator().manual_seed(0))
    statistics.add(0, -approx, approx)
    statistics.add(1, approx * torch.tensor([1.0, -1.0]), approx)
    assert (statistics.fit().scale < 0).tolist() == [[True, True], [False, True]]


def test_moments_are_those_of_all_that_was_taken_in() -> None:
    statistics = AffineStatistics(2, 3)
    true, approx = pair(5, 12, 3)
    for part in (slice(0, 1), slice(1, 12)):
        statistics.add(1, true[part], approx[part])
    found = statistics.moments()
    assert found.seen.tolist() == [[False] * 3, [True] * 3]
    expected = np.stack([np.cov(true[:, c].double(), approx[:, c].double(), bias=True) for c in range(3)])
    np.testing.assert_allclose(found.variance_true[1], expected[:, 0, 0], rtol=1e-9)
    np.testing.assert_allclose(found.variance_approx[1], expected[:, 1, 1], rtol=1e-9)
    np.testing.assert_allclose(found.covariance[1], expected[:, 0, 1], rtol=1e-9)
    np.testing.assert_allclose(found.mean_true[1], true.double().mean(0), rtol=1e-9)
    np.testing.assert_allclose(found.mean_approx[1], approx.double().mean(0), rtol=1e-9)
    assert not torch.stack(found[1:])[:, 0].any()


def test_a_fitted_step_is_carried_out_along_any_dimension_and_keeps_the_dtype() -> None:
    fit = AffineCorrection(torch.tensor([[1.0, 1.0], [2.0, 3.0]]), torch.tensor([[0.0, 0.0], [1.0, -1.0]]))
    first, second = (at_step(fit, k) for k in range(2))
    tokens = torch.ones(2, 5, 2, dtype=torch.bfloat16)
    assert second.apply(tokens, -1).dtype == torch.bfloat16 and second.apply(tokens, -1)[0, 0].tolist() == [3, 2]
    picture = torch.ones(1, 2, 3, 3)
    assert second.apply(picture, 1)[0, :, 0, 0].tolist() == [3, 2] and torch.equal(first.apply(picture, 1), picture)
    assert (picture == 1).all()


def test_errors_name_the_argument() -> None:
    with pytest.raises(ValueError, match=r"scale must be a tensor of shape \[steps, channels\]"):
        AffineCorrection(torch.ones(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"shift must have the shape of scale, \[1, 3\], not \[1, 2\]"):
        AffineCorrection(torch.ones(1, 3), torch.ones(1, 2))
    with pytest.raises(ValueError, match="shift must be finite; 1 of its 3"):
        AffineCorrection(torch.ones(1, 3), torch.tensor([[0.0, float("nan"), 1.0]]))
    with pytest.raises(ValueError, match="channels must be a whole number of at least 1, not 0"):
        AffineStatistics(1, 0)
    with pytest.raises(ValueError, match="step must be from 0 to 1, not 2"):
        AffineStatistics(2, 3).add(2, torch.ones(4, 3), torch.ones(4, 3))
    with pytest.raises(ValueError, match="one shape with 3 channels along dim -1"):
        AffineStatistics(2, 3).add(0, torch.ones(4, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="must be finite; at step 0"):
        AffineStatistics(2, 1).add(0, torch.tensor([[float("inf")]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="ridge must be a finite number of at least 0"):
        fitted(torch.ones(2, 1), torch.ones(2, 1), ridge=-1.0)
