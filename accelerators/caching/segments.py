"""Turns a plan's rows into what the runtime does: which spans are added at which step, and which offsets are kept for them.

A reused cell (step k, site s) stands for the offset that site s had when it was last computed. Neighbouring reused cells whose
values come from the same step are one span with one stored tensor per stream. Spans end at seams, and at blocks whose output is
read by a later block outside the span (long skips) or kept by the model: there the model must see the partial sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hasten.accelerators.caching.plan import Action
from hasten.accelerators.caching.trace import Trace


class Span(NamedTuple):
    """The offset of sites [start, stop), summed, as it was at step `source`: what is stored."""

    start: int
    stop: int
    source: int


class Use(NamedTuple):
    """Sites [start, stop) and what is added in their place: stored offsets, by source step, each with its weight; newest first."""

    start: int
    stop: int
    terms: tuple[tuple[int, float], ...]

    @property
    def spans(self) -> tuple[Span, ...]:
        """The stored offsets that it reads."""
        return tuple(Span(self.start, self.stop, source) for source, _ in self.terms)


@dataclass(frozen=True)
class Row:
    """One step: what is added, spans whose offsets are collected, spans that are not needed afterwards."""

    reuse: tuple[Use, ...] = ()
    store: tuple[Span, ...] = ()
    release: tuple[Span, ...] = ()


def breaks_of(trace: Trace, reused: Sequence[bool]) -> set[int]:
    """Sites at which a new span must begin, if the sites marked in `reused` are not computed."""
    offered = trace.offered
    site = {block: s for s, block in enumerate(offered)}
    breaks = {0}
    for s, i in enumerate(offered):
        block = trace.blocks[i]
        if block.gap == "seam" or (s and (offered[s - 1] != i - 1 or trace.blocks[offered[s - 1]].chain != block.chain)):
            breaks.add(s)
        if block.kept:
            breaks.add(s + 1)
    for i, block in enumerate(trace.blocks):
        reader = site.get(i)
        for producer in block.skips_from:
            # A reader that is reused itself never looks at the skip.
            if producer in site and not (reader is not None and reused[reader]):
                breaks.add(site[producer] + 1)
    return breaks


def program(
    trace: Trace,
    actions: np.ndarray,
    *,
    weights: np.ndarray | None = None,
    order: int = 1,
    levels: Sequence[float] | None = None,
    force_store: bool = False,
) -> tuple[list[Row], list[str]]:
    """Compiles the actions [steps, sites] of one branch.

    Args:
        weights: [steps, sites, terms] of a forecast cell's stored offsets, newest first; where all are 0, or there are none, the
            polynomial through the last `order + 1` of them.
        order: Of that polynomial.
        levels: Noise level of every step, over which it is drawn; the steps' numbers unless told.
        force_store: Collect the offset of every site at every step, whether anything reads it or not (for tests and timing).

    Returns:
        A row per step, and the reasons for cells that cannot be reused although the plan says so.
    """
    steps, sites = actions.shape
    times = noise_fractions(levels) if levels is not None and len(levels) == steps else np.arange(steps, dtype=np.float64)
    most = max(order + 1, weights.shape[-1] if weights is not None else 0)
    computed: list[list[int]] = [[] for _ in range(sites)]
    reuse: list[list[Use]] = []
    reasons: list[str] = []
    for k in range(steps):
        reused = [bool(actions[k, s] != Action.COMPUTE) and bool(computed[s]) for s in range(sites)]
        for s in range(sites):
            if actions[k, s] != Action.COMPUTE and not reused[s]:
                reasons.append(f"step {k}, {trace.sites[s]}: computed, since it was never computed before")
        breaks = breaks_of(trace, reused)
        uses: list[Use] = []
        for s in range(sites):
            if not reused[s]:
                computed[s] = [k, *computed[s]][:most]
                continue
            own = weights[k, s] if weights is not None else None
            if actions[k, s] == Action.FORECAST:
                terms = forecast_terms(computed[s], times, k, order, own)
            else:
                terms = ((computed[s][0], 1.0),)
            if uses and uses[-1].stop == s and uses[-1].terms == terms and s not in breaks:
                uses[-1] = Use(uses[-1].start, s + 1, terms)
            else:
                uses.append(Use(s, s + 1, terms))
        reuse.append(uses)
    final = {span: k for k, uses in enumerate(reuse) for use in uses for span in use.spans}
    store: list[list[Span]] = [[] for _ in range(steps)]
    release: list[list[Span]] = [[] for _ in range(steps)]
    for span, k in final.items():
        store[span.source].append(span)
        release[k].append(span)
    if force_store:
        for k in range(steps):
            skipped = [s for s in range(sites) if not any(use.start <= s < use.stop for use in reuse[k])]
            extra = [span for s in skipped if (span := Span(s, s + 1, k)) not in final]
            store[k] += extra
            release[k] += extra
    return [Row(tuple(sorted(r)), tuple(sorted(s)), tuple(sorted(x))) for r, s, x in zip(reuse, store, release, strict=True)], reasons


def forecast_terms(history: Sequence[int], times: np.ndarray, k: int, order: int, own: np.ndarray | None) -> tuple[tuple[int, float], ...]:
    """Source steps and weights of a forecast; fewer where the history is short.

    Args:
        history: Computed steps, newest first.
        times: [steps], over which the polynomial is drawn.
        k: The step that is forecast.
        order: Of the polynomial.
        own: [terms] weights, newest first, that take the polynomial's place unless all are 0.
    """
    if own is not None and own.any():
        given = [float(weight) for weight in own[: len(history)]]
        return tuple((source, weight) for source, weight in zip(history, given, strict=False) if weight) or ((history[0], 1.0),)
    nodes = history[: order + 1]
    return tuple(zip(nodes, polynomial_weights(times[nodes], times[k]), strict=True))


def noise_fractions(levels: Sequence[float]) -> np.ndarray:
    """Noise levels as the noise's share from 0 to 1: a rectified flow's sigma as it stands, another sigma as sigma / (1 + sigma).

    A variance-preserving sampler's sigmas run over four decades, which no polynomial follows.
    """
    sigma = np.asarray(levels, dtype=np.float64)
    return sigma / (1 + sigma) if sigma.max(initial=0.0) > 1.0 + 1e-6 else sigma


def polynomial_weights(nodes: np.ndarray, at: float) -> tuple[float, ...]:
    """Weights of values at `nodes` in the polynomial through them, taken at `at` (Lagrange; equal to divided differences).

    A node that repeats an earlier one is left out.
    """
    kept: list[float] = []
    index = []
    for i, node in enumerate(nodes):
        if all(abs(node - other) > 1e-9 for other in kept):
            kept.append(float(node))
            index.append(i)
    weights = [0.0] * len(nodes)
    for i, node in zip(index, kept, strict=True):
        weights[i] = float(np.prod([(at - other) / (node - other) for other in kept if other != node]))
    return tuple(weights)


def state_bytes(trace: Trace, rows: Sequence[Row]) -> int:
    """Most bytes of stored offsets alive at once for one branch, at the traced shapes."""
    offered = trace.offered

    def size(span: Span) -> int:
        streams = {s.index: s.bytes for i in offered[span.start : span.stop] for s in trace.blocks[i].streams}
        return sum(streams.values())

    alive: set[Span] = set()
    most = 0
    for row in rows:
        alive |= set(row.store)
        most = max(most, sum(map(size, alive)))
        alive -= set(row.release)
    return most
