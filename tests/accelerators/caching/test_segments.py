"""The compiler from plan rows to spans: whatever is reused comes from the last step that computed it, and is kept just as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hasten.accelerators.caching.forward import Spare
from hasten.accelerators.caching.plan import Action
from hasten.accelerators.caching.segments import Row, Span, Use, breaks_of, noise_fractions, polynomial_weights, program, state_bytes
from hasten.accelerators.caching.trace import Block, Chain, Stream, Trace


def trace_of(gaps: list[str], skips: dict[int, tuple[int, ...]] | None = None, kept: frozenset[int] = frozenset()) -> Trace:
    """A trace of blocks with one stream of 8 bytes each; a gap of '-' is a block that is not offered."""
    blocks: list[Block] = []
    chains: list[list[int]] = []
    for i, gap in enumerate(gaps):
        offered = gap != "-"
        if offered:
            if gap == "seam" or not chains or (blocks and blocks[-1].chain < 0):
                chains.append([])
            chains[-1].append(i)
        stream = Stream(0, 0, None, (2,), torch.float32)
        blocks.append(
            Block(
                f"b.{i}",
                1,
                seconds=1.0,
                chain=len(chains) - 1 if offered else -1,
                gap=gap if offered else "linked",
                streams=(stream,),
                skips_from=(skips or {}).get(i, ()),
                kept=i in kept,
                reason=None if offered else "not offered",
            )
        )
    return Trace("Toy", "0", tuple(blocks), tuple(Chain(tuple(c), 1) for c in chains), 10.0, "float32", (2,))


def once(start: int, stop: int, source: int) -> Use:
    """Plain reuse of what was stored at step `source`."""
    return Use(start, stop, ((source, 1.0),))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Trace, np.ndarray]:
    n = draw(st.integers(1, 8))
    gaps = ["seam"] + [draw(st.sampled_from(["linked", "linked", "linked", "added", "seam", "-"])) for _ in range(n - 1)]
    skips = {i: (draw(st.integers(0, i - 2)),) for i in range(2, n) if draw(st.integers(0, 4)) == 0}
    kept = draw(st.frozensets(st.integers(0, n - 1), max_size=2))
    trace = trace_of(gaps, skips, kept)
    steps = draw(st.integers(1, 8))
    return trace, draw(arrays(np.uint8, (steps, len(trace.sites)), elements=st.integers(0, 2)))


@given(case=cases(), force_store=st.booleans())
def test_every_reused_value_comes_from_the_last_computing_step(case: tuple[Trace, np.ndarray], force_store: bool) -> None:
    trace, actions = case
    rows, reasons = program(trace, actions, force_store=force_store)
    computed: dict[int, list[int]] = {}
    held: set[Span] = set()
    never = 0
    for k, row in enumerate(rows):
        covered = [s for span in row.reuse for s in range(span.start, span.stop)]
        assert len(covered) == len(set(covered))
        for use in row.reuse:
            assert set(use.spans) <= held, "reused before it was stored"
            for s in range(use.start, use.stop):
                # A forecast is the straight line through the last two, as far as there are two.
                terms = 2 if actions[k, s] == Action.FORECAST else 1
                assert [source for source, _ in use.terms] == computed[s][-1 : -terms - 1 : -1]
            assert sum(weight for _, weight in use.terms) == pytest.approx(1.0)
        for s in range(actions.shape[1]):
            if s in covered:
                assert actions[k, s] != Action.COMPUTE
            else:
                never += int(actions[k, s] != Action.COMPUTE)
                computed.setdefault(s, []).append(k)
        for span in row.store:
            assert span.source == k
            assert not set(range(span.start, span.stop)) & set(covered), "only what is computed can be collected"
            assert span not in held
        held |= set(row.store)
        if force_store:
            assert {s for span in row.store for s in range(span.start, span.stop)} == set(range(actions.shape[1])) - set(covered)
        for span in row.release:
            assert span in held
        held -= set(row.release)
        later = {span for after in rows[k + 1 :] for use in after.reuse for span in use.spans}
        assert later & {s for s in held if s.source <= k} == {s for s in later if s.source <= k}, "released too early"
        if not force_store:
            assert all(span in later for span in held), "kept although nobody reads it"
    assert never == len(reasons)


@given(case=cases())
def test_spans_end_where_the_model_must_see_the_stream(case: tuple[Trace, np.ndarray]) -> None:
    trace, actions = case
    rows, _ = program(trace, actions)
    offered = trace.offered
    for row in rows:
        covered = {s for span in row.reuse for s in range(span.start, span.stop)}
        for span in row.reuse:
            inside = offered[span.start : span.stop]
            assert list(inside) == list(range(inside[0], inside[-1] + 1)), "a block that is not offered lies inside"
            assert len({trace.blocks[i].chain for i in inside}) == 1
            assert all(trace.blocks[i].gap != "seam" for i in inside[1:])
            assert not any(trace.blocks[i].kept for i in inside[:-1])
            for i, block in enumerate(trace.blocks):
                read = set(block.skips_from) & set(inside[:-1])
                reused = i in {offered[s] for s in covered}
                assert not read or reused, "a computed block reads the inside of a span"


def test_neighbours_merge_only_where_their_values_are_of_one_step() -> None:
    trace = trace_of(["seam"] + ["linked"] * 4)
    actions = np.array([[0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [1, 1, 1, 1, 1]])
    rows, reasons = program(trace, actions)
    assert not reasons
    assert rows[1].reuse == (once(0, 2, 0), once(4, 5, 0))
    assert rows[2].reuse == (once(0, 2, 0), once(2, 4, 1), once(4, 5, 0))
    assert rows[0].store == (Span(0, 2, 0), Span(4, 5, 0)) and rows[1].store == (Span(2, 4, 1),)
    assert rows[2].release == (Span(0, 2, 0), Span(2, 4, 1), Span(4, 5, 0))


def test_the_boundary_of_delta_dit_needs_no_extra_step() -> None:
    """Rear early, front late: the front's offset is that of the last step before the switch, where the front was computed anyway."""
    trace = trace_of(["seam"] + ["linked"] * 3)
    actions = np.zeros((6, 4), np.uint8)
    actions[1:3, 2:], actions[3:6, :2] = 1, 1
    rows, reasons = program(trace, actions)
    assert not reasons
    assert [row.store for row in rows] == [(Span(2, 4, 0),), (), (Span(0, 2, 2),), (), (), ()]
    assert [row.reuse for row in rows] == [(), *[(once(2, 4, 0),)] * 2, *[(once(0, 2, 2),)] * 3]
    assert rows[2].release == (Span(2, 4, 0),)


