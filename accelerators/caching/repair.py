"""Mends a planner's model by replays: what it says of a few schedules is compared with what they do to the final latents.

A step's sensitivity comes from an error in that step alone. Many steps with errors also bend the path on which later ones are met, most
where the picture is settled and in the last steps, so a schedule can be several times worse than it was said to be. A smooth correction of
the sensitivities is fitted to the replays, the planner solves anew under it, and what it finds is replayed in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.calibrate import Tables
from hasten.accelerators.caching.planner import Planner, Schedule

COHERENCES = (0.0, 0.5, 1.0)
"""How far errors of different steps may add up: schedules are solved for each, and the replay decides."""
REPLAYS = 14
"""Most schedules of one number of computed steps that are replayed."""
PATIENCE = 5
"""Replays without a better schedule after which the search ends."""
KNOTS = 10
"""Of the piecewise linear correction."""
PULL, SMOOTH, FREE = 0.05, 0.1, 0.001
"""Weights of the correction's size, of the steps between its knots, and of the factor that all predictions share, against a replay's
squared logarithmic error. Twelve replays must not bend fifty sensitivities at will; a common factor changes no schedule."""


@dataclass(frozen=True)
class Replay:
    """A schedule that was tried.

    Attributes:
        computed: Its computed steps.
        products: [T, T] inner products of what the schedule leaves of each step's offset, not weighed by sensitivities.
        error: Relative error of the final latents.
    """

    computed: tuple[int, ...]
    products: np.ndarray
    error: float


class Repair:
    """A search by replays on one set of tables; what one number of computed steps teaches serves the next.

    Args:
        tables: From calibration.
        replay: Relative error of the final latents under a schedule.
        replays: Most schedules of one number of computed steps that are replayed.

    Raises:
        ValueError: `replays` is below 1.
    """

    def __init__(self, tables: Tables, replay: Callable[[Schedule], float], replays: int = REPLAYS) -> None:
        if replays < 1:
            raise ValueError(f"replays must be at least 1, not {replays}")
        self.tables, self.replay, self.replays = tables, replay, replays
        self.seen: dict[tuple[int, ...], Replay] = {}
        steps = np.arange(tables.steps)
        knots = np.linspace(0, tables.steps - 1, min(KNOTS, tables.steps))
        self.basis = np.stack([np.interp(steps, knots, row) for row in np.eye(len(knots))], 1)
        self.planner = Planner(tables)

    def search(self, count: int) -> tuple[Schedule, float]:
        """The best schedule replayed that computes `count` steps, and its error.

        Raises:
            ValueError: `count` is not from 1 to the number of steps.
        """
        best: tuple[Schedule, float] | None = None
        waiting = 0
        for tried, schedule in enumerate(self._proposals(count), 1):
            error = self._tried(schedule)
            waiting += 1
            if best is None or error < best[1]:
                best, waiting = (schedule, error), 0
            if tried >= self.replays or waiting >= PATIENCE:
                break
        assert best is not None
        return best

    def fit(self, coherence: float, count: int) -> Planner:
        """The planner whose predictions fit the replays best, those of about `count` computed steps first (Gauss-Newton)."""
        found = list(self.seen.values())
        near = np.sqrt([min(count, len(r.computed)) / max(count, len(r.computed)) for r in found])
        wanted = 2 * np.log([max(r.error, 1e-12) for r in found])
        width = self.basis.shape[1]
        between = np.diff(np.eye(width), axis=0)
        prior = np.zeros((width + len(between) + 1, width + 1))
        prior[:width, :width] = np.sqrt(PULL) * np.eye(width)
        prior[width:-1, :width] = np.sqrt(SMOOTH) * between
        prior[-1, -1] = np.sqrt(FREE)
        c = np.zeros(width + 1)
        for _ in range(8):
            g = self.tables.sensitivity * np.exp(self.basis @ c[:width] / 2)
            left, slopes = np.empty(len(found)), np.ones((len(found), width + 1))
            for i, r in enumerate(found):
                pulled = (1 - coherence) * np.diag(r.products) * g + coherence * r.products @ g
                square = max(float(g @ pulled), 1e-24)
                left[i] = np.log(square) + c[-1] - wanted[i]
                slopes[i, :width] = (pulled * g) @ self.basis / square
            jacobian = np.concatenate([slopes * near[:, None], prior])
            c = c - np.linalg.lstsq(jacobian, np.concatenate([left * near, prior @ c]), rcond=None)[0]
        factor = np.exp((self.basis @ c[:width] + c[-1]) / 2)
        return self.planner.weighed(factor, coherence)

    def _tried(self, schedule: Schedule) -> float:
        if schedule.computed not in self.seen:
            products = self.planner.products(schedule.computed)
            self.seen[schedule.computed] = Replay(schedule.computed, products, self.replay(schedule))
        return self.seen[schedule.computed].error

    def _proposals(self, count: int) -> Iterator[Schedule]:
        """The model's own solutions for each coherence, then those under the correction, fitted anew after each replay; where they bring
        nothing new, the exchange in the best schedule that promises most and was not tried."""
        offered: set[tuple[int, ...]] = set()

        def fresh(schedules: Iterable[Schedule]) -> Iterator[Schedule]:
            for schedule in schedules:
                if schedule.computed not in offered:
                    offered.add(schedule.computed)
                    yield schedule

        yield from fresh(self.planner.weighed(np.ones(self.tables.steps), coherence).solve(count) for coherence in COHERENCES)
        while True:
            before = len(offered)
            yield from fresh(self.fit(coherence, count).solve(count) for coherence in COHERENCES)
            if len(offered) > before:
                continue
            best = min(offered, key=lambda computed: self.seen[computed].error)
            planner = self.fit(0.5, count)
            near = [computed for computed in planner.neighbours(best, self.tables.steps) if computed not in offered]
            if not near:
                return
            yield from fresh([planner.judge(min(near, key=planner.predicted))])
