"""Zero-order search over starting noises (arXiv 2501.09732).

A pivot noise and some neighbours of it are run; the best of them is the next pivot. Where no neighbour is better the round is rejected and
a fresh pivot is drawn (the paper's author in tt-scale-flux, pull request 14).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.task import FIRST, ROOT, Candidate, Search, Task


def neighbour(noise: Tensor, direction: Tensor, rho: float) -> Tensor:
    """A noise of the same norm whose cosine to `noise` is rho.

    Args:
        noise: Any shape.
        direction: Of the same shape; only its part across `noise` counts.
        rho: From -1 to 1.
    """
    flat, across = noise.double().flatten(), direction.double().flatten()
    unit = flat / flat.norm()
    across = across - (across @ unit) * unit
    across = across / across.norm()
    return (flat.norm() * (rho * unit + math.sqrt(1 - rho**2) * across)).view(noise.shape).to(noise)


@dataclass(frozen=True)
class ZeroOrder:
    """A walk over noises, towards better samples.

    Attributes:
        rounds: Of neighbours. 4 is ours.
        neighbours: M of a round; 4 in the author's code; 2 was used for text-to-image in the paper.
        rho: Cosine of a neighbour to its pivot; 0.95 in the author's code. Far above it the walk gets stuck.
        keep: "norm" has neighbours of exactly the pivot's norm (the author's code); "gaussian" mixes rho of the pivot with fresh noise, so
            that neighbours are distributed as noises are.
        restart: Whether a round without improvement is rejected and a fresh pivot drawn; else the pivot stays.

    Raises:
        ValueError: A value is out of range.
    """

    rounds: int = 4
    neighbours: int = 4
    rho: float = 0.95
    keep: str = "norm"
    restart: bool = True

    def __post_init__(self) -> None:
        check_whole(1, rounds=self.rounds, neighbours=self.neighbours)
        if not 0 <= self.rho < 1:
            raise ValueError(f"rho must be at least 0 and below 1, not {self.rho!r}")
        if self.keep not in ("norm", "gaussian"):
            raise ValueError(f"keep must be norm or gaussian, not {self.keep!r}")

    def __str__(self) -> str:
        return f"zero-order search, {self.rounds} rounds of {self.neighbours}, rho={self.rho:g}"

    def search(self, task: Task) -> Search:
        """See `SearchMethod`."""
        pivot: Candidate | None = None
        best: Candidate | None = None
        restarts = 0
        for number in range(self.rounds):
            if pivot is None:  # its own run does not wait for its neighbours', which need the noise alone
                noise = task.fresh(1)
                noises = torch.cat([noise, self._around(task, noise[0])])
                stages = [number] + [number + 1] * self.neighbours
                pool = yield from task.run(noises, stages, [ROOT] + [FIRST] * self.neighbours)
                if not pool:
                    break
                pivot, rows = pool[0], pool[1:]
            else:
                rows = yield from task.run(self._around(task, pivot.noise), number + 1, [pivot.node] * self.neighbours)
            ranked = task.ranked([pivot, *rows])
            best = task.best(best, ranked[0])
            if len(rows) < self.neighbours:
                task.warnings.append(f"the budget ended the search in round {number}, after {len(rows)} of {self.neighbours} neighbours")
                break
            if ranked[0] is not pivot:
                pivot = ranked[0]
            elif self.restart:
                pivot, restarts = None, restarts + 1
        task.facts["restarts"] = restarts
        assert best is not None  # one sample at least is affordable
        return best

    def _around(self, task: Task, noise: Tensor) -> Tensor:
        directions = task.fresh(self.neighbours)
        if self.keep == "gaussian":
            return self.rho * noise + math.sqrt(1 - self.rho**2) * directions
        return torch.stack([neighbour(noise, direction, self.rho) for direction in directions])
