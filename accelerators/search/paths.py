"""Search over paths (arXiv 2501.09732): nearly clean samples are renoised several times, denoised again, and the best go on.

Parameters are noise levels from 1 (noise) to 0. Between two rounds the level falls by df - db only, so that every round may change much,
and later rounds change less.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.task import Search, Task
from hasten.accelerators.steering.budget import Cost
from hasten.accelerators.steering.kernels import add_noise

FEWEST_STEPS = 4
"""A path is denoised in no fewer calls while there are branches to give up instead."""


@dataclass(frozen=True)
class SearchOverPaths:
    """Paths that are renoised and denoised.

    Levels above the path's top are taken for it.

    Attributes:
        paths: N. 2 in the comparison of Rollover Budget Forcing's code at 500 denoiser calls.
        branches: M of each path and round; 5 there.
        start: Level down to which the first noises are denoised; 0.11 in the paper, 0.12 in that code.
        forward: Level that renoising adds; 0.78 in that code.
        backward: Level that denoising takes away; 0.81 there.
        steps: Denoiser calls of each stretch of denoising; None takes as many as a full run has for it, and fewer where the budget says so.
        keep: "overall" keeps the best N of all N * M (the paper), "each" the best of every path's M (that code).

    Raises:
        ValueError: A value is out of range.
    """

    paths: int = 2
    branches: int = 5
    start: float = 0.12
    forward: float = 0.78
    backward: float = 0.81
    steps: int | None = None
    keep: str = "overall"

    def __post_init__(self) -> None:
        check_whole(1, paths=self.paths, branches=self.branches)
        if not 0 < self.start < 1 or not 0 < self.forward < self.backward or self.start + self.forward > 1:
            raise ValueError(
                "start must be above 0, forward above 0 and below backward, and start + forward at most 1, "
                f"not {self.start!r}, {self.forward!r} and {self.backward!r}"
            )
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"steps must be a whole number of at least 1, or None, not {self.steps!r}")
        if self.keep not in ("overall", "each"):
            raise ValueError(f"keep must be overall or each, not {self.keep!r}")

    def __str__(self) -> str:
        return f"search over paths N={self.paths} M={self.branches} start={self.start:g} +{self.forward:g} -{self.backward:g}"

    @property
    def rounds(self) -> int:
        """Rounds until the level is 0."""
        return math.ceil(self.start / (self.backward - self.forward) - 1e-9) + 1

    def search(self, task: Task) -> Search:
        """See `SearchMethod`. Where the budget is too small for any round, it is one plain sample."""
        plan = self._plan(task)
        if plan is None:
            task.warnings.append("the budget is too small for a search over paths; this is one plain sample")
            return (yield from task.run(task.fresh(1), 0))[0]
        paths, branches, first, steps = plan
        task.facts |= {"paths": paths, "branches": branches, "steps": steps, "rounds": self.rounds}
        if (paths, branches) != (self.paths, self.branches):
            task.warnings.append(f"the budget affords {paths} paths of {branches} branches, not {self.paths} of {self.branches}")
        noises, draws = task.fresh(paths), task.stream()
        level = self.start
        begun = yield from task.explore(noises, task.path.top, level, first, scored=False)
        states = task.candidates(noises, task.path.top, begun, 0)
        best = states[0]
        for number in range(self.rounds):
            high = min(level + self.forward, task.path.top)
            low = max(level - (self.backward - self.forward), 0.0) if number < self.rounds - 1 else 0.0
            clean = torch.stack([state.latents for state in states for _ in range(branches)])
            transition = add_noise(clean, task.path.at(level), task.path.at(high))
            noisy = transition.sample(torch.randn(clean.shape, generator=draws))
            answer = yield from task.explore(noisy, high, low, steps)
            parents = [state.node for state in states for _ in range(branches)]
            pool = task.candidates(noisy, high, answer, number + 1, parents)
            if pool:
                best = task.best(*pool)  # of this round: only the last one's are finished
                overall = self.keep == "overall"
                groups = [pool] if overall else [pool[i : i + branches] for i in range(0, len(pool), branches)]
                states = [state for group in groups for state in task.ranked(group)[: paths if overall else 1]]
                level = low
            if len(pool) < len(noisy):
                break
        if level > 0:
            task.warnings.append(f"the time ran out at noise level {level:.2f}; the sample is the estimate there")
        return best

    def _plan(self, task: Task) -> tuple[int, int, int, int] | None:
        """Paths, branches, and denoiser calls for the first stretch and for each later one, as the budget affords; None if it does not."""
        first = max(1, math.ceil(task.steps * (1 - self.start)))
        wanted = self.steps or max(1, round(task.steps * self.backward))

        def cost(paths: int, branches: int, steps: int) -> Cost:
            return task.cost(paths, first, scored=False) + task.cost(paths * branches, steps) * self.rounds

        for fewest in (min(wanted, FEWEST_STEPS), 1):
            for paths in range(self.paths, 0, -1):
                for branches in range(self.branches, 0, -1):
                    steps = task.most(lambda count, n=paths, m=branches: cost(n, m, count), wanted)  # type: ignore[misc]
                    if steps >= fewest:
                        return paths, branches, first, steps
        return None
