"""Random numbers that belong to a place, not to a batch: Philox4x32-10 (Salmon et al., SC 2011) keyed by row, position and step.

A row draws the same numbers alone and among others, on any device, and again when a draft is verified: nothing is consumed from a stream.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_GUMBEL, _UNIFORM = 0, 1  # the last counter word: which stream

LARGEST = 1 - 2.0**-24
"""The largest uniform number; the next one up, rounded to float32, is 1."""


class Key(NamedTuple):
    """What a random number belongs to.

    Attributes:
        seeds: int64 [R], one for each row; all 64 bits count.
        positions: int64 [R, W] or [W], counted from the first generated token, so that padding does not move them; at least 0.
        steps: int64 [R], forwards that the row has seen; at least 0.
    """

    seeds: Tensor
    positions: Tensor
    steps: Tensor


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words for each counter.

    Args:
        counter, key: 32-bit words, held in int64 tensors that broadcast against each other.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # An int64 product keeps the low 64 bits of the true one, and the mask takes off what the arithmetic shift smears in.
        first, second = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (first >> 32) & _WORD, (second >> 32) & _WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, second & _WORD, high0 ^ c3 ^ k1, first & _WORD
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c0, c1, c2, c3


def _words(index: Tensor, key: Key, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words for each row, position and index, [R, W, len(index)]."""
    shape = (-1, 1, 1)
    counter = (index, key.positions[..., None] & _WORD, key.steps.view(shape) & _WORD, torch.full_like(index, stream))
    return philox(counter, (key.seeds.view(shape) & _WORD, (key.seeds.view(shape) >> 32) & _WORD))


def _unit(words: Tensor) -> Tensor:
    """float32 in (0, 1), finest near 0."""
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=LARGEST)


def uniform(key: Key) -> Tensor:
    """One uniform number in (0, 1) for each row and position, float32 [R, W]."""
    return _unit(_words(torch.zeros(1, dtype=torch.int64, device=key.seeds.device), key, _UNIFORM)[0])[..., 0]


def gumbel(key: Key, vocabulary: int) -> Tensor:
    """Standard Gumbel noise, float32 [R, W, vocabulary].

    Float64 is what LLaDA's sampler uses, because -log(-log(u)) in float32 has no upper tail when u is near 1 (arXiv 2409.02908). Here u
    is the distance from 1, which float32 resolves to 2^-33: the largest value is 22.9.
    """
    index = torch.arange((vocabulary + 3) // 4, device=key.seeds.device)
    u = _unit(torch.stack(_words(index, key, _GUMBEL), -1).flatten(-2)[..., :vocabulary])
    return -torch.log(-torch.log1p(-u))
