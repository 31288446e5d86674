"""The benchmark of few steps: its sections run, its bars follow from the rows, and what it prefers is larger and no less right."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hasten.benchmarks import distillation, distillation_page
from hasten.benchmarks.distillation import Bench, bars_of, larger, painted, right, row_of
from hasten.benchmarks.harness import Results
from hasten.pipelines.zoo.shapes import parse, render, sample_scenes


def note(text: str, total: int | None) -> Callable[[], None]:
    """Shows nothing."""
    return lambda: None


@pytest.fixture(scope="module")
def results() -> Results:
    """Every section on two captions, in a few steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "SOLVED", (2, 8, 10))
        patch.setattr(distillation, "REFERENCE", 12)
        patch.setattr(distillation, "STEPS", 4)
        patch.setattr(distillation, "COUNTS", (1, 2, 4, 8))
        return distillation.execute(2, 1, 2, 1, 1, 2, 2, 1, note)


@pytest.mark.slow
def test_every_section_is_on_the_page_and_every_bar_is_judged(results: Results, tmp_path: Path) -> None:
    page = distillation_page.page(results)
    assert len(results.bars) == 15 and all(bar.name in page for bar in results.bars)
    for said in (
        "| step LoRA ",
        "undistilled, DPM++ 2M",
        "| segmented ",
        "| EVODiff ",
        "one block in the middle",
        "tuned towards larger things",
    ):
        assert said in page, said
    assert [row["steps"] for row in results.rows if row["variant"] == "step LoRA"] == [1, 2, 4, 8]


@pytest.mark.slow
def test_bars_follow_from_the_rows(results: Results) -> None:
    held = copy.deepcopy(results)
    rows = {(row["variant"], row["steps"]): row for row in held.rows}
    for steps, change in ((8, -1.0), (4, -3.0), (2, -8.1)):
        rows["step LoRA", steps]["change"] = change
    rows["step LoRA", 1]["accuracy"] = 0.6
    for row in held.settings["cached"][1:]:
        row |= {"speedup": 1.0, "accuracy": 0.9, "change": 0.0}
    held.settings["cached"][2] |= {"speedup": 1.09, "accuracy": 0.5, "change": -40.0}
    bars = bars_of(held)
    assert [bar.holds for bar in bars[:4]] == [True, True, False, True]
    assert [(bar.value, bar.holds) for bar in bars[-2:]] == [(1.09, True), (-40.0, False)]  # not the best of the slow ones


def test_the_preference_is_for_larger_things_and_against_wrong_ones() -> None:
    scenes = sample_scenes(4, torch.Generator().manual_seed(0))
    captions = [str(caption) for caption in scenes.captions()]
    pictures = render(scenes).float()
    assert right(pictures, [parse(caption) for caption in captions]) == [True] * 4
    share = painted(pictures)
    assert bool((share > 0.02).all()) and bool((share < 0.6).all())
    wrong = larger(pictures, [*captions[1:], captions[0]])
    assert bool((larger(pictures, captions) > wrong).all())
    blank = torch.full_like(pictures, float(pictures[0, 0, 0, 0]))
    assert float(painted(blank).max()) < share.min()


def test_rows_have_their_interval_and_change() -> None:
    row = row_of("x", 4, [True, False, True, True], [True, True, False, True], seconds=1.0)
    assert row["accuracy"] == 0.75 and row["low"] < 0.75 < row["high"] and row["change"] == 0 and row["seconds"] == 1.0


def test_the_same_caption_gets_the_same_noise_whatever_draws_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, seeds = Bench(), []

    def draw(prompts: list[str], generator: Any, **call: Any) -> Any:
        seeds.append([each.initial_seed() for each in generator])
        return type("Output", (), {"images": torch.zeros(len(prompts), 3, 64, 64)})

    captions = bench.captions(40)
    bench.draw(captions, {}, draw)
    first = distillation.NOISE_SEED
    assert [seed for call in seeds for seed in call] == list(range(first, first + 40)) and len(seeds) == 2
    assert {len(caption.things) for caption in bench.captions(5, objects=3)} == {3}
