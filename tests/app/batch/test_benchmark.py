"""`hasten bench batch`: its bars say what was measured, and a thousand jobs survive it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hasten.benchmarks import batch as bench
from hasten.benchmarks.harness import BenchError, Results, unnoted


def row(variant: str, *rounds: float, processor: float = 1.0) -> dict[str, Any]:
    middle = sorted(rounds)[len(rounds) // 2]
    speed = {"images_per_second": 10 / middle, "processor_seconds": processor}
    return {"variant": variant, "seconds": middle, "seconds_min": min(rounds), "seconds_max": max(rounds), "rounds": list(rounds), **speed}


SETTINGS = bench.Settings(jobs=10, sizes=(1, 8), rounds=3, fast_size=8)
ROWS = [
    row("loop, 1", 4.0, 8.0, 4.0),
    row("loop, 8", 2.0, 4.0, 2.0, processor=1.8),
    row("accelerated loop, 8", 1.0, 2.0, 1.0),
    row("hasten batch", 2.1, 4.2, 2.0, processor=2.0),
    row("hasten batch, accelerated", 1.2, 2.4, 1.25),
]
FOUND = {
    "jobs": 50,
    "kills": 7,
    "images": 50,
    "whole_images": 50,
    "rows": 50,
    "done": 50,
    "hashes_unlike": 0,
    "left_over": 0,
    "seconds": 9.0,
}


def test_bars_compare_neighbouring_rounds_with_the_best_size() -> None:
    over, gain = bench.throughput_bars(ROWS, SETTINGS)
    assert over.value == pytest.approx(1 / 1.05) and over.holds and "batches of 8" in over.note and "0.900" in over.note
    assert gain.value == pytest.approx(1.75 / 2) and not gain.holds


@pytest.mark.parametrize(
    "wrong", [{"images": 49}, {"rows": 51}, {"whole_images": 48}, {"done": 49}, {"hashes_unlike": 1}, {"left_over": 1}]
)
def test_whatever_is_lost_or_double_breaks_a_bar(wrong: dict[str, int]) -> None:
    assert all(bar.holds for bar in bench.survival_bars(FOUND, 1))
    assert sum(not bar.holds for bar in bench.survival_bars({**FOUND, **wrong}, 1)) == 1
    assert not bench.survival_bars(FOUND, 2)[-1].holds


def test_the_page_says_it_all(tmp_path: Path) -> None:
    results = Results("batch", True, settings={name: getattr(SETTINGS, name) for name in SETTINGS.__dataclass_fields__}, rows=ROWS)
    how = {"found": "measured", "pictures_per_second": {"1": 2.0, "8": 5.0}, "steps": 4}
    results.settings |= {"batch_size": 8, "batch_size_from": how, "killed": {**FOUND, "calm_seconds": 4.0}}
    results.bars = [*bench.throughput_bars(ROWS, SETTINGS), *bench.survival_bars(FOUND, 1)]
    page = bench.page(results)
    assert "7 times in 9 seconds" in page and "batch size of 8" in page and page.count("| NO |") + page.count("NO |") >= 1
    for name in ("jobs", "rounds", "killed_batch"):
        with pytest.raises(BenchError, match=f"{name} must be at least 1"):
            replace(SETTINGS, **{name: 0})


@pytest.mark.slow
def test_a_thousand_jobs_survive_kill_9(tmp_path: Path) -> None:
    settings = bench.FULL
    found = bench.survived(settings, bench.captions_of(settings.killed_jobs), tmp_path, unnoted)
    assert found["kills"] >= 5 and all(bar.holds for bar in bench.survival_bars(found, 0))
