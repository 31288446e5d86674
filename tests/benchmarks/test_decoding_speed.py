"""The speed benchmark on a model of nothing: the same tokens, a call less for every block, and a bar from the rows."""

from __future__ import annotations

from hasten.benchmarks.decoding_speed import LIMIT, Settings, bar_of, measure


def test_both_give_the_same_tokens_and_the_rows_make_a_bar() -> None:
    settings = Settings(width=32, layers=1, heads=2, inner=32, vocabulary=64, prompt=16, answer=32, block_length=8, minimum=3, batch=2)
    theirs, ours = measure(settings)
    assert (theirs["variant"], ours["variant"]) == ("LLaDA2Pipeline", "engine")
    assert theirs["tokens_unlike"] == ours["tokens_unlike"] == 0
    # Three steps a block. The engine's prompt is in its first call; it may cache finished blocks in calls of their own.
    assert theirs["calls"] == 4 * 3 and 12 <= ours["calls"] <= 16
    for row in (theirs, ours):
        assert row["seconds_per_token"] == row["seconds"] / (2 * 32) and row["length"] == 48
    bar = bar_of([{**theirs, "seconds_per_token": 0.4}, {**ours, "seconds_per_token": 0.1}])
    assert bar.holds and bar.limit == LIMIT and round(bar.value, 6) == 0.25
