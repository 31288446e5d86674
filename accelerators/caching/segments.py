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
    """Sites [start, stop) and the step whose offsets they stand for."""

    start: int
    stop: int
    source: int


@dataclass(frozen=True)
class Row:
    """One step: spans to add, spans whose offsets are collected, spans that are not needed afterwards."""

    reuse: tuple[Span, ...] = ()
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


def program(trace: Trace, actions: np.ndarray, *, force_store: bool = False) -> tuple[list[Row], list[str]]:
    """Compiles the actions [steps, sites] of one branch.

    Args:
        force_store: Collect the offset of every site at every step, whether anything reads it or not (for tests and timing).

    Returns:
        A row per step, and the reasons for cells that cannot be reused although the plan says so.
    """
    steps, sites = actions.shape
    last: list[int | None] = [None] * sites
    reuse: list[list[Span]] = []
    reasons: list[str] = []
    for k in range(steps):
        reused = [bool(actions[k, s] == Action.REUSE) and last[s] is not None for s in range(sites)]
        for s in range(sites):
            if actions[k, s] == Action.REUSE and not reused[s]:
                reasons.append(f"step {k}, {trace.sites[s]}: computed, since it was never computed before")
        breaks = breaks_of(trace, reused)
        spans: list[Span] = []
        for s in range(sites):
            if not reused[s]:
                last[s] = k
                continue
            source = last[s]
            assert source is not None
            if spans and spans[-1].stop == s and spans[-1].source == source and s not in breaks:
                spans[-1] = Span(spans[-1].start, s + 1, source)
            else:
                spans.append(Span(s, s + 1, source))
        reuse.append(spans)
    final = {span: k for k, spans in enumerate(reuse) for span in spans}
    store: list[list[Span]] = [[] for _ in range(steps)]
    release: list[list[Span]] = [[] for _ in range(steps)]
    for span, k in final.items():
        store[span.source].append(span)
        release[k].append(span)
    if force_store:
        for k in range(steps):
            computed = [s for s in range(sites) if not any(span.start <= s < span.stop for span in reuse[k])]
            extra = [span for s in computed if (span := Span(s, s + 1, k)) not in final]
            store[k] += extra
            release[k] += extra
    return [Row(tuple(sorted(r)), tuple(sorted(s)), tuple(sorted(x))) for r, s, x in zip(reuse, store, release, strict=True)], reasons


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
