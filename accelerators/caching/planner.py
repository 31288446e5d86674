"""The planner: which steps to compute, and with which weights to forecast the others, for the least error at a given time.

A step that is not computed adds, in place of all blocks, a weighted sum of the last computed offsets; the weights are fitted per step
on the calibration's inner products (plain reuse and polynomials are special cases). Its error is weighed by how much the final
latents suffer from an error at that step. Which steps to compute is solved by the segment programme and improved by exchanges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
        """As a plan over all that the trace offers: its blocks, or a UNet's deep branch."""
        steps = len(self.weights)
        column = np.full(steps, Action.FORECAST)
        column[list(self.computed)] = Action.COMPUTE
        actions = np.repeat(column[:, None], len(trace.whole), 1)
        weights = np.broadcast_to(self.weights[:, None, None], (steps, len(trace.whole), 1, TERMS))
        bound = {"model": trace.model, "config": trace.config_hash}
        return Plan(actions, trace.whole, facts={**bound, **facts}, weights=weights)


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
        self._segments: dict[tuple[int, ...], tuple[float, np.ndarray]] = {}

    def weighed(self, factor: np.ndarray, coherence: float) -> Planner:
        """One whose sensitivities are those of this one times `factor` [T]; it shares what does not depend on them."""
        tables = replace(self.tables, sensitivity=self.tables.sensitivity * factor)
        other = Planner(tables, coherence=coherence, order=self.order, terms=self.terms, fitted=self.fitted)
        other._known = self._known
        return other

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
        weights, left = self._left(computed)
        scaled = left * self.tables.sensitivity[:, None]
        each = np.maximum(((scaled @ self.gram) * scaled).sum(1), 0.0)
        total = scaled.sum(0)
        together = max(float(total @ self.gram @ total), 0.0)
        predicted = (1 - self.coherence) * each.sum() + self.coherence * together
        return Schedule(tuple(sorted(set(computed))), weights, np.sqrt(each), float(np.sqrt(predicted)))

    def products(self, computed: Sequence[int]) -> np.ndarray:
        """[T, T] inner products of what a choice of computed steps leaves of each step's offset."""
        _, left = self._left(computed)
        return np.asarray(left @ self.gram @ left.T)

    def _left(self, computed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Weights [T, TERMS], and what is left of each step's offset as coefficients [T, T] of all steps' offsets."""
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
        return weights, left

    def solve(self, count: int) -> Schedule:
        """The best schedule found that computes `count` steps.

        Raises:
            ValueError: `count` is not from 1 to the number of steps.
        """
        steps = self.tables.steps
        if not 1 <= count <= steps:
            raise ValueError(f"count must be from 1 to {steps}, not {count}")
        found = [self._improved(tuple(start)) for start in self._starts(count)]
        self._segments.clear()
        return self.judge(min(found, key=self.predicted))

    def predicted(self, computed: Sequence[int]) -> float:
        """What `judge` predicts, at a fraction of the work: what a segment adds is kept from one choice to the next."""
        ends = [*computed[1:], self.tables.steps]
        parts = [self._segment(tuple(computed[i::-1][: self.terms]), end) for i, end in enumerate(ends)]
        together = self._norm(np.sum([total for _, total in parts], 0))
        return math.sqrt((1 - self.coherence) * sum(energy for energy, _ in parts) + self.coherence * together)

    def _norm(self, coefficients: np.ndarray) -> float:
        """Squared norm of a combination [T] of the steps' offsets."""
        return max(float(coefficients @ self.gram @ coefficients), 0.0)

    def _segment(self, sources: tuple[int, ...], end: int) -> tuple[float, np.ndarray]:
        """Of the steps from the last computed one to `end`: the sum of their squared errors, and of their errors as coefficients [T]."""
        key = (*sources, end)
        if key not in self._segments:
            energy, total = 0.0, np.zeros(self.tables.steps)
            for k in range(sources[0] + 1, end):
                scaled = self.tables.sensitivity[k] * self.residual(sources, k)[1]
                energy, total = energy + self._norm(scaled), total + scaled
            self._segments[key] = energy, total
        return self._segments[key]

    def _improved(self, computed: tuple[int, ...]) -> tuple[int, ...]:
        """Moves the step that helps most until none helps: first to places near it, which are few, then anywhere."""
        for reach in (2, self.tables.steps):
            least = self.predicted(computed)
            while True:
                best = min(self.neighbours(computed, reach), key=self.predicted, default=computed)
                if not self.predicted(best) < least * (1 - 1e-9):
                    break
                computed, least = best, self.predicted(best)
        return computed

    def _starts(self, count: int) -> list[list[int]]:
        """Where the search begins: the segment programme's cut for plain reuse, and spacings even, dense early and dense late."""
        g, gram = self.tables.sensitivity, self.gram
        apart = np.maximum(np.diag(gram)[:, None] + np.diag(gram)[None] - 2 * gram, 0.0)
        cost = np.triu(apart * np.square(g)[None]).cumsum(1)
        spaced = []
        for power in (1.0, 1.5, 1 / 1.5):
            at = np.floor(self.tables.steps * (np.arange(count) / count) ** power).astype(int)
            # Where they fall together, the later one moves on, as far as the end lets it.
            for i in range(1, count):
                at[i] = max(at[i], at[i - 1] + 1)
            spaced.append(np.minimum(at, self.tables.steps - count + np.arange(count)).tolist())
        return [segment_dp(cost, count).starts(count), *spaced]

    def neighbours(self, computed: Sequence[int], reach: int) -> Iterator[tuple[int, ...]]:
        """All choices in which one step is another, at most `reach` steps away."""
        chosen = set(computed)
        for out in sorted(chosen)[1:]:
            for into in range(max(1, out - reach), min(self.tables.steps, out + reach + 1)):
                if into not in chosen:
                    yield tuple(sorted(chosen - {out} | {into}))