def test_reuse_before_anything_was_computed() -> None:
    rows, reasons = program(trace_of(["seam", "linked"]), np.array([[1, 0], [1, 1]]))
    assert rows[0] == Row((), (Span(0, 2, 0),), ())
    assert reasons == ["step 0, b.0: computed, since it was never computed before"]


def test_a_skip_that_a_reused_block_reads_breaks_nothing() -> None:
    trace = trace_of(["seam"] + ["linked"] * 3, {3: (0,)})
    assert breaks_of(trace, [True] * 4) == {0}
    assert breaks_of(trace, [True, True, True, False]) == {0, 1}


def test_state_bytes() -> None:
    trace = trace_of(["seam"] + ["linked"] * 3)
    actions = np.zeros((6, 4), np.uint8)
    assert state_bytes(trace, program(trace, actions)[0]) == 0
    assert state_bytes(trace, program(trace, actions, force_store=True)[0]) == 4 * 8  # this step's
    actions[1:3, 2:], actions[3:6, :2] = 1, 1
    assert state_bytes(trace, program(trace, actions)[0]) == 2 * 8


@pytest.mark.parametrize("n", [1, 3])
def test_no_sites(n: int) -> None:
    trace = trace_of(["-"] * n)
    rows, reasons = program(trace, np.zeros((2, 0), np.uint8))
    assert rows == [Row(), Row()] and not reasons and state_bytes(trace, rows) == 0


def test_a_forecast_is_the_polynomial_through_the_last_computed_offsets() -> None:
    trace = trace_of(["seam", "linked"])
    actions = np.array([[0, 0], [0, 0], [2, 2], [0, 0], [2, 2], [2, 2]])
    levels = [1.0, 0.9, 0.7, 0.6, 0.5, 0.1]

    def terms(**options: Any) -> list[tuple[tuple[int, float], ...]]:
        rows, _ = program(trace, actions, levels=levels, **options)
        assert all(len(row.reuse) <= 1 for row in rows), "equal forecasts are one span"
        return [row.reuse[0].terms for row in rows if row.reuse]

    assert terms(order=0) == [((1, 1.0),), ((3, 1.0),), ((3, 1.0),)]
    assert [[source for source, _ in t] for t in terms(order=2)] == [[1, 0], [3, 1, 0], [3, 1, 0]]
    for order in (0, 1, 2):
        for k, found in zip((2, 4, 5), terms(order=order), strict=True):
            for power in range(len(found)):  # exact on polynomials of its order
                assert sum(w * levels[source] ** power for source, w in found) == pytest.approx(levels[k] ** power)
    rows, _ = program(trace, actions, order=2, levels=levels)
    assert rows[0].store == (Span(0, 2, 0),) and rows[5].release == (Span(0, 2, 0), Span(0, 2, 1), Span(0, 2, 3))


def test_a_forecast_with_weights_of_its_own() -> None:
    trace = trace_of(["seam", "linked"])
    weights = np.zeros((3, 2, 3), np.float32)
    weights[2, 0] = 1.5, -0.5, 9.0  # a third was never computed
    rows, _ = program(trace, np.array([[0, 0], [0, 0], [2, 1]]), weights=weights)
    assert rows[2].reuse == (Use(0, 1, ((1, 1.5), (0, -0.5))), once(1, 2, 1))


def test_noise_levels_as_fractions() -> None:
    assert noise_fractions([1.0, 0.25]).tolist() == [1.0, 0.25]
    assert noise_fractions([3.0, 0.0]).tolist() == [0.75, 0.0]
    assert polynomial_weights(np.array([0.5, 0.5]), 0.4) == (1.0, 0.0), "a node that comes twice counts once"


def test_spare_memory_is_used_again_and_only_where_it_fits() -> None:
    spare = Spare()
    kept, grown = torch.zeros(2, 3), torch.zeros(4, 3)
    spare.give({0: kept, 1: grown})
    a, b = torch.rand(2, 3), torch.rand(2, 3)
    made = spare.subtract(a, b)
    assert made is kept and torch.equal(made, a - b)
    again = spare.subtract(a, b)
    assert again.data_ptr() not in (kept.data_ptr(), grown.data_ptr()) and torch.equal(again, a - b)
    assert spare.subtract(torch.rand(4, 3).double(), torch.rand(4, 3).double()).dtype == torch.float64
    watched = torch.rand(4, 3, requires_grad=True)
    assert spare.subtract(watched, grown).requires_grad
    with torch.inference_mode():
        assert spare.subtract(torch.rand(4, 3), torch.rand(4, 3)).is_inference()
