"""Editing plans: what a click changes, and what it makes void."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hasten.accelerators.caching.plan import GUIDANCE, Action, Plan, PlanError
from hasten.app.demo import plan as tab
from hasten.app.demo.plan import Held, toggled
from hasten.app.demo.runs import Models
from hasten.app.errors import BadInput

C, R, F = Action.COMPUTE, Action.REUSE, Action.FORECAST
SITES = ("a", "b")


def made(rows: list[list[int]], terms: int = 0) -> Plan:
    actions = np.array(rows)[:, :, None]
    weights = np.ones((*actions.shape, terms)) if terms else None
    return Plan(actions, SITES, facts={"method": "planned", "certificate": {"predicted": 0.1}}, weights=weights)


def test_a_click_goes_round_the_three_actions_and_changes_no_other_cell() -> None:
    plan = made([[C, C], [C, R], [C, F]])
    once = toggled(plan, "1,0,0")
    assert [list(row) for row in once.actions[:, :, 0]] == [[C, C], [R, R], [C, F]]
    twice = toggled(once, "1,0,0")
    assert twice.actions[1, 0, 0] == F
    assert np.array_equal(toggled(twice, "1,0,0").actions, plan.actions)
    assert list(plan.actions[1, :, 0]) == [C, R]  # the plan itself stays


def test_an_edited_plan_no_longer_carries_what_was_measured_of_another() -> None:
    edited = toggled(toggled(made([[C, C], [C, R]]), "1,0,0"), "1,1,0")
    assert "certificate" not in edited.facts
    assert edited.facts["method"] == "planned, edited"  # said once


@given(st.data())
def test_weights_stay_where_the_computed_steps_before_them_are_the_same(data: st.DataObject) -> None:
    steps, terms = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 3))
    column = [0, *data.draw(st.lists(st.integers(0, 2), min_size=steps - 1, max_size=steps - 1))]
    step = data.draw(st.integers(1, steps - 1))
    plan = made([[cell, 0] for cell in column], terms)
    edited = toggled(plan, f"{step},0,0")
    assert edited.weights is not None
    after = edited.actions[:, 0, 0].tolist()

    def read(actions: list[int], at: int) -> list[int]:
        """Steps whose offsets a forecast at `at` adds up."""
        return [k for k in reversed(range(at)) if actions[k] == C][:terms]

    for k in range(steps):
        same = k != step and (after[k] == C or read(column, k) == read(after, k))
        if after[k] != C or k == step:
            assert edited.weights[k, 0, 0].all() == same
        assert edited.weights[k, 1, 0].all()  # the other site's


@pytest.mark.parametrize(
    ("cell", "why"),
    [
        ("0,0,0", "first step"),
        ("9,0,0", "no cell"),
        ("1,2,0", "no cell"),
        ("1,0,1", "no cell"),
        ("1,0", "named by"),
        ("-1,0,0", "named by"),
        ("1,0,0;", "named by"),
    ],
)
def test_a_cell_that_is_none_is_refused(cell: str, why: str) -> None:
    with pytest.raises(BadInput, match=why):
        toggled(made([[C, C], [C, C]]), cell)


def test_the_guidance_site_is_not_edited() -> None:
    plan = Plan(np.array([[C, C], [C, Action.SKIP_BRANCH]]), ("a", GUIDANCE))
    with pytest.raises(BadInput, match="guidance"):
        toggled(plan, "1,1,0")


def test_a_saved_plan_is_loaded_again_and_a_broken_one_is_refused_without_its_folder(tmp_path: Path) -> None:
    plan = toggled(made([[C, C], [C, F], [C, F]], terms=2), "1,0,0")
    file = tab.save(plan, tmp_path)
    assert Path(file).is_relative_to(tmp_path)
    held = tab.load(file, "shapes", 0)
    assert held.plan == plan and not held.edited
    broken = tmp_path / "plan.safetensors"
    broken.write_bytes(b"not a plan")
    with pytest.raises(PlanError) as why:
        tab.load(str(broken), "shapes", 0)
    assert str(tmp_path) not in str(why.value) and "plan.safetensors" in str(why.value)
    with pytest.raises(BadInput, match="make or load"):
        tab.edit(None, "1,0,0")


def test_a_plan_too_large_for_the_page_is_refused(tmp_path: Path) -> None:
    plan = Plan(np.zeros((tab.MOST_CELLS // 2 + 1, 2), int), SITES)
    with pytest.raises(BadInput, match="at most"):
        tab.load(tab.save(plan, tmp_path), "shapes", 0)


def test_a_difference_is_of_the_cells_and_not_of_the_lost_certificate() -> None:
    plan = made([[C, C], [C, R]])
    words = tab.difference(plan, toggled(plan, "1,0,0"), "title")
    assert "step 1, a: COMPUTE" in words and "certificate" not in words
    assert "the same" in tab.difference(plan, plan, "title")


def test_prompts_are_lines_and_must_be_two() -> None:
    assert tab.prompts_of("one\n\n  two  \n") == ("one", "two")
    for text in ("", "one", "\n".join(map(str, range(tab.MOST_PROMPTS + 1)))):
        with pytest.raises(BadInput, match="2 to 16 prompts"):
            tab.prompts_of(text)


def test_what_is_not_allowed_is_refused_before_anything_runs(models: Models) -> None:
    given = {"prompts": "a\nb", "model": "shapes", "target": "speed-up", "speedup": 2, "error": 0.1, "steps": 10, "replays": 1, "seed": 0}
    for changed, why in (
        ({"steps": 2}, "steps"),
        ({"model": "other"}, "model"),
        ({"target": "both"}, "target"),
        ({"prompts": "a"}, "2 to"),
    ):
        with pytest.raises(BadInput, match=why):
            tab.make(models, **{**given, **changed})  # type: ignore[arg-type]


def test_an_edited_plan_is_one_that_differs() -> None:
    plan = made([[C, C], [C, R]])
    held = Held(plan, plan, "shapes", (), 0)
    assert not held.edited and tab.edit(held, "1,0,0").edited
    assert tab.edit(held, "1,0,0").original is plan
