"""The plan as data: what is kept, what is refused, what it says about itself."""

from __future__ import annotations

import copy
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from hasten.accelerators.caching.plan import Action, Plan, PlanError

names = st.text(min_size=1, max_size=8).filter(lambda name: name != "*")
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
facts = st.dictionaries(st.text(max_size=6).filter(lambda key: key != "steps"), json_values, max_size=4)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    steps, sites = draw(st.integers(1, 6)), draw(st.integers(0, 5))
    branches = draw(st.just(("*",)) | st.lists(names, min_size=1, max_size=3, unique=True).map(tuple))
    actions = draw(arrays(np.uint8, (steps, sites, len(branches)), elements=st.integers(0, 1)))
    paths = draw(st.lists(names, min_size=sites, max_size=sites, unique=True).map(tuple))
    return Plan(actions, paths, branches, draw(facts))


@given(plan=plans())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_save_and_load(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    plan.save(path)
    loaded = Plan.load(path)
    assert loaded == plan and loaded.hash == plan.hash and hash(loaded) == hash(plan)
    assert (loaded.sites, loaded.branches, loaded.facts) == (plan.sites, plan.branches, plan.facts)
    assert np.array_equal(loaded.actions, plan.actions)
    assert plan.diff(loaded) == ""
    assert list(tmp_path.iterdir()) == [path]


@given(one=plans(), other=plans())
def test_diff_is_empty_only_for_equal_plans(one: Plan, other: Plan) -> None:
    assert (one.diff(other) == "") is (one == other) is (one.hash == other.hash)
    assert one.diff(one) == ""


@given(plan=plans(), data=st.data())
def test_any_change_changes_the_hash(plan: Plan, data: st.DataObject) -> None:
    changed = []
    if plan.actions.size:
        actions = plan.actions.copy()
        cell = data.draw(st.integers(0, actions.size - 1))
        actions.reshape(-1)[cell] ^= 1
        changed.append(Plan(actions, plan.sites, plan.branches, plan.facts))
    if plan.sites:
        changed.append(Plan(plan.actions, (plan.sites[0] + "x" * 9, *plan.sites[1:]), plan.branches, plan.facts))
    changed.append(Plan(plan.actions, plan.sites, tuple(f"{b}xxxxxxxxx" for b in plan.branches), plan.facts))
    changed.append(Plan(plan.actions, plan.sites, plan.branches, {**plan.facts, "and another": None}))
    changed.append(
        Plan(np.concatenate([plan.actions, plan.actions[-1:]]), plan.sites, plan.branches, {**plan.facts, "steps": plan.steps + 1})
    )
    for other in changed:
        assert other.hash != plan.hash
        assert other != plan
        assert plan.diff(other) and other.diff(plan)


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0, False), (0.0, -0.0), ("1", 1), ([], {}), (None, "null")])
def test_facts_that_python_takes_for_equal(one: Any, other: Any) -> None:
    a, b = (Plan(np.zeros((1, 1), np.uint8), ("s",), facts={"fact": value}) for value in (one, other))
    assert a != b and a.diff(b)


@given(plan=plans())
def test_computed_fraction(plan: Plan) -> None:
    cells = [int(c) for c in plan.actions.reshape(-1)]
    assert plan.computed_fraction == pytest.approx(cells.count(0) / len(cells) if cells else 1.0)


@given(plan=plans(), data=st.data())
def test_the_bound_of_the_speedup(plan: Plan, data: st.DataObject) -> None:
    seconds = data.draw(st.lists(st.floats(0.001, 10), min_size=len(plan.sites), max_size=len(plan.sites)))
    rest = data.draw(st.floats(0.001, 10))
    bound = plan.speedup_bound((seconds, rest))
    whole = sum(seconds) + rest
    assert 1.0 - 1e-9 <= bound <= whole / rest * (1 + 1e-9)
    if (plan.actions == Action.COMPUTE).all():
        assert bound == pytest.approx(1.0)
    # Step by step, from the definition.
    spent = sum(rest + sum(s for s, a in zip(seconds, row, strict=True) if a == 0) for b in plan.branches for row in plan.branch(b))
    assert bound == pytest.approx(plan.steps * len(plan.branches) * whole / spent)


