"""What holds for every schedule: rows are independent, nothing is read back, states can be moved about, and limits meet where they must."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hasten.accelerators.decoding.adablock import AdaBlock
from hasten.accelerators.decoding.ccd import CCD
from hasten.accelerators.decoding.compatibility import refuse
from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.daedal import DAEDAL
from hasten.accelerators.decoding.editing import TokenEditing
from hasten.accelerators.decoding.entropy_bound import EntropyBoundDecoding
from hasten.accelerators.decoding.factor import FactorDecoding
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.accelerators.decoding.hierarchical import HierarchicalDecoding
from hasten.accelerators.decoding.klass import KLASS
from hasten.accelerators.decoding.rcr import RCR
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.schedule import Decision, Schedule, State
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.statistics import Sampling, measure
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO
from tests.accelerators.decoding.toys import (
    MASK,
    REVISING,
    SAMPLING,
    SCHEDULES,
    VOCABULARY,
    Episode,
    NoSync,
    Synchronised,
    drawn,
    measured,
)

every = pytest.mark.parametrize("name", SCHEDULES)


def same(a: Decision, b: Decision) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def tensors(state: State) -> list[Tensor]:
    found: list[Tensor] = []
    state.map(lambda value: found.append(value) or value)  # type: ignore[func-returns-value]
    return found


# --------------------------------------------------------------------------------------------------------- what always holds


@every
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_decision_only_touches_what_it_may(name: str, temperature: float) -> None:
    for seed in range(4):
        episode = Episode.of(seed, rows=4)
        committed = torch.zeros(4, dtype=torch.int64)
        trace = episode.run(SCHEDULES[name], Sampling(MASK, (3,), temperature))
        for statistics, decision, current in trace:
            assert ((decision.tokens != MASK) & (decision.tokens != 3)).all()
            candidates = statistics.masked & episode.active
            assert not (decision.commits & ~candidates).any()
            assert not ((decision.edits | decision.remasks) & (candidates | ~episode.active)).any()
            assert not (decision.edits & decision.remasks).any()
            assert (decision.commits.any(-1) == candidates.any(-1)).all()  # progress, wherever there is something to do
            assert name in REVISING or not (decision.edits | decision.remasks).any()
            committed += decision.commits.sum(-1) - decision.remasks.sum(-1)
            after = decision.apply(current, MASK)
            assert torch.equal(after[~episode.active], episode.current[~episode.active])
            assert not (decision.settled & (after.eq(MASK) & episode.active).any(-1)).any()
        assert trace[-1][1].settled.all() and torch.equal(committed, episode.active.sum(-1))


@every
def test_a_row_is_decided_alone_as_among_others(name: str) -> None:
    episode = Episode.of(11, rows=5, steps=6)
    schedule = SCHEDULES[name]
    state = schedule.init(*episode.current.shape)
    alone = [schedule.init(1, 8) for _ in range(5)]
    current = episode.current
    for step in range(6):
        key = episode.key._replace(steps=episode.key.steps + step)
        statistics = measured(schedule, state, episode.logits[step], current, episode.shadows[step], key, SAMPLING)
        decision, state = schedule.select(statistics, state, episode.active)
        for r in range(5):
            rows = torch.tensor([r])
            own, alone[r] = schedule.select(statistics.reindex(rows), alone[r], episode.active[rows])
            assert same(own, Decision(*(value[rows] for value in decision)))
            assert all(torch.equal(a, b) for a, b in zip(tensors(alone[r]), tensors(state.reindex(rows)), strict=True))
        current = decision.apply(current, MASK)


@every
def test_nothing_is_read_back(name: str) -> None:
    episode = Episode.of(2)
    schedule = SCHEDULES[name]
    with NoSync():
        state = schedule.init(3, 8)
        current = episode.current
        for step in range(4):
            state = schedule.restart(state, episode.active[:, step])
            key = episode.key._replace(steps=episode.key.steps + step)
            sampling = Sampling(MASK, (1, 2), temperature=float(step % 2))
            statistics = measured(schedule, state, episode.logits[step], current, episode.shadows[step], key, sampling)
            decision, state = schedule.select(statistics, state, episode.active)
            current = decision.apply(current, MASK)
        state = schedule.rearrange(state, torch.arange(8).expand(3, -1) - 1)
        state.reindex(torch.tensor([2, 0]))


def test_the_probe_for_synchronisation_sees_it() -> None:
    x, mask = torch.ones(3), torch.tensor([True, False, True])
    for read in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[mask], lambda: x.nonzero(), lambda: torch.equal(x, x)):
        with NoSync(), pytest.raises(Synchronised):
            read()


@every
def test_a_state_can_be_reindexed_between_steps(name: str) -> None:
    episode, schedule = Episode.of(21, rows=4, steps=5), SCHEDULES[name]
    straight = episode.run(schedule)
    order = torch.tensor([2, 0, 3, 2])
    state, current, rows = schedule.init(4, 8), episode.current, torch.arange(4)
    for step, (_, expected, _) in enumerate(straight):
        if step == 2:
            state, current, rows = state.reindex(order), current[order], order
        part = episode.rows(rows)
        key = part.key._replace(steps=part.key.steps + step)
        statistics = measured(schedule, state, part.logits[step], current, part.shadows[step], key, SAMPLING)
        decision, state = schedule.select(statistics, state, part.active)
        assert same(decision, Decision(*(value[rows] for value in expected)))
        current = decision.apply(current, MASK)


@every
def test_a_restarted_row_remembers_nothing(name: str) -> None:
    schedule, first, second = SCHEDULES[name], Episode.of(31, steps=3), Episode.of(32, steps=8)
    state, current = schedule.init(3, 8), first.current
    for step in range(3):
        statistics = measured(schedule, state, first.logits[step], current, first.shadows[step], first.key, SAMPLING)
        decision, state = schedule.select(statistics, state, first.active)
        current = decision.apply(current, MASK)
    before = tensors(state)
    state = schedule.restart(state, torch.tensor([True, False, True]))
    fresh = tensors(schedule.init(3, 8))
    for restarted, old, new in zip(tensors(state), before, fresh, strict=True):
        assert torch.equal(restarted[1], old[1]) and torch.equal(restarted[0], new[0]) and torch.equal(restarted[2], new[2])
    current = second.current
    for step, (_, expected, _) in enumerate(second.run(schedule)):
        key = second.key._replace(steps=second.key.steps + step)
        statistics = measured(schedule, state, second.logits[step], current, second.shadows[step], key, SAMPLING)
        decision, state = schedule.select(statistics, state, second.active)
        rows = torch.tensor([0, 2])
        assert all(torch.equal(a[rows], b[rows]) for a, b in zip(decision, expected, strict=True))
        current = torch.where(rows.new_tensor([1, 0, 1]).bool()[:, None], decision.apply(current, MASK), current)


@every
def test_memory_moves_with_the_positions(name: str) -> None:
    schedule, episode = SCHEDULES[name], Episode.of(41, steps=3)
    state, current = schedule.init(3, 8), episode.current
    for step in range(3):
        statistics = measured(schedule, state, episode.logits[step], current, episode.shadows[step], episode.key, SAMPLING)
        decision, state = schedule.select(statistics, state, episode.active)
        current = decision.apply(current, MASK)
    source = torch.tensor([[0, 1, -1, -1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6, 7], [7, -1, 0, 1, 2, 3, 4, 5]])
    fresh = tensors(schedule.init(3, 8))
    for moved, old, new in zip(tensors(schedule.rearrange(state, source)), tensors(state), fresh, strict=True):
        if old.ndim == 1:
            assert torch.equal(moved, old)
            continue
        for r in range(3):
            for i in range(8):
                j = int(source[r, i])
                assert torch.equal(moved[r, i], new[r, i] if j < 0 else old[r, j])


def test_what_is_revised_is_forgotten() -> None:
    schedule = Saber(n=2, rule=CreditDecoding(rule=StaticDecoding(tokens_per_step=2)))
    episode = Episode.of(7, rows=6, steps=3)
    state, current, remasked = schedule.init(6, 8), episode.current, 0
    for step in range(3):
        statistics = measured(schedule, state, episode.logits[step], current, episode.shadows[step], episode.key, SAMPLING)
        decision, state = schedule.select(statistics, state, episode.active)
        assert (state.transform["credit"][decision.remasks] == 0).all() and (state.transform["ids"][decision.remasks] == -1).all()
        remasked += int(decision.remasks.sum())
        current = decision.apply(current, MASK)
    assert remasked and (state.transform["credit"] > 0).any()


# -------------------------------------------------------------------------------------------------------------- equivalences


def agree(a: Schedule, b: Schedule, seed: int, change: Callable[[Episode], Episode] = lambda episode: episode) -> None:
    """Both schedules decide the same in every step."""
    episode = change(Episode.of(seed, coarse=seed % 2 == 0, alike=0.5 * (seed % 3)))
    left, right = (episode.run(schedule) for schedule in (a, b))
    assert len(left) == len(right)
    for (_, one, _), (_, other, _) in zip(left, right, strict=True):
        assert torch.equal(one.commits, other.commits) and torch.equal(one.edits, other.edits) and torch.equal(one.remasks, other.remasks)
        assert torch.equal(one.tokens[one.commits | one.edits], other.tokens[other.commits | other.edits])
        assert torch.equal(one.settled, other.settled)


ONE = StaticDecoding()
LIMITS: dict[str, tuple[Schedule, Schedule]] = {
    "a threshold above 1 is static": (ThresholdDecoding(1.1), ONE),
    "a threshold above 1 with a minimum is static": (ThresholdDecoding(1.1, minimum=3), StaticDecoding(tokens_per_step=3)),
    "a threshold of 0 is one step": (ThresholdDecoding(0.0), StaticDecoding(steps=1)),
    "a factor of 0 is static": (FactorDecoding(0.0), ONE),
    "a small factor is static": (FactorDecoding(1e-6), ONE),
    "a large factor is one step": (FactorDecoding(1e6), StaticDecoding(steps=1)),
    "hierarchical at 1 is static": (HierarchicalDecoding(1.0, 1.0), ONE),
    "hierarchical at 0 is one step": (HierarchicalDecoding(0.0, 0.0), StaticDecoding(steps=1)),
    "credit without weight is its rule": (CreditDecoding(0.4, alpha=0.0), ThresholdDecoding(0.4)),
    "credit without weight is its factor": (CreditDecoding(alpha=0.0, rule=FactorDecoding()), FactorDecoding()),
    "an infinite entropy bound is one step": (EntropyBoundDecoding(float("inf")), StaticDecoding(steps=1)),
    "no history is entropy": (CCD(history=1, tokens_per_step=2), StaticDecoding("entropy", tokens_per_step=2)),
    "stability out of reach is static": (KLASS(divergence=0.0), ONE),
    "stability for nothing out of reach is static": (KLASS(threshold=1.1, divergence=1e9, window=1), ONE),
    "editing off is its rule": (TokenEditing(None, ThresholdDecoding(0.4)), ThresholdDecoding(0.4)),
    "no step for editing is its rule": (TokenEditing(1.0, ThresholdDecoding(0.4), max_post_steps=0), ThresholdDecoding(0.4)),
    "wide in above 1 is static": (WINO(wide=1.1), ONE),
    "narrow out at 0 is its rule": (WINO(narrow=0.0, rule=ThresholdDecoding(0.4)), ThresholdDecoding(0.4)),
    "backtracking one token is none": (Saber(n=1, rule=ThresholdDecoding(1.1)), ONE),
    "saber without backtracking on a rule is the rule": (Saber(backtrack=False, rule=FactorDecoding()), FactorDecoding()),
    "remasking in one step is one step": (RCR(rule=StaticDecoding(steps=1)), StaticDecoding(steps=1)),
    "as many steps as tokens are one at a time": (StaticDecoding(steps=8), ONE),
    "credit inside or outside of editing": (REVISING["editing-credit"], TokenEditing(0.3, CreditDecoding(rule=FactorDecoding()))),
}


@pytest.mark.parametrize("name", LIMITS)
def test_limits(name: str) -> None:
    a, b = LIMITS[name]
    for seed in range(6):
        agree(a, b, seed)


def test_an_entropy_bound_of_0_is_static_by_entropy() -> None:
    # As far as entropies are above 0: a position without any costs nothing.
    for seed in range(1, 12, 2):
        agree(EntropyBoundDecoding(0.0), StaticDecoding("entropy"), seed)


def test_saber_never_takes_back_while_it_commits_one_at_a_time() -> None:
    # With equal confidences nothing is above the mean of those before, so that it is static decoding.
    def flat(episode: Episode) -> Episode:
        logits = [torch.nn.functional.one_hot(z.argmax(-1), VOCABULARY).float() for z in episode.logits]
        return Episode(episode.current, episode.active, logits, episode.shadows, episode.key)

    for seed in range(6):
        agree(Saber(n=1), ONE, seed, flat)


# --------------------------------------------------------------------------------------------------------------- composition


def test_nesting_order_does_not_matter() -> None:
    a = CreditDecoding(rule=TokenEditing(0.3, StaticDecoding("margin")))
    b = TokenEditing(0.3, CreditDecoding(rule=StaticDecoding("margin")))
    assert a.parts == b.parts and a.needs == b.needs and a.needs.top == 9 and a.needs.second


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "two transforms": (lambda: CCD(rule=CreditDecoding()), "HistoryAverage cannot stand on Credit"),
    "two credits, far apart": (lambda: CreditDecoding(rule=TokenEditing(rule=CreditDecoding())), "Credit cannot stand on Credit"),
    "two revisions": (lambda: TokenEditing(rule=Saber()), "Edit cannot stand on Backtrack"),
    "three revisions": (lambda: WINO(rule=RCR()), "NarrowOut cannot stand on RunningConfidence"),
    "revision under credit under revision": (lambda: RCR(rule=CreditDecoding(rule=WINO())), "RunningConfidence cannot stand on NarrowOut"),
    "drafts of what is revised": (lambda: FreeDave(Saber()), "Saber goes back on tokens that stand"),
    "drafts of what is revised below": (lambda: FreeDave(CreditDecoding(rule=TokenEditing())), "CreditDecoding goes back"),
    "entropy and a threshold": (lambda: ThresholdDecoding(score="entropy"), "at most 0"),
    "chance and a factor": (lambda: FactorDecoding(score="random"), "says nothing"),
    "chance remembered": (lambda: RCR(score="random"), "remembers nothing"),
    "coherence and another rule": (lambda: CCD(dynamic=True, rule=StaticDecoding()), "a rule of its own"),
    "steps and tokens a step": (lambda: StaticDecoding(steps=3, tokens_per_step=2), "already says"),
    "drafts and insertion": (lambda: refuse(StaticDecoding(), geometry=DAEDAL(), drafts=True), "insertion moves the positions"),
    "insertion and a cache": (lambda: refuse(StaticDecoding(), geometry=DAEDAL(), cache="prefix"), "insertion moves every later"),
    "adaptive blocks and a block-causal cache": (lambda: refuse(ONE, geometry=AdaBlock(), cache="block-append"), "were trained with"),
    "revision and delayed keys": (lambda: refuse(WINO(), cache="delayed"), "may still change"),
    "revision and chosen keys": (lambda: refuse(TokenEditing(), cache="selective"), "may still change"),
    "an unknown cache": (lambda: refuse(ONE, cache="magic"), "cache must be one of"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused_with_the_reason(name: str) -> None:
    build, reason = REFUSED[name]
    with pytest.raises(ValueError, match=reason):
        build()


def test_what_goes_together_is_not_refused() -> None:
    for cache in ("none", "prefix", "dual", "vicinity", "block-append"):
        refuse(Saber(), geometry=FixedBlocks(), cache=cache)
    refuse(CreditDecoding(), geometry=AdaBlock(), cache="dual", drafts=True)
    refuse(ThresholdDecoding(), geometry=FixedBlocks(), cache="delayed")
    refuse(RCR(), geometry=DAEDAL())
    FreeDave(CreditDecoding(rule=KLASS()))


INVALID: dict[str, tuple[Callable[[], Any], str]] = {
    "threshold": (lambda: ThresholdDecoding(float("nan")), "threshold must be"),
    "minimum": (lambda: ThresholdDecoding(minimum=0), "minimum must be"),
    "steps": (lambda: StaticDecoding(steps=0), "steps must be"),
    "score": (lambda: StaticDecoding("best"), "score must be one of"),  # type: ignore[arg-type]
    "curve": (lambda: StaticDecoding(curve="round"), "curve must be one of"),  # type: ignore[arg-type]
    "factor": (lambda: FactorDecoding(-1), "factor must be"),
    "low": (lambda: HierarchicalDecoding(0.95, 0.9), "low must be from 0 to the threshold"),
    "bound": (lambda: EntropyBoundDecoding(-0.1), "bound must be"),
    "window": (lambda: KLASS(window=0), "window must be"),
    "support": (lambda: CCD(support=1), "support must be"),
    "beta": (lambda: CreditDecoding(beta=1.1), "beta must be a number from 0 to 1, not 1.1"),
    "alpha": (lambda: CreditDecoding(alpha=float("inf")), "alpha must be"),
    "slots": (lambda: CreditDecoding(slots=0), "slots must be"),
    "mu": (lambda: Saber(mu=0), "mu must be"),
    "signal": (lambda: Saber(signal="both"), "signal must be one of"),  # type: ignore[arg-type]
    "wide": (lambda: WINO(wide=-1), "wide must be"),
    "editing": (lambda: TokenEditing(-0.5), "threshold must be"),
    "posts": (lambda: TokenEditing(max_post_steps=-1), "max_post_steps must be"),
    "drafts": (lambda: FreeDave(drafts=0), "drafts must be"),
    "agreement": (lambda: FreeDave(agreement="maybe"), "agreement must be one of"),  # type: ignore[arg-type]
    "delimiters": (lambda: AdaBlock(()), "delimiters must be"),
    "share": (lambda: AdaBlock(share=0), "share must be"),
    "lengths": (lambda: FixedBlocks((4, 0)), "block_length must be"),
    "initial length": (lambda: DAEDAL(100, 99), "initial_length must be at most"),
    "expansion": (lambda: DAEDAL(expansion=1), "expansion must be"),
    "rows": (lambda: ONE.init(0, 4), "rows and length must be"),
}


@pytest.mark.parametrize("name", INVALID)
def test_values_out_of_range_are_refused_by_name(name: str) -> None:
    build, message = INVALID[name]
    with pytest.raises(ValueError, match=message):
        build()


@settings(max_examples=10)
@given(seed=st.integers(0, 10**6))
def test_statistics_that_lack_something_are_refused(seed: int) -> None:
    logits = drawn(torch.Generator().manual_seed(seed), 1, 4)
    current = torch.full((1, 4), MASK)
    plain = measure(logits, current, SAMPLING)
    for schedule, missing in (
        (WINO(), "shadow"),
        (StaticDecoding("random"), "lots"),
        (KLASS(), "64 most probable"),
        (CreditDecoding(), "8 probes"),
    ):
        with pytest.raises(ValueError, match=missing):
            schedule.select(plain, schedule.init(1, 4))
    for rows, width in ((2, 4), (1, 5)):
        schedule = Saber()
        with pytest.raises(ValueError, match="the state of Saber is of"):
            schedule.select(plain, schedule.init(rows, width))
    with pytest.raises(ValueError, match="0 probes"):
        ONE.select(measure(logits, current, SAMPLING, probes=current[..., None]), ONE.init(1, 4))
