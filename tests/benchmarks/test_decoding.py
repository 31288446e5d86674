"""The benchmark of decoding: what it counts, what it compares, and that it runs from end to end on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import LLaDA2Pipeline

from hasten.accelerators.decoding.credit import CreditDecoding
from hasten.accelerators.decoding.freedave import FreeDave
from hasten.accelerators.decoding.rcr import RCR
from hasten.accelerators.decoding.saber import Saber
from hasten.accelerators.decoding.static import StaticDecoding
from hasten.accelerators.decoding.threshold import ThresholdDecoding
from hasten.accelerators.decoding.wino import WINO
from hasten.benchmarks import decoding, decoding_speed
from hasten.benchmarks.decoding import AT_ONCE, ENTRIES, LIMITS, ONE, Answers, Entry, Limit, Reader, Settings, Subject
from hasten.benchmarks.decoding_page import verdict
from hasten.benchmarks.harness import BenchError
from hasten.pipelines.decoding_schedulers import decoding_scheduler
from hasten.pipelines.zoo.puzzles import BLOCK_LENGTH, GEN_LENGTH, TASKS, validation_puzzles
from tests.pipelines.tiny_puzzles import tiny

SMALL = decoding_speed.Settings(width=32, layers=1, heads=2, inner=32, vocabulary=32, prompt=16, answer=32, block_length=16)


@pytest.fixture(scope="module")
def subject(tiny_puzzles_folder: Path) -> Subject:
    return Subject(tiny_puzzles_folder)


def prompts(n: int = 3) -> list[str]:
    return [puzzle.prompt for task in TASKS for puzzle in validation_puzzles(task, n)]


# -------------------------------------------------------------------------------------------------------------- the model


def test_the_reader_gives_the_models_logits_at_the_columns() -> None:
    model = tiny()
    tokens = torch.randint(0, 27, (3, 48), generator=torch.Generator().manual_seed(0))
    valid = torch.arange(48) >= torch.tensor([[0], [5], [20]])
    with torch.no_grad():
        expected = model(tokens, attention_mask=valid.long()).logits
        for start in (16, 32):
            columns = torch.arange(start, start + 16).expand(3, -1)
            torch.testing.assert_close(Reader(model, 26)(tokens, valid, columns), expected[:, start : start + 16])
        columns = torch.stack([torch.arange(at, at + 16) for at in (16, 32, 16)])
        found = Reader(model, 26)(tokens, valid, columns)
    torch.testing.assert_close(found, torch.stack([expected[r, columns[r]] for r in range(3)]))


def test_a_shadow_sees_everything_but_its_own_token() -> None:
    """With one layer exactly what the model says where that token is masked; of positions that are masked, with any number of layers."""
    tokens = torch.randint(4, 26, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens[:, 24:28] = 26
    valid, columns = torch.arange(32) >= torch.tensor([[0], [7]]), torch.arange(16, 32).expand(2, -1)
    with torch.no_grad():
        one, many = tiny(1), tiny(3)
        shadow = Reader(one, 26).shadow(tokens, valid, columns)
        for column in range(16, 32):
            masked = tokens.clone()
            masked[:, column] = 26
            torch.testing.assert_close(shadow[:, column - 16], one(masked, attention_mask=valid.long()).logits[:, column])
        plain = Reader(many, 26)(tokens, valid, columns)
        torch.testing.assert_close(Reader(many, 26).shadow(tokens, valid, columns)[:, 8:12], plain[:, 8:12])


@pytest.mark.parametrize(("schedule", "name", "options"), [
    (ONE, "static", {}),
    (ThresholdDecoding(0.6), "threshold", {"threshold": 0.6}),
    (CreditDecoding(0.6), "credit", {"threshold": 0.6}),
    (Saber(), "saber", {}),
    (RCR(), "rcr", {}),
])  # fmt: skip
def test_answers_are_those_of_the_unmodified_pipeline(subject: Subject, schedule: Any, name: str, options: dict[str, Any]) -> None:
    pipe = LLaDA2Pipeline(subject.model, decoding_scheduler(name, **options), subject.tokenizer)
    pipe.set_progress_bar_config(disable=True)
    ids, mask = subject.encode(prompts())
    assert ids.shape[1] % BLOCK_LENGTH == 0 and ids[0, -1] == subject.tokenizer.sep_token_id
    theirs = pipe(
        input_ids=ids,
        attention_mask=mask.long(),
        gen_length=GEN_LENGTH,
        block_length=BLOCK_LENGTH,
        num_inference_steps=BLOCK_LENGTH,
        editing_threshold=None,
        output_type="seq",
    ).sequences
    ours = subject.answer(schedule, prompts(), batch=5)
    assert [subject.text(row) for row in ours.tokens.tolist()] == [subject.text(row) for row in theirs.tolist()]


def test_answers_do_not_depend_on_the_batch(subject: Subject) -> None:
    alone, together = (subject.answer(FreeDave(drafts=3), prompts(2), batch) for batch in (1, 8))
    assert torch.equal(alone.tokens, together.tokens) and torch.equal(alone.forwards, together.forwards)


def test_text_ends_before_the_end_and_shows_what_is_special(subject: Subject) -> None:
    vocabulary = subject.tokenizer.get_vocab()
    row = [vocabulary[c] for c in ("1", "+", "<pad>", "2", "<eos>", "3", "<eos>")]
    assert subject.text(row) == "1+<pad>2" and subject.text(row[:2]) == "1+"


@pytest.mark.parametrize("schedule", [ONE, ThresholdDecoding(0.5), Saber(), WINO(0.3, 0.6)])
def test_the_order_says_who_committed_what(subject: Subject, schedule: Any) -> None:
    characters, grid = subject.order(schedule, "depth 3 ?(??????????")
    assert grid.shape[1] == len(characters) == BLOCK_LENGTH and (grid[-1] > 0).all() and grid.max() == len(grid)
    for step, row in enumerate(grid, 1):
        assert row.max() == step, "every step commits something"
        kept = row[(row > 0) & (row < step)]
        assert set(kept) <= set(grid[step - 2]) if step > 1 else not len(kept)
    if schedule is ONE:
        assert sorted(grid[-1]) == list(range(1, BLOCK_LENGTH + 1))
        assert [(row > 0).sum() for row in grid] == list(range(1, BLOCK_LENGTH + 1))
    if isinstance(schedule, Saber):
        assert any(((before > 0) & (after == 0)).any() for before, after in pairwise(grid))


# ------------------------------------------------------------------------------------------------------------- comparing


def made(solved: Sequence[bool], lengths: int, forwards: Sequence[int]) -> Answers:
    n = len(solved)
    return Answers(torch.zeros(n, GEN_LENGTH, dtype=torch.int64), torch.full((n,), lengths), torch.tensor(list(forwards)), list(solved))


TWO_TASKS = ["a"] * 40 + ["b"] * 40


def test_rows_count_tokens_over_forwards_and_pair_with_static() -> None:
    static = made([True] * 60 + [False] * 20, 8, [16] * 80)
    fast = made([True] * 30 + [False] * 10 + [True] * 40, 8, [4] * 40 + [2] * 40)
    rows = decoding.rows_of([Entry("static", "1", ONE), Entry("fast", "x", AT_ONCE)], [static, fast], TWO_TASKS)
    assert rows[0]["tokens_per_forward"] == 0.5 and rows[0]["speedup"] == 1.0 and rows[0]["change"] == 0.0
    assert rows[1]["tokens_per_forward"] == pytest.approx(640 / 240) and rows[1]["speedup"] == pytest.approx(640 / 240 / 0.5)
    assert rows[1]["accuracy"] == 70 / 80 and rows[1]["change"] == pytest.approx(12.5)
    a, b = rows[1]["tasks"]["a"], rows[1]["tasks"]["b"]
    assert a["change"] == -25.0 and b["change"] == 50.0 and a["tokens_per_forward"] == 2.0 and b["speedup"] == 8.0
    assert rows[1]["change_low"] < 12.5 < rows[1]["change_high"]


def test_a_schedule_is_compared_between_the_settings_of_the_threshold() -> None:
    random = np.random.default_rng(1)

    def accuracy(share: float) -> list[bool]:
        return [bool(x) for x in random.random(800) < share]

    tasks = ["a"] * 400 + ["b"] * 400
    entries = [
        Entry("static", "1 token a step", ONE),
        Entry("static", "a block at once", AT_ONCE),
        Entry("threshold", "0.9", ThresholdDecoding(0.9)),
        Entry("good", "x", CreditDecoding(0.8)),
        Entry("bad", "x", CreditDecoding(0.7)),
        Entry("equal", "x", CreditDecoding(0.6)),
    ]
    slow, quick, middle = (made(accuracy(p), 8, [n] * 800) for p, n in ((0.9, 8), (0.1, 2), (0.8, 4)))
    good, bad, equal = made(accuracy(0.95), 8, [4] * 800), made(accuracy(0.2), 8, [4] * 800), made(middle.solved, 8, [4] * 800)
    found = {c["family"]: c for c in decoding.comparisons(entries, [slow, quick, middle, good, bad, equal], tasks, 200)}
    assert set(found) == {"good", "bad", "equal"}, "the curve itself is not compared with itself"
    assert [verdict(found[name]) for name in ("good", "bad", "equal")] == ["better", "worse", "no difference shown"]
    assert found["good"]["points"] == pytest.approx(100 * (np.mean(good.solved) - np.mean(middle.solved)))
    assert found["equal"]["points"] == found["equal"]["low"] == found["equal"]["high"] == 0.0

    # Half way in tokens per forward between 2 and 4 the curve is half way in accuracy.
    between = made(accuracy(0.5), 6, [2] * 800)
    (one,) = decoding.comparisons([*entries[:3], Entry("between", "x", Saber())], [slow, quick, middle, between], tasks, 50)
    expected = np.mean(between.solved) - (np.mean(middle.solved) + np.mean(quick.solved)) / 2
    assert one["points"] == pytest.approx(100 * expected) and one["low"] <= one["points"] <= one["high"]


def test_prompts_are_drawn_within_their_task() -> None:
    weights = decoding._weights(["a", "b", "a", "b", "b"], 30)
    assert (weights[0] == 1).all() and (weights[:, [0, 2]].sum(1) == 2).all() and (weights[:, [1, 3, 4]].sum(1) == 3).all()
    assert len(np.unique(weights, axis=0)) > 10


def test_bars_hold_where_they_should() -> None:
    static = made([True] * 78 + [False] * 2, 8, [16] * 80)
    near = made([True] * 78 + [False] * 2, 8, [5] * 80)
    far = made([False] * 16 + [True] * 24 + [False] * 16 + [True] * 24, 8, [1] * 80)
    entries = [Entry("static", "1", ONE), Entry("near", "x", CreditDecoding()), Entry("static", "a block at once", AT_ONCE)]
    rows = decoding.rows_of(entries, [static, near, far], TWO_TASKS)
    equal = [{"name": "p", "prompts": 4, "differ": 0}, {"name": "q", "prompts": 4, "differ": 2}]
    lossless = [
        {"batch": 1, "drafts": 4, "prompts": 9, "differ": 0, "fewer_forwards": 1.2},
        {"batch": 1, "drafts": 8, "prompts": 9, "differ": 0, "fewer_forwards": 1.4},
        {"batch": 32, "drafts": 4, "prompts": 9, "differ": 1, "fewer_forwards": 1.1},
    ]
    speed = [{"seconds_per_token": t, "model": "m", "length": 9, "batch": 1, "tokens_unlike": 0} for t in (0.4, 0.1)]
    engine = [{"prompts": 4, "differ": 0}, {"prompts": 4, "differ": 3}]
    measured = {"equivalences": equal, "freedave": lossless, "engine": engine, "speed": speed}
    bars = {bar.name.rpartition(",")[0]: bar for bar in decoding.bars_of(rows, measured)}
    assert bars["static decoding solves of each task"].value == pytest.approx(0.95)
    worse = bars["tasks on which a block at once is 10 points worse"]
    assert worse.value == 2 and not worse.holds
    speed = bars["tokens per forward over static's, within a point of its accuracy"]
    assert speed.value == pytest.approx(3.2) and speed.holds and "near" in speed.note
    assert bars["FreeDave, batch 1: static's forwards over its own"].value == 1.4
    assert [bars[f"FreeDave, batch {n}: answers unlike static's"].holds for n in (1, 32)] == [True, False]
    assert not bars["FreeDave, batch 32: static's forwards over its own"].holds
    equivalent = bars["equivalences: answers or forwards unlike"]
    assert equivalent.value == 2 and "q: 2" in equivalent.note
    assert bars["engine: answers unlike the loop's"].value == 3
    assert bars["engine: time per token over LLaDA2Pipeline's"].value == pytest.approx(0.25)


# -------------------------------------------------------------------------------------------------------------- as a whole


def test_every_schedule_is_there_and_static_comes_first() -> None:
    families = {entry.family for entry in ENTRIES}
    assert ENTRIES[0].schedule == ONE and len({(e.family, e.text) for e in ENTRIES}) == len(ENTRIES)
    assert families >= {
        *("static", "static, margin", "static, entropy", "static, random", "threshold", "factor", "hierarchical", "entropy bound"),
        *("KLASS", "CCD", "credit", "Saber", "RCR", "WINO", "editing", "FreeDave"),
    }


def test_every_limit_holds_on_the_tiny_model_and_one_that_does_not_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = decoding.equivalences(subject, prompts(1), 8, lambda: None)
    assert len(rows) == len(LIMITS) and not [row for row in rows if row["differ"]]
    monkeypatch.setattr(decoding, "LIMITS", (Limit("no", StaticDecoding(tokens_per_step=2), ONE),))
    assert decoding.equivalences(subject, prompts(1), 8, lambda: None)[0]["differ"] == 4


def test_the_engine_gives_the_answers_of_the_loop(subject: Subject) -> None:
    rows = decoding.engine_rows(subject, prompts(1), lambda: None)
    assert {row["schedule"] for row in rows} == {*decoding.SHOWN, "freedave"}
    assert not [row for row in rows if row["differ"]] and all(1 <= row["forwards"] < 2 for row in rows)


def test_it_runs_from_end_to_end(
    tiny_puzzles_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_puzzles_folder
    monkeypatch.setattr(decoding, "SHOWN", {name: decoding.SHOWN[name] for name in ("static", "saber")})
    wanted = {"static: 1 token a step", "static: a block at once", "threshold: 0.9", "credit: 0.9"}
    entries = [entry for entry in ENTRIES if f"{entry.family}: {entry.text}" in wanted]
    settings = Settings(prompts=2, batch=8, equal_prompts=1, freedave_prompts=1, freedave_batches=(1, 4), draws=20)
    docs = tmp_path / "docs" / "results" / "decoding.md"
    code = decoding.run(True, tmp_path / "out.json", docs, settings=settings, model=folder, entries=entries, speed=SMALL)
    assert code == 1, "a model that was never trained solves nothing"
    data, text = json.loads((tmp_path / "out.json").read_text()), docs.read_text()
    assert set(data) == {"name", "quick", "machine", "versions", "settings", "rows", "bars"} and data["name"] == "decoding"
    assert len(data["rows"]) == len(entries) and all(row["prompts"] == 8 and set(row["tasks"]) == set(TASKS) for row in data["rows"])
    assert all(row["variant"] in text for row in data["rows"]) and all(limit.name in text for limit in LIMITS)
    pictures = docs.parent.parent / "pictures"
    assert {path.stem for path in pictures.iterdir()} == {"decoding-tokens-per-forward", *(f"decoding-{n}" for n in decoding.SHOWN)}
    assert "../pictures/decoding-tokens-per-forward.png" in text
    assert capsys.readouterr().out.rstrip().splitlines()[-1].startswith("| engine: time per token")
    again = tmp_path / "again" / "results" / "decoding.md"
    assert decoding.main(["--assemble", str(tmp_path / "out.json"), "--docs", str(again), "--model", str(folder)]) == 0
    assert again.read_text() == text


def test_bad_arguments_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert decoding.run(True, model=tmp_path) == 2
    assert decoding.run(True, json_path=tmp_path) == 2
    lines = capsys.readouterr().err.splitlines()
    (tmp_path / "no.json").write_text('{"name": "caching"}')
    assert decoding.main(["--assemble", str(tmp_path / "no.json"), "--docs", str(tmp_path / "x.md")]) == 2
    assert "holds no results of this benchmark" in capsys.readouterr().err
    assert len(lines) == 2 and lines[0].startswith("hasten bench decoding: --model") and "--json" in lines[1]
    with pytest.raises(BenchError, match="prompts must be at least 1, not 0"):
        Settings(prompts=0)
    with pytest.raises(SystemExit):
        decoding.main(["--prompts", "0"])
