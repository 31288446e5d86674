"""Resampling of the particles of one prompt: every scheme copies particle i K * W_i times in the mean.

They differ in variance: multinomial draws are the worst; residual and stratified ones are never worse than it; systematic ones and the
Srinivasan sampling process (SSP; Gerber, Chopin and Whiteley, Annals of Statistics 2019; as in DAS) give every particle the whole number
of copies just below or just above K * W_i, and only SSP is also known to converge whatever the order of the particles.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Scheme = Callable[[Tensor, int, torch.Generator], Tensor]
"""From weights [K] that sum to 1, a number of draws and a generator to ancestors [draws], int64."""


def normalised(log_weights: Tensor) -> Tensor:
    """Weights [..., K] that sum to 1, in float64, from log-weights; even ones where all log-weights are -inf."""
    log_weights = log_weights.double()
    lost = torch.isneginf(log_weights).all(-1, keepdim=True)
    return torch.where(lost, 0.0, log_weights).softmax(-1)


def effective_sample_size(weights: Tensor) -> Tensor:
    """1 / sum W^2 over the last dimension: from 1 (one particle has all weight) to K (even weights)."""
    return 1 / weights.square().sum(-1)


def multinomial(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Independent draws."""
    return _inverse(weights, torch.rand(draws, generator=generator, dtype=torch.float64))


def residual(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """The whole part of draws * W_i for certain, the rest by independent draws on what is left."""
    wanted = weights.double() * draws
    # A product such as 3 * (1 / 3) may fall just short of its whole number.
    copies = (wanted + 1e-9).floor()
    certain = torch.arange(len(weights)).repeat_interleave(copies.long())
    rest = (wanted - copies).clamp(min=0)
    if len(certain) == draws:
        return certain
    return torch.cat([certain, multinomial(rest / rest.sum(), draws - len(certain), generator)])


def stratified(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """One draw in each of as many equal strata."""
    return _inverse(weights, (torch.arange(draws) + torch.rand(draws, generator=generator, dtype=torch.float64)) / draws)


def systematic(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """The same draw in each stratum."""
    return _inverse(weights, (torch.arange(draws) + torch.rand(1, generator=generator, dtype=torch.float64)) / draws)


def ssp(weights: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """Srinivasan sampling process: fractions meet in pairs, and one of the two always becomes a whole number."""
    wanted = (weights.double() * draws).tolist()
    copies = [math.floor(value + 1e-9) for value in wanted]
    fractions = [max(0.0, value - whole) for value, whole in zip(wanted, copies, strict=True)]
    coins = torch.rand(len(wanted), generator=generator, dtype=torch.float64).tolist()
    open_, fraction = 0, fractions[0]
    for other in range(1, len(wanted)):
        up = min(fractions[other], 1 - fraction)  # what the open one may gain, and below what the other may
        down = min(fraction, 1 - fractions[other])
        # The chances are such that neither's mean moves.
        gains = up + down == 0 or coins[other] * (up + down) >= up
        high, low = (open_, other) if gains else (other, open_)
        high_fraction, low_fraction = (fraction, fractions[other]) if gains else (fractions[other], fraction)
        if high_fraction + low_fraction < 1:
            open_, fraction = high, high_fraction + low_fraction
        else:
            copies[high] += 1
            open_, fraction = low, high_fraction + low_fraction - 1
    if sum(copies) < draws:  # the last fraction is a whole one but for round-off
        copies[open_] += 1
    return torch.arange(len(wanted)).repeat_interleave(torch.tensor(copies))


SCHEMES: dict[str, Scheme] = {
    "multinomial": multinomial,
    "residual": residual,
    "stratified": stratified,
    "systematic": systematic,
    "ssp": ssp,
}


def _inverse(weights: Tensor, points: Tensor) -> Tensor:
    cumulative = weights.double().cumsum(0)
    # A point may round up to the whole; nothing without weight may be drawn for it.
    points = points.clamp(max=1 - 2**-53) * cumulative[-1]
    last = int(weights.nonzero()[-1])
    return torch.searchsorted(cumulative, points, right=True).clamp(max=last)


def settled(ancestors: Tensor) -> Tensor:
    """The same ancestors [K], in such an order that every one of them that survives keeps its slot: the least data moves."""
    counts = torch.bincount(ancestors, minlength=len(ancestors))
    index = torch.arange(len(ancestors))
    index[counts == 0] = torch.arange(len(ancestors)).repeat_interleave((counts - 1).clamp(min=0))
    return index
