"""A world for searches in which everything is known: standard normal data on a flow, whose exact sampler only rescales."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TARGET = torch.tensor([1.5, -1.0])


def spread(level: float) -> float:
    """Standard deviation of standard normal data at a noise level of the flow."""
    return math.hypot(1 - level, level)


def evaluate(latents: Tensor, start: float, stop: float, steps: int) -> tuple[Tensor, Tensor]:
    """The exact flow from start to stop: noise and finished sample are the same numbers.

    The estimate is the posterior mean at stop, or a little before, where stop is the clean sample.
    """
    after = latents * (spread(stop) / spread(start))
    last = max(stop, 0.05)
    return after, latents * (spread(last) / spread(start)) * ((1 - last) / spread(last) ** 2)


def closeness(images: Tensor) -> Tensor:
    """Minus the squared distance from TARGET."""
    return -(images - TARGET).square().sum(1)


class World:
    """The same, counting and slow: a second for each row and denoiser call, half a one for each judgement."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[tuple[int, float, float, int]] = []
        self.judged = 0

    def __call__(self) -> float:
        return self.now

    def evaluate(self, latents: Tensor, start: float, stop: float, steps: int) -> tuple[Tensor, Tensor]:
        self.calls.append((len(latents), start, stop, steps))
        self.now += len(latents) * steps
        return evaluate(latents, start, stop, steps)

    def judge(self, images: Tensor) -> Tensor:
        self.judged += len(images)
        self.now += 0.5 * len(images)
        return closeness(images)
