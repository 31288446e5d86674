"""Rollover Budget Forcing for flow models (arXiv 2503.19385).

A chain goes from level to level by stochastic steps. At each level several next states are proposed, one denoiser call each; the first one
whose estimate beats the chain's best is taken, and the calls that were not needed roll over to the next level. A proposal's estimate
serves its own step later, so a level costs exactly its proposals.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from hasten.accelerators.search.task import Candidate, Search, Task
from hasten.accelerators.steering.kernels import Kernel, ddim_eta

VP_BETAS = (0.1, 20.0)
"""Of the variance-preserving path along which the published code runs."""


def rollover_levels(steps: int, spacing: str = "vp") -> list[float]:
    """Noise levels of the chain, steps + 1 of them, from 1 down.

    Args:
        steps: At least 1.
        spacing: "vp" is the published grid: sqrt(1 - (1 - t)^2) over even t, as times of a variance-preserving path, taken at the same
            signal-to-noise ratio. With 10 steps the last proposals still lie at level 0.71. "even" has even levels down to 0.

    Raises:
        ValueError: The spacing is unknown.
    """
    even = [1 - k / steps for k in range(steps + 1)]
    if spacing == "even":
        return even
    if spacing != "vp":
        raise ValueError(f"spacing must be vp or even, not {spacing!r}")
    levels = [1.0]
    for t in even[1:]:
        time = math.sqrt(1 - (1 - t) ** 2)
        exponent = 0.5 * time**2 * (VP_BETAS[1] - VP_BETAS[0]) + VP_BETAS[0] * time
        alpha, sigma = math.exp(-0.5 * exponent), math.sqrt(-math.expm1(-exponent))
        levels.append(sigma / (alpha + sigma))
    return levels


@dataclass(frozen=True)
class RolloverBudget:
    """Chains that take the first proposal that is better than all before.

    The published code returns the best of the last level; this finishes the best ever, or several of the best and returns the best of
    those: the highest estimate need not become the best sample. It runs a flow along a variance-preserving SDE; here
    the generalised DDIM step does that at the same levels, since rescaling the path changes nothing in it.

    Attributes:
        evaluations: Most denoiser calls before completion; 500 in the paper. The call's budget may allow fewer.
        chains: Independent chains; 2 in the published code.
        initial: Noises of each chain, of which the best begins; 25 there. At most half of the evaluations go into them.
        max_steps: Levels of the grid; 10 there. There is no advance in the last two: what is left is proposals from the same parent.
        quota: Proposals of a level before anything rolls over; None spreads the evaluations evenly (22 at the published values).
        spacing: Of the levels; see `rollover_levels`.
        reserve: Denoiser calls that are kept to denoise the winner to the end without noise. None keeps a full run's calls and spends
            its share from the winner's level. 0, as published, returns the one-shot estimate: for few-step models only, whose
            estimates are sharp at any level.
        completions: How many of the best candidates are denoised to the end, each with a reserve of its own. The published code has one.
        kernel: The stochastic step.

    Raises:
        ValueError: A value is out of range.
    """

    evaluations: int = 500
    chains: int = 2
    initial: int = 25
    max_steps: int = 10
    quota: int | None = None
    spacing: str = "vp"
    reserve: int | None = None
    completions: int = 1
    kernel: Kernel = ddim_eta

    def __post_init__(self) -> None:
        least = {"evaluations": 1, "chains": 1, "initial": 1, "max_steps": 2, "quota": 1, "reserve": 0, "completions": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if name in ("quota", "reserve") and value is None:
                continue
            if type(value) is not int or value < low:
                raise ValueError(f"{name} must be a whole number of at least {low}, not {value!r}")
        rollover_levels(1, self.spacing)

    def __str__(self) -> str:
        return f"rollover budget forcing, {self.evaluations} evaluations, {self.chains} chains, {self.max_steps} steps"

    def search(self, task: Task) -> Search:
        """See `SearchMethod`. Levels are shares of the path's top. A budget with nothing beside the reserve gives one plain sample."""
        levels = [task.path.top * level for level in rollover_levels(self.max_steps, self.spacing)]
        kept = task.steps if self.reserve is None else self.reserve
        # Fewer are completed where the budget is small: no more than half of it goes there.
        completions = max(1, min(self.completions, task.most(lambda count: task.cost(2 * count, kept), self.completions))) if kept else 1
        reserve = task.cost(completions, kept, scored=kept > 0)
        total = task.most(lambda count: task.cost(count, 1) + reserve, self.evaluations)
        if total == 0:
            task.warnings.append("the budget has no evaluation beside the reserve; this is one plain sample")
            return (yield from task.run(task.fresh(1), 0))[0]
        chains = min(self.chains, total)
        initial = min(self.initial, max(1, total // (2 * chains)))
        quota = self.quota or max(1, (total - initial * chains) // (self.max_steps * chains))
        noises = task.fresh(initial * chains)
        answer = yield from task.explore(noises, levels[0], levels[0], 1, reserve=reserve)
        pool = task.candidates(noises, levels[0], answer, 0)
        if len(pool) < len(noises):
            task.warnings.append(f"the time ran out after {len(pool)} of the first {len(noises)} evaluations")
        groups = [pool[i : i + initial] for i in range(0, len(pool), initial)]
        running = [_Chain(task, number, task.best(*group), quota) for number, group in enumerate(groups)]
        best = self._leading(task, pool, completions)
        left = total - len(pool)
        while left > 0 and len(pool) == len(noises):
            batch = running[:left]
            proposed = torch.stack([chain.propose(self.kernel, levels) for chain in batch])
            at = [levels[chain.step + 1] for chain in batch]
            answer = yield from task.explore(proposed, at, at, 1, reserve=reserve)
            found = task.candidates(proposed, at, answer, [chain.step + 1 for chain in batch], [chain.state.node for chain in batch])
            for chain, candidate in zip(batch, found, strict=False):
                chain.judge(candidate, may_advance=chain.step < self.max_steps - 2)
            best = self._leading(task, [*best, *found], completions)
            left -= len(found)
            if len(found) < len(batch):
                task.warnings.append("the time ran out before the evaluations")
                break
        task.facts |= {
            "quota": quota,
            "initial": initial,
            "completions": completions if kept else 0,
            "granted": [chain.granted for chain in running],
            "used": [[*chain.consumed, chain.used] for chain in running],
        }
        if kept == 0:
            return best[0]
        finished: list[Candidate] = []
        for candidate in best:
            steps = max(1, math.ceil(task.steps * candidate.level)) if self.reserve is None else kept
            answer = yield from task.explore(candidate.noise[None], candidate.level, 0.0, steps)
            finished += task.candidates(candidate.noise[None], candidate.level, answer, self.max_steps + 1, [candidate.node])
        if not finished:
            task.warnings.append("the time ran out before the completion; the sample is an estimate")
            return best[0]
        return task.best(*finished)

    @staticmethod
    def _leading(task: Task, candidates: Sequence[Candidate], count: int) -> list[Candidate]:
        """The best `count`, best first."""
        return task.ranked(candidates)[:count]


@dataclass
class _Chain:
    """One chain: its state, the best of this level's proposals, and the book of its quota.

    Attributes:
        task: The search's.
        number: Of the chain.
        state: Where the proposals start from.
        base: Quota of a level before anything rolls over.
        best: What a proposal must beat to be taken at once.
        step: Number of the level.
        used: Proposals of this level so far.
        granted: Quota of every level that was entered.
        consumed: Proposals of every level that was left.
    """

    task: Task
    number: int
    state: Candidate
    base: int
    best: Candidate = field(init=False)
    step_best: Candidate | None = None
    step: int = 0
    used: int = 0
    granted: list[int] = field(default_factory=list)
    consumed: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.best, self.granted = self.state, [self.base]
        self.generator = self.task.stream(self.number)

    def propose(self, kernel: Kernel, levels: Sequence[float]) -> torch.Tensor:
        """The next state, drawn anew at each call."""
        now, then = (self.task.path.at(level) for level in levels[self.step : self.step + 2])
        noise = torch.randn(self.state.noise.shape, generator=self.generator)
        return kernel(self.state.noise, self.state.x0, now, then).sample(noise)

    def judge(self, candidate: Candidate, may_advance: bool) -> None:
        """Takes the proposal, or the level's best once the quota is used up, or waits for more."""
        self.used += 1
        self.step_best = self.task.best(self.step_best, candidate)
        accepted = self.task.best(self.best, candidate) is candidate
        if accepted:
            self.best = candidate
        if may_advance and (accepted or self.used >= self.granted[-1]):
            self.state = candidate if accepted else self.step_best
            left = self.granted[-1] - self.used
            self.consumed.append(self.used)
            self.granted.append(self.base + left)
            self.step, self.used, self.step_best = self.step + 1, 0, None