def test_the_bound_of_published_settings() -> None:
    """1 - (N-1)/N Nc/L, for 28 equal blocks and nothing beside them: PixArt's 1.60x and LCM's 1.08x and 1.12x."""
    for steps, cached, expected in ((20, 21, 1.6), (4, 4, 1.077), (4, 6, 1.12)):
        actions = np.zeros((steps, 28), np.uint8)
        actions[1::2, :cached] = 1
        plan = Plan(actions, tuple(map(str, range(28))))
        assert plan.speedup_bound(([1.0] * 28, 0.0)) == pytest.approx(expected, abs=1e-3)
    assert Plan(np.ones((2, 1), np.uint8), ("s",)).speedup_bound(([1.0], 0.0)) == math.inf


# ---------------------------------------------------------------------------------------------------------------- frozen


def test_a_plan_cannot_be_changed() -> None:
    mine = np.zeros((2, 2), np.uint8)
    plan = Plan(mine, ("a", "b"), facts={"note": 1})
    before = plan.hash
    mine[:] = 1  # the caller's array stays the caller's
    assert plan.hash == before and not plan.actions.any() and mine.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        plan.actions[0, 0, 0] = 1
    for change in (
        lambda: plan.facts.__setitem__("note", 2),
        lambda: plan.facts.update(note=2),
        lambda: plan.facts.pop("note"),
        lambda: plan.facts.clear(),
    ):
        with pytest.raises(TypeError, match="cannot be changed"):
            change()
    with pytest.raises(AttributeError):
        plan.sites = ("c", "d")  # type: ignore[misc]
    for twin in (copy.deepcopy(plan), copy.copy(plan), pickle.loads(pickle.dumps(plan))):
        assert twin == plan
    assert json.loads(json.dumps(plan.facts)) == {"note": 1, "steps": 2}
    assert len({plan, copy.deepcopy(plan)}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), ("a", "b", "c")), "whole numbers"),
        ((np.zeros(3, np.uint8), ("a",)), "whole numbers of shape"),
        ((np.zeros((2, 3), np.uint8), ("a", "b")), "there are 2 sites"),
        ((np.zeros((0, 1), np.uint8), ("a",)), "at least one step"),
        ((np.zeros((2, 1, 2), np.uint8), ("a",)), "1 branches"),
        ((np.full((2, 1), 4), ("a",)), "unknown action 4"),
        ((np.full((2, 1), 256), ("a",)), "unknown action 256"),
        ((np.full((2, 1), -1), ("a",)), "unknown action -1"),
        ((np.zeros((2, 2), np.uint8), ("a", "a")), "a name of its own"),
        ((np.zeros((2, 1), np.uint8), (1,)), "a name of its own"),
        ((np.zeros((2, 1, 2), np.uint8), ("a",), ("c", "c")), "a name of its own"),
        ((np.zeros((2, 1, 2), np.uint8), ("a",), ("*", "c")), "stands alone"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {"x": float("nan")}), "plain JSON"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {"x": object()}), "plain JSON"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {"steps": 3}), "its facts say 3 steps"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {"forecast_order": -1}), "forecast_order must be"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {}, np.zeros((2, 1, 1))), "weights must be finite"),
        ((np.zeros((2, 1), np.uint8), ("a",), ("*",), {}, np.full((2, 1, 1, 1), np.nan)), "weights must be finite"),
    ],
)
def test_what_is_no_plan(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(PlanError, match=message) as error:
        Plan(*arguments)
    assert "\n" not in str(error.value)


# ----------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def example() -> Plan:
    actions = np.zeros((6, 4, 2), np.uint8)
    actions[1::2, 2:, :] = 1
    notes = {"model": "Net", "config": "0123", "scheduler": "DDIMScheduler", "order": 1, "guidance": "2 calls", "sigmas": [3.0, 2.0, 1.0]}
    return Plan(actions, ("blocks.0", "blocks.1", "blocks.2", "blocks.3"), ("cond", "uncond"), notes)


def refused(path: Path) -> str:
    with pytest.raises(PlanError) as error:
        Plan.load(path)
    message = str(error.value)
    assert str(path) in message and "\n" not in message
    return message


def test_truncated_at_every_length(example: Plan, tmp_path: Path) -> None:
    path, cut = tmp_path / "plan.safetensors", tmp_path / "cut.safetensors"
    example.save(path)
    data = path.read_bytes()
    for length in {0, 1, 7, 8, 9, *range(0, len(data), 13), len(data) - 1}:
        cut.write_bytes(data[:length])
        refused(cut)
    cut.write_bytes(data + b"\0")
    refused(cut)


def test_every_byte_matters(example: Plan, tmp_path: Path) -> None:
    """A flipped bit anywhere is refused, or changes nothing (blanks that pad the header)."""
    path, bent = tmp_path / "plan.safetensors", tmp_path / "bent.safetensors"
    example.save(path)
    data = path.read_bytes()
    for position in range(len(data)):
        for mask in (0x01, 0x80):
            bent.write_bytes(data[:position] + bytes([data[position] ^ mask]) + data[position + 1 :])
            try:
                loaded = Plan.load(bent)
            except PlanError as error:
                assert "\n" not in str(error)
            else:
                assert loaded == example, position


@given(data=st.binary(max_size=300))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_random_bytes(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(data)
    refused(path)


def rewritten(path: Path, tensors: dict[str, Any] | None = None, **head: Any) -> None:
    """The same file with other content but a well-formed container."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        text = json.loads(file.metadata()["hasten_plan"])
        kept = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    text = {key: value for key, value in {**text, **head}.items() if value is not ...}
    path.write_bytes(safetensors.numpy.save({**kept, **(tensors or {})}, metadata={"hasten_plan": json.dumps(text)}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 2}, "format version 2, this hasten reads version 1"),
        ({"format_version": True}, "format version True"),
        ({"format_version": None}, "format version None"),
        ({"format_version": ...}, "format version None"),
        ({"sites": ["blocks.0", "blocks.1", "blocks.3", "blocks.2"]}, "does not match its checksum"),
        ({"sites": ["blocks.0"]}, "was altered"),
        ({"sites": 4}, "was altered"),
        ({"sites": ...}, "does not hold exactly what a plan holds"),
        ({"branches": ["uncond", "cond"]}, "checksum"),
        ({"branches": None}, "was altered"),
        ({"facts": {"model": "Other"}}, "checksum"),
        ({"facts": 3}, "was altered"),
        ({"facts": {"steps": 7}}, "its facts say 7 steps"),
        ({"digest": "0" * 64}, "checksum"),
        ({"code": "import os"}, "does not hold exactly what a plan holds"),
        ({"tensors": {"more": np.zeros(3)}}, "does not hold exactly what a plan holds"),
        ({"tensors": {"actions": np.zeros((6, 4, 2), np.float32)}}, "whole numbers"),
        ({"tensors": {"actions": np.zeros((6, 4, 2), np.uint8)}}, "checksum"),
        ({"tensors": {"actions": np.full((6, 4, 2), 9, np.uint8)}}, "unknown action 9"),
        ({"tensors": {"actions": np.zeros((5, 4, 2), np.uint8)}}, "was altered"),
    ],
)
def test_altered(example: Plan, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "plan.safetensors"
    example.save(path)
    rewritten(path, **change)
    assert message in refused(path)


def test_no_plan_at_all(tmp_path: Path) -> None:
    assert "there is no plan file" in refused(tmp_path / "missing.safetensors")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder")
    text = tmp_path / "plan.json"
    text.write_text('{"steps": 20}')
    assert "not a safetensors file" in refused(text)
    weights = tmp_path / "weights.safetensors"
    for metadata in (None, {"format": "pt"}, {"hasten_plan": "no json"}, {"hasten_plan": "[" * 100_000}, {"hasten_plan": "[1]"}):
        weights.write_bytes(safetensors.numpy.save({"actions": np.zeros(2, np.float32)}, metadata=metadata))
        refused(weights)


def test_saving_where_it_cannot_be_saved(example: Plan, tmp_path: Path) -> None:
    for target in (tmp_path / "missing" / "plan.safetensors", tmp_path):
        with pytest.raises(PlanError, match="cannot write the plan to"):
            example.save(target)
    assert list(tmp_path.iterdir()) == [] and not list(tmp_path.parent.glob(f".{tmp_path.name}*"))


def test_saving_over_another_plan(example: Plan, tmp_path: Path) -> None:
    path = tmp_path / "plan.safetensors"
    Plan(np.zeros((1, 1), np.uint8), ("s",)).save(path)
    example.save(path)
    assert Plan.load(path) == example
    assert path.stat().st_mode & 0o444 == 0o444  # others may read it


# --------------------------------------------------------------------------------------------------------------- binding


@pytest.mark.parametrize(
    ("name", "value"), [("model", "Other"), ("config", "ffff"), ("steps", 7), ("guidance", "single"), ("scheduler", "Euler"), ("order", 2)]
)
def test_hard_facts(example: Plan, name: str, value: Any) -> None:
    fitting = dict(example.facts)
    assert example.check(fitting) == []
    assert example.check({}) == []
    with pytest.raises(PlanError, match=f"the plan is for {name} .*, this run has {value!r}"):
        example.check({**fitting, name: value})


def test_soft_facts() -> None:
    plan = Plan(np.zeros((3, 1), np.uint8), ("s",), facts={"dtype": "float32", "resolution": [4, 8, 8], "sigmas": [3.0, 2.0, 1.0]})
    assert plan.check({"dtype": "float32", "resolution": [4, 8, 8], "sigmas": [3.1, 2.0, 0.96]}) == []
    assert plan.check({"dtype": "bfloat16"}) == ["the plan was made for dtype 'float32', this run has 'bfloat16'"]
    assert plan.check({"resolution": [4, 16, 16]}) == ["the plan was made for resolution [4, 8, 8], this run has [4, 16, 16]"]
    assert plan.check({"sigmas": [3.0, 2.0, 0.9]}) == ["the plan's noise levels differ from this run's by up to 10%"]
    assert len(plan.check({"sigmas": [3.0, 2.0]})) == 1
    zero = Plan(np.zeros((2, 1), np.uint8), ("s",), facts={"sigmas": [1.0, 0.0]})
    assert zero.check({"sigmas": [1.0, 0.0]}) == []


# --------------------------------------------------------------------------------------------------------------- looking


@given(plan=plans())
def test_the_table_shows_every_cell(plan: Plan) -> None:
    text = str(plan)
    assert plan.hash in text
    shown = [line for line in text.splitlines() if line[:4].strip().isdigit() and set(line[5:]) <= {"#", "."}]
    assert sum(line[5:].count(".") for line in shown) >= int((plan.actions == Action.REUSE).sum())


def test_the_table(example: Plan) -> None:
    lines = str(example).splitlines()
    assert lines[0].startswith(f"plan {example.hash}: 6 steps x 4 sites, 75.0% computed")
    assert lines[2:5] == ["branch cond", "   0 ####", "   1 ##.."]
    assert lines[9] == "branch uncond"
    assert lines[-1] == "     from blocks.0 to blocks.3"


def test_diff_says_where(example: Plan) -> None:
    actions = example.actions.copy()
    actions[3, 1, 1] = 1
    other = Plan(actions, example.sites, example.branches, {**example.facts, "guidance": "single"})
    assert example.diff(other).splitlines() == ['guidance: "2 calls" -> "single"', "step 3, blocks.1 (uncond): COMPUTE -> REUSE"]
    moved = Plan(example.actions, ("blocks.0", "blocks.1", "x", "blocks.3"), example.branches, example.facts)
    assert example.diff(moved) == "sites: 4 -> 4, from number 2 on blocks.2, blocks.3 -> x, blocks.3"
    many = Plan(1 - example.actions, example.sites, example.branches, example.facts)
    assert example.diff(many).splitlines()[-1] == "... and 28 more of 48 cells"


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_plot_writes_a_picture(example: Plan, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plan.{suffix}"
    axes = example.plot(path)
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(magic)
    assert np.array_equal(axes.images[0].get_array(), np.concatenate([example.actions[:, :, 0].T, example.actions[:, :, 1].T]))
    assert example.plot(axes, title="again") is axes
    assert axes.get_title() == "again"


def test_a_plan_without_sites_is_drawn_and_saved(tmp_path: Path) -> None:
    plan = Plan(np.zeros((3, 0), np.uint8), ())
    assert plan.computed_fraction == 1.0
    assert plan.speedup_bound(([], 1.0)) == 1.0
    plan.plot(tmp_path / "none.png")
    assert "0 sites" in str(plan)
