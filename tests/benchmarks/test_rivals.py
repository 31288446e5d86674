"""The comparison with rivals: fronts, bars, and the page; and the smaller benchmarks' bars."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hasten.benchmarks import cachequant, peers, policy, rivals
from hasten.benchmarks.harness import Bar, BenchError, Results


def test_a_front_holds_what_nothing_beats() -> None:
    points = [(1.0, 0.1), (1.5, 0.05), (2.0, 0.2), (1.8, 0.3), (3.0, 0.4)]
    assert rivals.pareto(points) == [(1.5, 0.05), (2.0, 0.2), (3.0, 0.4)]


def test_errors_are_read_between_settings_and_never_beyond() -> None:
    points = [(1.5, 0.01), (2.5, 0.04)]
    assert rivals.error_at(points, 2.0) == pytest.approx(0.02)
    assert rivals.error_at(points, 1.2) == 0.01, "a faster setting with no more error serves as well"
    assert rivals.error_at(points, 2.6) is None and rivals.error_at([], 1.0) is None


def row(family: str, speedup: float, error: float, **more: Any) -> dict[str, Any]:
    return {
        "case": "c",
        "family": family,
        "variant": f"{family} {speedup}",
        "speedup": speedup,
        "error": error,
        "error_typical": error,
        "error_converged_typical": error + 0.02,
        **more,
    }


def test_bars_are_against_the_best_of_each_group() -> None:
    peer = f"{next(iter(peers.installed()))} 1.0"
    rows = [
        row(rivals.PLANNER, 1.5, 0.01, predicted=0.01),
        row(rivals.PLANNER, 3.0, 0.04, predicted=0.012),
        *(row(rivals.FEWER, s, e) for s, e in ((1.5, 0.02), (3.0, 0.03))),
        *(row(peer, s, e) for s, e in ((1.5, 0.04), (2.4, 0.08))),
        {"case": "c", "family": "broken", "variant": "x", "failed": "ValueError: no"},
    ]
    bars = {bar.name: bar for bar in rivals.bars_of("c", rows)}
    at = {
        speedup: next(b for n, b in bars.items() if f"mean error at {speedup}x" in n and "peers and fewer" in n) for speedup in ("1.5", "3")
    }
    assert at["1.5"].holds and at["1.5"].value == pytest.approx(0.5)
    assert not at["3"].holds and "fewer steps 0.0300" in at["3"].note
    half = next(b for n, b in bars.items() if "best peer" in n and "mean" in n)
    assert half.limit == 0.7 and half.holds
    factor = next(b for n, b in bars.items() if "predicted" in n)
    assert not factor.holds and factor.value == pytest.approx(0.04 / 0.012)


def test_the_hand_made_schedule_is_dense_first() -> None:
    class Fake:
        model, config_hash, sites = "m", "h", ("a", "b")

    plan = rivals.hand_made(Fake(), 50, 12, 3, 1)  # type: ignore[arg-type]
    computed = np.flatnonzero(plan.actions[:, 0, 0] == 0)
    assert computed[:12].tolist() == list(range(12)) and set(np.diff(computed[12:])) == {3}


def test_settings_are_checked() -> None:
    with pytest.raises(BenchError, match="cases must be of shapes, DDIM"):
        rivals.Settings(cases=("nonsense",))
    with pytest.raises(BenchError, match="at least 2"):
        rivals.Settings(captions=1)
    assert rivals.main(["--captions", "1"]) == 2


@pytest.mark.parametrize("case", rivals.CASES)
def test_every_case_draws_and_decodes(case: str) -> None:
    drawer = rivals.Drawer(case, rivals.captions(2, 1), 1)
    seconds, latents = drawer.draw(drawer.pipe, 2)
    assert seconds > 0 and latents.isfinite().all()
    assert drawer.pictures(latents).shape == (2, 3, 64, 64)
    order = getattr(drawer.pipe.scheduler.config, "solver_order", 1)
    assert order == drawer.order


def test_the_page_and_the_picture(tmp_path: Path) -> None:
    rows = [row(f, s, s * e) for f, e in ((rivals.PLANNER, 0.01), (rivals.FEWER, 0.02)) for s in (1.5, 2.0, 3.5)]
    rows.append({"case": "c", "family": "broken 2.0", "variant": "broken(1)", "failed": "ValueError: no context"})
    results = Results("caching-rivals", False, settings={**vars(rivals.Settings()), "cases": ["c"]})
    results.rows, results.bars = [row(rivals.PLAIN, 1.0, 0.0), *rows], rivals.bars_of("c", rows)
    results.write_json(tmp_path / "one.json")
    docs = tmp_path / "docs" / "results" / "page.md"
    assert rivals.main(["--assemble", str(tmp_path / "one.json"), "--docs", str(docs)]) == 0
    text = docs.read_text()
    assert "fails: ValueError: no context" in text and "![" in text and "0.0200" in text
    assert "plain itself 0.0200. Least: planner at 1.5x" in text
    assert (tmp_path / "docs" / "pictures" / "caching-rivals.png").stat().st_size > 10_000
    (tmp_path / "no.json").write_text("{}")
    assert rivals.main(["--assemble", str(tmp_path / "no.json")]) == 2


def test_a_family_measured_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    def results(error: float, *more: dict[str, Any]) -> Results:
        made = Results("caching-rivals", False, settings={**vars(rivals.Settings())})
        planner = [row(rivals.PLANNER, speedup, error * speedup) for speedup in (1.5, 3.2)]
        made.rows = [row(rivals.PLAIN, 1.0, 0.0), *planner, *more]
        verdict = Bar.at_least(f"c: {rivals.ACCURACY} (8 captions)", -error, -1.0)
        made.bars = [*rivals.bars_of("c", made.rows), verdict]
        return made

    fewer = [row(rivals.FEWER, speedup, 0.03 * speedup) for speedup in (1.5, 3.2)]
    results(0.9, *fewer).write_json(tmp_path / "all.json")
    results(0.02).write_json(tmp_path / "again.json")
    docs = tmp_path / "docs" / "results" / "page.md"
    assert rivals.main(["--assemble", str(tmp_path / "all.json"), str(tmp_path / "again.json"), "--docs", str(docs)]) == 0
    text = docs.read_text()
    assert "planner 0.0300, fewer steps 0.0450" in text, "at 1.5x, from the new rows against the old rivals"
    assert "0.9000" not in text and text.count(rivals.ACCURACY) == 1 and "-0.02" in text


def test_bars_of_the_policy() -> None:
    def made(variant: str, speedup: float, change: float, idle: float | None = 0.02) -> dict[str, Any]:
        return {
            "variant": variant,
            "speedup": speedup,
            "change": change,
            "change_low": change - 1,
            "change_high": change + 1,
            "idle_share": idle,
        }

    rows = [
        made("full compute", 1.0, 0.0, None),
        made("BAC, S=5", 5.0, -3.0),
        made("BAC, S=10", 3.5, -0.5),
        made("BAC without union, S=5", 6.0, 0.0),
    ]
    bars = policy.bars_of(rows)
    assert [bar.holds for bar in bars] == [True] * 4
    assert bars[0].value == -0.5 and bars[2].value == 3.5 and bars[3].limit == 0.03


def test_bars_of_cachequant() -> None:
    def made(ablation: int | None, error: float, change: float = 0.0) -> dict[str, Any]:
        ends = {"change": change, "change_low": change, "change_high": change, "bytes_of_fp32": 0.26, "computed_fraction": 0.2}
        return {"variant": str(ablation), "ablation": ablation, "error": error, **ends}

    rows = [made(None, 9.0, -4.0), made(0, 0.3, -5.0), made(1, 0.2, -6.0), made(2, 0.25, -3.0)]
    bars = cachequant.bars_of(rows)
    assert [bar.holds for bar in bars] == [True, False, False, True]
    assert not math.isnan(bars[0].value)
    # The accuracy is that of the best schedule at the interval; full compute and other layers do not count.
    better = {**made(None, 9.0, -1.0), "variant": "planned"}
    whole, coarse = {**better, "computed_fraction": 1.0}, {**better, "bytes_of_fp32": 0.14}
    assert not cachequant.bars_of([*rows, whole, coarse])[2].holds and cachequant.bars_of([*rows, better])[2].holds


def test_the_policys_bench_runs_small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, small in {"STEPS": 24, "BATCH": 8, "SCENES": 4, "COMPUTED": (8, 5)}.items():
        monkeypatch.setattr(policy, name, small)
    results = policy.execute(4, 1, (5,), lambda text, total: lambda: None)
    names = [entry["variant"] for entry in results.rows]
    assert names[0] == "full compute" and "BAC, S=5" in names and any(name.startswith("uniform") for name in names)
    assert all(entry["computed_fraction"] <= 1 for entry in results.rows)
    assert torch.isfinite(torch.tensor([entry["speedup"] for entry in results.rows])).all()
