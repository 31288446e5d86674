"""The planner: which steps to compute, and with which weights to forecast the others, for the least error at a given time.

A step that is not computed adds, in place of all blocks, a weighted sum of the last computed offsets; the weights are fitted per step
on the calibration's inner products (plain reuse and polynomials are special cases). Its error is weighed by how much the final
latents suffer from an error at that step. Which steps to compute is solved by the segment programme and improved by exchanges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hasten.accelerators.caching.calibrate import Tables
from hasten.accelerators.caching.plan import Action, Plan
from hasten.accelerators.caching.segments import noise_fractions, polynomial_weights
from hasten.accelerators.caching.solver import segment_dp
from hasten.accelerators.caching.trace import Trace

TERMS = 3
"""Stored offsets that a forecast may weigh."""
RIDGE = 1e-3
"""Pull of fitted weights towards the straight line, relative to the offsets' own size: few samples must not decide alone."""


@dataclass(frozen=True)
class Schedule:
    """Which steps are computed, and the weights of the others.

    Attributes:
        computed: Steps, ascending; the first is 0.
        weights: [T, TERMS], of the last computed offsets, newest first; 0 in computed steps.
        errors: [T] predicted relative error of the final latents from each step alone.
        predicted: Of all of them together.
    """

    computed: tuple[int, ...]
    weights: np.ndarray
    errors: np.ndarray
    predicted: float

    def plan(self, trace: Trace, **facts: object) -> Plan:
        """As a plan over the trace's sites."""
        steps = len(self.weights)
        column = np.full(steps, Action.FORECAST)
        column[list(self.computed)] = Action.COMPUTE
        actions = np.repeat(column[:, None], len(trace.sites), 1)
        weights = np.broadcast_to(self.weights[:, None, None], (steps, len(trace.sites), 1, TERMS))
        bound = {"model": trace.model, "config": trace.config_hash}
        return Plan(actions, trace.sites, facts={**bound, **facts}, weights=weights)


class Planner:
    """Solves for schedules on one set of tables.

    Args:
        tables: From calibration.
        coherence: How far errors of different steps add up in the final latents instead of averaging out: 0 to 1.
        order: Of the polynomial towards which the fit is pulled.
        terms: Stored offsets in a forecast, 1 to `TERMS`.
        fitted: Whether weights are fitted; else they are the polynomial's.
    """

    def __init__(self, tables: Tables, *, coherence: float = 0.5, order: int = 1, terms: int = TERMS, fitted: bool = True) -> None:
        if not 1 <= terms <= TERMS:
            raise ValueError(f"terms must be from 1 to {TERMS}, not {terms}")
        self.tables, self.coherence, self.order, self.terms, self.fitted = tables, coherence, order, terms, fitted
        self.gram = tables.mean
        levels = tables.levels
        self.times = noise_fractions(levels) if levels is not None else np.arange(tables.steps, dtype=np.float64)
        self._known: dict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = {}

    def forecast(self, sources: Sequence[int], step: int) -> np.ndarray:
        """Weights of the offsets of `sources`, newest first, for `step`."""
        nodes = list(sources[: min(self.order + 1, self.terms)])
        prior = np.zeros(len(sources))
        prior[: len(nodes)] = polynomial_weights(self.times[nodes], float(self.times[step]))
        if not self.fitted:
            return prior
        among = self.gram[np.ix_(sources, sources)]
        towards = self.gram[sources, step]
        pull = RIDGE * np.trace(among) / len(sources) * np.eye(len(sources))
        return np.asarray(np.linalg.solve(among + pull, towards + pull @ prior))

    def residual(self, sources: tuple[int, ...], step: int) -> tuple[np.ndarray, np.ndarray]:
        """Weights, and what is left of the step's offset as coefficients [T] of all steps' offsets."""
        key = (*sources, step)
        if key not in self._known:
            weights = self.forecast(list(sources), step)
            left = np.zeros(self.tables.steps)
            left[step] = 1.0
            left[list(sources)] -= weights
            self._known[key] = weights, left
        return self._known[key]

    def judge(self, computed: Sequence[int]) -> Schedule:
        """Weights and predicted errors of a choice of computed steps."""
        steps = self.tables.steps
        weights, left = np.zeros((steps, TERMS)), np.zeros((steps, steps))
        history: list[int] = []
        chosen = set(computed)
        for k in range(steps):
            if k in chosen:
                history = [k, *history[: self.terms - 1]]
            else:
                found, left[k] = self.residual(tuple(history), k)
                weights[k, : len(found)] = found
        scaled = left * self.tables.sensitivity[:, None]
        each = np.maximum(((scaled @ self.gram) * scaled).sum(1), 0.0)
        total = scaled.sum(0)
        together = max(float(total @ self.gram @ total), 0.0)
        predicted = (1 - self.coherence) * each.sum() + self.coherence * together
        return Schedule(tuple(sorted(chosen)), weights, np.sqrt(each), float(np.sqrt(predicted)))

    def solve(self, count: int) -> Schedule:
        """The best schedule found that computes `count` steps.

        Raises:
            ValueError: `count` is not from 1 to the number of steps.
        """
        steps = self.tables.steps
        if not 1 <= count <= steps:
            raise ValueError(f"count must be from 1 to {steps}, not {count}")
        best = min((self.judge(start) for start in self._starts(count)), key=lambda schedule: schedule.predicted)
        while True:
            better = self._exchange(best)
            if better is None:
                return best
            best = better

    def _starts(self, count: int) -> list[list[int]]:
        """Where the search begins: the segment programme's cut for plain reuse, and even spacing."""
        g, gram = self.tables.sensitivity, self.gram
        apart = np.maximum(np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram, 0.0)
        cost = np.triu(apart * np.square(g)[None]).cumsum(1)
        even = sorted({round(i * self.tables.steps / count) for i in range(count)})
        return [segment_dp(cost, count).starts(count), even]

    def _exchange(self, schedule: Schedule) -> Schedule | None:
        """The best schedule that differs in one step, if it is better."""
        chosen = set(schedule.computed)
        best: Schedule | None = None
        for out in schedule.computed[1:]:
            for into in range(1, self.tables.steps):
                if into not in chosen:
                    other = self.judge(sorted(chosen - {out} | {into}))
                    if other.predicted < (best or schedule).predicted * (1 - 1e-9):
                        best = other
        return best
