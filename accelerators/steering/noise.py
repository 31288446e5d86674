"""A stream of noise for every particle.

A particle's noise depends on the seed, its prompt and its slot alone: not on how many others there are, nor on how many go through the
denoiser together. When a particle is copied the noise stays with the slot, so the copies part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SLOTS = 1 << 16
"""Streams of a prompt; the last ones serve what belongs to no particle."""
RESAMPLING = SLOTS - 1
"""The slot whose stream draws ancestors."""
SHARED = RESAMPLING - 1
"""The slot whose stream draws what a search draws for no single candidate; its chains have those below."""
LARGEST_SEED = (1 << 63) - 1


def _scattered(word: int) -> int:
    """A one-to-one map of 32-bit words that sends neighbours far apart (the finaliser of MurmurHash3)."""
    word = (word ^ word >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    word = (word ^ word >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return word ^ word >> 16


def stream(seed: int, prompt: int = 0, slot: int = 0) -> torch.Generator:
    """The generator of one slot of one prompt, on the CPU whatever the device: a seed means the same picture everywhere.

    Args:
        seed: Of the run.
        prompt: Number of the prompt, below 65,536. No two slots of a run's prompts share a stream.
        slot: Number of the particle or candidate, below 65,536.

    Raises:
        ValueError: A number is out of range.
    """
    for name, value, most in (("seed", seed, LARGEST_SEED), ("prompt", prompt, SLOTS - 1), ("slot", slot, SLOTS - 1)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"{name} must be a whole number from 0 to {most}, not {value!r}")
    # torch's CPU generator reads the lower 32 bits only, so everything must lie among them.
    base = _scattered(_scattered(seed & 0xFFFFFFFF) ^ seed >> 32)
    return torch.Generator().manual_seed(_scattered(base + prompt * SLOTS + slot & 0xFFFFFFFF))


class NoiseStreams:
    """The streams of P prompts x K particles, prompt-major.

    Args:
        seed: Of the run.
        prompts, particles: P and K; K below 65,535.

    Attributes:
        generators: One for each row; a pipeline may draw from them itself.
    """

    def __init__(self, seed: int, prompts: int, particles: int) -> None:
        if not 1 <= particles < RESAMPLING:
            raise ValueError(f"particles must be from 1 to {RESAMPLING - 1}, not {particles}")
        self.generators = [stream(seed, prompt, slot) for prompt in range(prompts) for slot in range(particles)]

    def normal(self, rows: Sequence[int] | Tensor, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [len(rows), *shape] in float32 on the CPU, each row from its own stream."""
        return torch.stack([torch.randn(tuple(shape), generator=self.generators[int(row)]) for row in rows])
