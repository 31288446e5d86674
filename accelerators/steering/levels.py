"""Noise levels: how much of a latent is signal and how much is noise, on the three kinds of path that diffusers' schedulers run along.

Latents are alpha * x0 + sigma * noise. The level sigma / (alpha + sigma) runs from 1 (noise) to 0 (clean), is sigma itself on a
rectified flow, and is the same on every path where the signal-to-noise ratio is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

KINDS = ("flow", "variance-preserving", "variance-exploding")


class AlphaSigma(NamedTuple):
    """Coefficients of the signal and of the noise at one time."""

    alpha: float
    sigma: float

    @property
    def level(self) -> float:
        """From 0 (clean) to 1 (noise only)."""
        return self.sigma / (self.alpha + self.sigma)


@dataclass(frozen=True)
class NoisePath:
    """The path a sampler runs along.

    Attributes:
        kind: "flow" (alpha = 1 - sigma), "variance-preserving" (alpha^2 + sigma^2 = 1), or "variance-exploding" (alpha = 1: the Euler
            schedulers of k-diffusion).
        top: The noisiest level that the model knows, where sampling starts; levels above are taken for it.

    Raises:
        ValueError: The kind is unknown, or `top` is not above 0 and at most 1 (below 1 where alpha = 1).
    """

    kind: str = "flow"
    top: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        if not 0 < self.top <= 1:
            raise ValueError(f"top must be above 0 and at most 1, not {self.top!r}")
        if self.kind == "variance-exploding" and self.top == 1:
            raise ValueError("top must be below 1 on a variance-exploding path, where level 1 is infinite noise")

    def at(self, level: float) -> AlphaSigma:
        """The coefficients at a level.

        Raises:
            ValueError: The level is not from 0 to 1.
        """
        if not 0 <= level <= 1:
            raise ValueError(f"a noise level must be from 0 to 1, not {level!r}")
        level = min(level, self.top)
        if self.kind == "flow":
            return AlphaSigma(1 - level, level)
        if self.kind == "variance-preserving":
            length = math.hypot(1 - level, level)
            return AlphaSigma((1 - level) / length, level / length)
        return AlphaSigma(1.0, level / (1 - level))

    @property
    def start_scale(self) -> float:
        """Standard deviation of the latents that sampling starts from: sigma at the top where alpha = 1, else 1."""
        return self.at(self.top).sigma if self.kind == "variance-exploding" else 1.0
