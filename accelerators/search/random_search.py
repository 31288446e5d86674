"""Random search over starting noises (arXiv 2501.09732), in growing pools as in tt-scale-flux.

Every round draws a fresh pool, twice the last one's size, and the best sample ever is kept. With fewer steps for the search than for the
final run it is a draft search: valid where a noise's rank hardly changes with the steps (`ditto2.rank_agreement` measures that).
"""

from __future__ import annotations

from dataclasses import dataclass

from hasten.accelerators.checks import check_whole
from hasten.accelerators.search.task import NOTHING, ROOT, Candidate, Search, Task


@dataclass(frozen=True)
class RandomSearch:
    """Pools of noises, the best of all.

    Attributes:
        rounds: 4 in tt-scale-flux's settings (recalled, not looked up).
        pool: Noises of the first round; 2 there.
        growth: Of the pool from round to round; 2 there. 1 keeps its size, and one round of N is best-of-N.
        steps: Denoiser calls of a search run; None for full runs. The paper searches SiT-XL with 50 and ends with 250. The final run of
            the best noise is kept in reserve and is not part of the search's own cost.
        threshold: Stop after a round whose best reaches it; None to go on.

    Raises:
        ValueError: A value is out of range.
    """

    rounds: int = 4
    pool: int = 2
    growth: int = 2
    steps: int | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        check_whole(1, rounds=self.rounds, pool=self.pool, growth=self.growth)
        if self.steps is not None and (type(self.steps) is not int or self.steps < 1):
            raise ValueError(f"steps must be a whole number of at least 1, or None for full runs, not {self.steps!r}")

    def __str__(self) -> str:
        return f"random search, {self.rounds} rounds of {self.pool} x{self.growth}" + (f", drafts of {self.steps}" if self.steps else "")

    def search(self, task: Task) -> Search:
        """See `SearchMethod`."""
        steps = task.steps if self.steps is None else min(self.steps, task.steps)
        reserve = task.cost(1, task.steps) if steps < task.steps else NOTHING
        best: Candidate | None = None
        for number in range(self.rounds):
            noises = task.fresh(self.pool * self.growth**number)
            answer = yield from task.explore(noises, task.path.top, 0.0, steps, reserve=reserve)
            pool = task.candidates(noises, task.path.top, answer, number)
            best = task.best(best, *pool) if pool else best
            if len(pool) < len(noises):
                task.warnings.append(f"the budget ended the search in round {number}, after {len(pool)} of {len(noises)} noises")
                break
            if self.threshold is not None and best is not None and task.value(best) >= self.threshold:
                break
        if best is not None and not reserve.particle_steps:
            return best
        # Either the drafts' best is run in full, or the budget was too small for any draft beside a full run.
        noise = best.noise if best is not None else task.fresh(1)[0]
        task.facts["final_particle_steps"] = task.steps
        final = yield from task.run(noise[None], self.rounds, [ROOT if best is None else best.node])
        if not final and best is not None:
            task.warnings.append("the time ran out before the final run; the sample is a draft")
        return final[0] if final or best is None else best
