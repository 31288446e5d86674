"""The repair by replays, on tables whose sensitivities are wrong while the replay knows the right ones."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from hasten.accelerators.caching.calibrate import Tables
from hasten.accelerators.caching.planner import Planner, Schedule
from hasten.accelerators.caching.repair import COHERENCES, Repair

STEPS = 14
LEVELS = tuple(np.linspace(1.0, 0.1, STEPS))


def offsets(seed: int) -> np.ndarray:
    """[T, T] inner products of offsets that move smoothly, fast at first."""
    rng, t = np.random.default_rng(seed), np.linspace(0, 1, STEPS)
    basis = np.stack([np.ones(STEPS), t, np.exp(-6 * t), np.sin(3 * t), np.cos(9 * t)])
    path = np.einsum("bt,sbd->std", basis, rng.normal(size=(3, 5, 40)))
    return np.asarray(path @ path.transpose(0, 2, 1))


class World:
    """Replays are judged with sensitivities that the planner was not told: its own are flat, the true ones are high at the end."""

    def __init__(self, seed: int) -> None:
        gram = offsets(seed)
        self.told = Tables(gram, np.ones(STEPS), LEVELS)
        self.true = Planner(Tables(gram, np.exp(np.linspace(-2, 3, STEPS)), LEVELS), coherence=0.5)
        self.replayed: list[tuple[int, ...]] = []

    def error(self, schedule: Schedule) -> float:
        self.replayed.append(schedule.computed)
        return self.true.judge(schedule.computed).predicted


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_what_is_best_in_truth(seed: int) -> None:
    world = World(seed)
    own = min(world.true.judge(Planner(world.told, coherence=c).solve(5).computed).predicted for c in COHERENCES)
    best = min(world.true.judge([0, *rest]).predicted for rest in itertools.combinations(range(1, STEPS), 4))
    schedule, error = Repair(world.told, world.error).search(5)
    assert error == world.true.judge(schedule.computed).predicted and len(schedule.computed) == 5
    assert error <= best * 1.15
    assert own > best * 1.3, "the told sensitivities alone must lead astray, or nothing was tested"


def test_what_one_count_taught_serves_the_next() -> None:
    world = World(0)
    repair = Repair(world.told, world.error)
    for count in (8, 6):
        repair.search(count)
    corrected = repair.fit(0.5, 5).solve(5)
    plain = Planner(world.told, coherence=0.5).solve(5)
    assert world.true.judge(corrected.computed).predicted < 0.8 * world.true.judge(plain.computed).predicted


def test_the_fit_finds_the_shape_of_the_true_sensitivities() -> None:
    world = World(1)
    repair = Repair(world.told, world.error)
    for count in (9, 7, 5, 4):
        repair.search(count)
    found = np.log(repair.fit(0.5, 5).tables.sensitivity)
    assert np.corrcoef(found, np.linspace(-2, 3, STEPS))[0, 1] > 0.9
    predicted = [repair.fit(0.5, 5).judge(seen.computed).predicted / seen.error for seen in repair.seen.values()]
    assert max(predicted) / min(predicted) < 3


def test_nothing_is_replayed_twice_nor_more_often_than_allowed() -> None:
    world = World(2)
    repair = Repair(world.told, world.error, replays=6)
    first = repair.search(5)
    assert 3 <= len(world.replayed) <= 6 and len(set(world.replayed)) == len(world.replayed)
    before = len(world.replayed)
    again = repair.search(5)
    assert again[1] <= first[1] and len(set(world.replayed)) == len(world.replayed) >= before
    alone = World(2)
    assert Repair(alone.told, alone.error, replays=1).search(5)[0].computed == Planner(alone.told, coherence=0.0).solve(5).computed
    assert len(alone.replayed) == 1


def test_every_step_or_one_step_leaves_no_choice() -> None:
    world = World(0)
    repair = Repair(world.told, world.error)
    assert repair.search(STEPS)[1] == 0
    assert repair.search(1)[0].computed == (0,)


def test_limits_are_named() -> None:
    world = World(0)
    with pytest.raises(ValueError, match="replays must be at least 1, not 0"):
        Repair(world.told, world.error, replays=0)
    with pytest.raises(ValueError, match=f"count must be from 1 to {STEPS}, not 99"):
        Repair(world.told, world.error).search(99)
