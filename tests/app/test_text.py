"""`hasten text` on the model that ships: answers, traces, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.wino import WINO
from hasten.app.cli import app
from hasten.app.text import schedule_of
from hasten.pipelines.decoding_schedulers import SCHEDULERS

Run = Callable[..., Any]
GRID = "1??4/?4??/?1??/4??1"


@pytest.fixture
def run() -> Run:
    return lambda *words: CliRunner().invoke(app, ["text", *words])


def test_prompts_are_answered_and_checked(run: Run) -> None:
    done = run("3? + ? = 91", "483 + 759 = ?", "hello", "--json")
    assert done.exit_code == 0, done.stderr
    told = json.loads(done.stdout)
    first, second, third = told["rows"]
    assert first["verdict"] == second["verdict"] == "right" and third["verdict"] is None
    assert second["text"] == "111:1242" and len(second["tokens"]) == len(second["steps"]) == len("111:1242") + 1
    assert second["tokens_per_forward"] > 2 and told["exact"] is True and told["schedule"] == "credit"


def test_the_trace_shows_every_step(run: Run) -> None:
    done = run(GRID, "--schedule", "static", "--trace")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == GRID
    steps = [line for line in lines[1:] if line[:4].strip().isdigit()]
    assert [int(line[:4]) for line in steps] == list(range(1, len(steps) + 1)) and len(steps) > 16
    assert "\u00b7" in steps[0] and "\u00b7" not in steps[-1][6:25]
    answer = steps[-1][6:25]
    assert f"{GRID}  ->  {answer}   (right)" in lines


def test_the_same_prompt_has_the_same_answer_alone_and_in_a_batch(run: Run) -> None:
    alone = json.loads(run("3? + ? = 91", "--temperature", "1", "--seed", "5", "--json").stdout)["rows"]
    batch = json.loads(run("3? + ? = 91", GRID, "depth 3 ????????", "--temperature", "1", "--seed", "5", "--json").stdout)["rows"]
    assert alone[0]["tokens"] == batch[0]["tokens"]


def test_settings_of_schedules() -> None:
    assert schedule_of("credit", ["threshold=0.8"]) == CreditDecoding(0.8)
    assert schedule_of("freedave", ["drafts=8"]) == FreeDave(drafts=8)
    assert schedule_of("wino", ["wide=0.7", "narrow=0.95"]) == WINO(0.7, 0.95)
    for name in SCHEDULERS:
        schedule_of(name, [])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "PROMPT is missing"),
        (["  "], "is empty: pass at least one token"),
        (["1", "--schedule", "odd"], "--schedule must be one of static, threshold"),
        (["1", "--set", "threshold"], "--set must be NAME=VALUE, such as threshold=0.9, not 'threshold'"),
        (["1", "--set", "foo=1"], "--set: credit has no such setting"),
        (["1", "--schedule", "threshold", "--set", "threshold=-1"], "--set: threshold must be"),
        (["1", "--gen-length", "33"], "gen_length must be a multiple of the block length, 16, not 33"),
        (["1", "--cache", "odd"], "cache must be"),
        (["1", "--dtype", "odd"], "--dtype must be one of float32"),
        (["1" * 300], "context"),
        (["1", "--schedule", "freedave", "--trace"], "FreeDave cannot be streamed"),
        (["1", "-m", "no/such/folder"], "--model 'no/such/folder' cannot be loaded"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(run: Run, words: list[str], message: str) -> None:
    done = run(*words)
    assert done.exit_code == 2 and not done.stdout
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and message in line
