"""Rows become jobs or one-line errors: every key, the defaults, keys that must be equal, and rows of any kind."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.app.batch.jobs import KEYS, PROMPT_LIMIT, Job, Rules
from hasten.app.errors import BadInput

RULES = Rules(shipped=True, arguments=("eta", "max_sequence_length"))


def job(row: dict[str, Any], defaults: dict[str, Any] | None = None, number: int = 0) -> Job:
    return Job.from_row(row, defaults, "line 7", number=number, rules=RULES)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({}, "prompt is missing"),
        ({"prompt": "  "}, "prompt must not be empty"),
        ({"prompt": 3}, "prompt must be a text, not 3"),
        ({"prompt": "a" * 100_000}, "prompt must have at most 10,000 characters, not 100,000"),
        ({"prompt": "a\ud800"}, "half surrogates"),
        ({"prompt": "a\0b"}, "zero characters"),
        ({"prompt": "a", "promt": "b"}, "unknown key 'promt'; did you mean prompt?"),
        ({"prompt": "a", "id": "../../etc/passwd"}, "id must be at most 128 letters, digits"),
        ({"prompt": "a", "id": "/abs"}, "id must"),
        ({"prompt": "a", "id": "a..b"}, "no '..'"),
        ({"prompt": "a", "id": "a/b"}, "id must"),
        ({"prompt": "a", "id": ".hidden"}, "begin with a letter or digit"),
        ({"prompt": "a", "id": "nul"}, "device"),
        ({"prompt": "a", "id": "a" * 129}, "at most 128"),
        ({"prompt": "a", "id": 3}, "id must"),
        ({"prompt": "a", "seed": -1}, "seed must be a whole number from 0"),
        ({"prompt": "a", "seed": 1.5}, "seed must"),
        ({"prompt": "a", "seed": True}, "seed must"),
        ({"prompt": "a", "seed": 10**5000}, "seed must"),
        ({"prompt": "a", "width": -64, "height": 64}, "width must be a whole number from 1 to 16384, not -64"),
        ({"prompt": "a", "width": 64}, "height is missing: width is given"),
        ({"prompt": "a", "size": "64x64", "width": 64}, "one or the other"),
        ({"prompt": "a", "size": "-3x4"}, "size must be width and height in pixels such as 1024x768, not '-3x4'"),
        ({"prompt": "a", "steps": 0}, "steps must be a whole number from 1 to 10000, not 0"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance must be a number from 0"),
        ({"prompt": "a", "guidance": "7"}, "guidance must"),
        ({"prompt": "a", "method": "deltadit"}, "method must be one of"),
        ({"prompt": "a", "method": "teacache", "interval": 2}, "method must be delta-dit where interval is given"),
        ({"prompt": "a", "plan": "/nowhere/plan.safetensors"}, "there is no plan file"),
        ({"prompt": "a", "plan": "x", "method": "none"}, "plan says everything that method would"),
        ({"prompt": "a", "skip_guidance": 1}, "skip_guidance must be a whole number of at least 2"),
        ({"prompt": "a", "particles": 4}, "particles needs steer or search"),
        ({"prompt": "a", "steer": "fkk", "reward": "brightness"}, "did you mean fk?"),
        ({"prompt": "a", "steer": "fk"}, "prompt cannot be judged by reward shapes"),
        ({"prompt": "a", "steer": "fk", "search": "random"}, "one of the two"),
        ({"prompt": "a", "steer": "fk", "reward": "brightness", "select": "all"}, "a job makes one picture"),
        ({"prompt": "a", "steer": "fk", "reward": "brightness", "set": {"lambda": "high"}}, "set lambda_ must be a number"),
        ({"prompt": "a", "latents": [1]}, "latents cannot be given by a job"),
        ({"prompt": "a", "generator": 3}, "generator is given by the key seed"),
        ({"prompt": "a", "arguments": {"eat": 0.5}}, "takes no 'eat'; did you mean eta?"),
        ({"prompt": "a", "arguments": [1]}, "arguments must be names with values"),
        ({"prompt": "a", "eta": float("inf")}, "eta must be plain data"),
        ({"prompt": "a", "model": "shapes"}, "the same for all jobs of a run; --model says it"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_with_its_place(row: dict[str, Any], said: str) -> None:
    with pytest.raises(BadInput) as error:
        job(row)
    message = str(error.value)
    assert message.startswith("line 7: ") and said in message and "\n" not in message and "--" not in message.replace("--model", "")


def test_a_row_goes_before_the_defaults_group_by_group() -> None:
    defaults = {"steps": 20, "seed": 100, "size": "64x32", "method": "delta-dit", "interval": 3, "eta": 0.1, "negative_prompt": "dark"}
    plain = job({"prompt": "a"}, defaults, number=4)
    assert (plain.steps, plain.seed, plain.width, plain.height, plain.negative_prompt) == (20, 104, 64, 32, "dark")
    assert plain.caching == {"method": "delta-dit", "interval": 3} and plain.arguments == {"eta": 0.1}
    own = job({"prompt": "a", "seed": 5, "width": 16, "height": 16, "method": "none", "eta": 0.5, "steps": None}, defaults, number=4)
    assert (own.steps, own.seed, own.width, own.height) == (20, 5, 16, 16)
    assert own.caching == {"method": "none"} and own.arguments == {"eta": 0.5}


def test_jobs_of_one_key_differ_in_what_each_picture_has_for_itself_alone() -> None:
    row = {"prompt": "a", "steps": 4, "eta": 0.5, "negative_prompt": "b"}
    same = [row, {**row, "prompt": "c"}, {**row, "seed": 9}, {**row, "id": "x"}, {**row, "negative_prompt": "d"}]
    assert len({job(one).key() for one in same}) == 1
    other: list[dict[str, Any]] = [
        {"steps": 5}, {"eta": 0.6}, {"size": "64x64"}, {"guidance": 2}, {"method": "none"}, {"negative_prompt": None}
    ]  # fmt: skip
    assert len({job({**row, **change}).key() for change in other} | {job(row).key()}) == len(other) + 1
    assert json.loads(job(row).key())["steps"] == 4


def test_names_follow_from_number_and_contents() -> None:
    a, b = job({"prompt": "a"}), job({"prompt": "b"})
    assert a.id == f"000001-{a.digest()[:8]}" and a.id != b.id
    assert job({"prompt": "a"}, number=1).digest() != a.digest()  # its seed is the next one
    assert job({"prompt": "a", "id": "mine"}).digest() == a.digest()


TEXT = st.text(max_size=12) | st.sampled_from(["fk", "best-of-n", "none", "delta-dit", "shapes", "brightness", "64x64", "../x", "a b"])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUE = st.recursive(SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6)
ROW = st.dictionaries(st.sampled_from([*KEYS, "eta", "latents", "model"]) | TEXT, VALUE, max_size=6)
ANSWERS = Rules(shipped=False, arguments=("eta",))


@given(ROW, ROW)
@settings(max_examples=200)
def test_any_row_is_a_job_or_one_line(row: dict[str, Any], defaults: dict[str, Any]) -> None:
    row.setdefault("prompt", "a red circle")
    if "plan" in {**row, **defaults}:
        row["plan"] = "/nowhere"
    try:
        made = Job.from_row(row, defaults, "line 1", rules=ANSWERS)
    except BadInput as error:
        assert "\n" not in str(error) and str(error).startswith("line 1: ") and len(str(error)) < 2_000
        str(error).encode()
        return
    assert len(made.prompt) <= PROMPT_LIMIT and "/" not in made.id and ".." not in made.id and made.id
    again = Job.from_row(json.loads(json.dumps(made.to_row(), allow_nan=False)), None, "again", rules=ANSWERS)
    assert again == made and again.key() == made.key() and again.digest() == made.digest()
