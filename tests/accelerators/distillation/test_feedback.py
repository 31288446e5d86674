"""Reward feedback: gradients through the decoder, none above the ceiling, and none asked of a verifier without."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hasten.accelerators.distillation.feedback import RewardFeedback
from hasten.accelerators.steering.verifiers import Brightness, JPEGSize


def decode(latents: Tensor) -> Tensor:
    return torch.sigmoid(2 * latents)


def test_the_gradient_is_that_of_the_mean_score_through_the_decoder() -> None:
    x0 = torch.randn(3, 3, 4, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = RewardFeedback(weight=0.5).loss(x0, decode, Brightness(), ["a", "b", "c"])
    loss.backward()
    (expected,) = torch.autograd.grad(-0.5 * Brightness().score(decode(x0), ["a", "b", "c"]).mean(), x0)
    assert x0.grad is not None and x0.grad.abs().sum() > 0
    torch.testing.assert_close(x0.grad, expected)


def test_samples_above_the_ceiling_are_left_alone() -> None:
    x0 = torch.stack([torch.full((3, 4, 4), -2.0), torch.full((3, 4, 4), 2.0)]).requires_grad_()
    middle = float(Brightness().score(decode(torch.zeros(1, 3, 4, 4)), [""]))
    RewardFeedback(ceiling=middle).loss(x0, decode, Brightness(), ["", ""]).backward()
    assert x0.grad is not None and (x0.grad[0] != 0).all() and (x0.grad[1] == 0).all()


def test_a_verifier_without_gradients_is_refused() -> None:
    with pytest.raises(ValueError, match="verifier must be differentiable, which JPEGSize is not"):
        RewardFeedback().loss(torch.zeros(1, 3, 4, 4), decode, JPEGSize(), [""])
    with pytest.raises(ValueError, match="weight must be above 0"):
        RewardFeedback(weight=0.0)
