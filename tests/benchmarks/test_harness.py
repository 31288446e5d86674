"""The benchmarks' arithmetic, on numbers whose answers are known, and their writers."""

from __future__ import annotations

import json
import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from hasten.benchmarks.harness import (
    Bar,
    BenchError,
    Note,
    Results,
    Timing,
    Variant,
    bars_last,
    bars_table,
    check_target,
    command_line,
    conduct,
    interleave,
    machine,
    median_interval,
    paired_difference,
    paired_ratios,
    read_results,
    results_page,
    run_from_command_line,
    spread,
    surroundings,
    table,
    versions,
    wilson,
    write_text,
)


def test_variants_take_turns_and_every_other_round_is_reversed() -> None:
    order: list[tuple[str, int]] = []

    def variant(name: str, rounds: int | None = None) -> Variant:
        def run(r: int) -> Timing:
            order.append((name, r))
            return Timing(1.0, 2.0)

        return Variant(name, run, rounds)

    ticks: list[None] = []
    timings = interleave([variant("a"), variant("b", 1), variant("c")], 3, done=lambda: ticks.append(None))
    assert [name for name, _ in order] == ["a", "b", "c", "c", "a", "a", "c"]
    assert {name: len(found) for name, found in timings.items()} == {"a": 3, "b": 1, "c": 3}
    assert len(ticks) == 7


def test_a_passed_deadline_leaves_the_least_number_of_rounds() -> None:
    timings = interleave([Variant("a", lambda r: Timing(1.0, 1.0))], 9, least=2, deadline=time.monotonic() - 1)
    assert len(timings["a"]) == 2
    assert len(interleave([Variant("a", lambda r: Timing(1.0, 1.0))], 4, deadline=time.monotonic() - 1)["a"]) == 4


def test_paired_ratios_find_half_a_percent_under_drift_and_spikes() -> None:
    # A machine that slows down by 40% over the run and is now and then twice as slow.
    noise, calls = random.Random(0), [0]

    def run(cost: float) -> Timing:
        calls[0] += 1
        clock = cost * (1 + 0.4 * calls[0] / 300) * (1 + 0.01 * noise.random()) * (2.0 if noise.random() < 0.03 else 1.0)
        return Timing(clock, clock, cost)

    ratios = paired_ratios(lambda: run(1.0), {"b": lambda: run(1.005), "c": lambda: run(1.03)}, rounds=50)
    for name, truth in (("b", 1.005), ("c", 1.03)):
        low, high = median_interval(ratios[name].clock)
        assert low <= truth + 0.002 and high >= truth - 0.002
        assert sorted(ratios[name].clock)[25] == pytest.approx(truth, abs=0.003)
        assert ratios[name].processor == pytest.approx([truth] * 50)


def test_paired_ratios_stop_when_narrow_or_late_but_not_before_the_least() -> None:
    def steady() -> Timing:
        return Timing(1.0, 1.0)

    def erratic() -> Timing:
        return Timing(random.random(), 1.0)

    found = paired_ratios(steady, {"b": steady}, rounds=40, least=7, width=0.001)["b"]
    assert found.clock == [1.0] * 7 and found.processor == []
    assert len(paired_ratios(steady, {"b": erratic}, rounds=40, least=7, deadline=time.monotonic() - 1)["b"].clock) == 7


@pytest.mark.parametrize(("n", "at"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (11, 1), (12, 2), (15, 3), (20, 5), (25, 7)])
def test_median_interval_has_the_tabulated_order_statistics(n: int, at: int) -> None:
    # Tables of the sign test at 95%: n = 9 takes the 2nd and the 8th, n = 20 the 6th and the 15th.
    assert median_interval([float(v) for v in reversed(range(n))]) == (at, n - 1 - at)


def test_median_interval_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="values is empty"):
        median_interval([])


def test_wilson_interval() -> None:
    low, high = wilson(58, 64)
    assert (low, high) == pytest.approx((0.810, 0.957), abs=2e-3)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(64, 64)[1] == 1.0 and wilson(64, 64)[0] < 0.96


def test_paired_difference_uses_only_what_changed() -> None:
    before = [True] * 50 + [False] * 14
    same = paired_difference(before, before)
    assert same.value == 0 and same.low < 0 < same.high and same.high < 0.05
    worse = paired_difference(before, [False] * 10 + before[10:])
    assert worse.value == pytest.approx(-10 / 64)
    assert worse.low < -10 / 64 < worse.high < 0
    both = paired_difference([True, False] * 32, [False, True] * 32)
    assert both.value == 0 and both.high > worse.high - worse.value  # many changes either way: less is known


def test_paired_difference_covers_the_truth() -> None:
    rng, covered = random.Random(1), 0
    for _ in range(400):
        before = [rng.random() < 0.9 for _ in range(100)]
        after = [b if rng.random() > 0.1 else not b for b in before]  # 90% -> 82%
        found = paired_difference(before, after)
        covered += found.low <= -0.08 <= found.high
    assert 0.92 <= covered / 400 <= 0.99


@pytest.mark.parametrize(("before", "after"), [([], []), ([True], [True, False])])
def test_paired_difference_refuses_what_is_not_paired(before: list[bool], after: list[bool]) -> None:
    with pytest.raises(ValueError, match="same length"):
        paired_difference(before, after)


def test_bars_hold_at_their_limit() -> None:
    assert Bar.at_most("x", 1.01, 1.01).holds and not Bar.at_most("x", 1.0101, 1.01).holds
    assert Bar.at_least("x", 0.95, 0.95).holds and not Bar.at_least("x", 0.9499, 0.95).holds
    assert "NO" in bars_table([Bar.at_least("speed", 0.5, 0.95, "slow")])


def test_json_is_plain_data_without_infinities(tmp_path: Path) -> None:
    results = Results("fake", True, rows=[{"variant": "plain", "psnr": math.inf, "seconds": 1.0}], bars=[Bar.at_most("x", 1.0, 2.0, "n")])
    results.write_json(tmp_path / "new" / "out.json")
    data = json.loads((tmp_path / "new" / "out.json").read_text())
    assert {"name", "machine", "versions", "rows", "bars"} <= set(data)
    assert data["rows"] == [{"variant": "plain", "psnr": None, "seconds": 1.0}]
    assert data["bars"] == [{"name": "x, at most", "value": 1.0, "limit": 2.0, "holds": True, "note": "n"}]
    assert results.all_hold


def test_machine_and_versions_name_no_host_and_no_path() -> None:
    found = {**machine(), **versions()}
    text = surroundings(Results("fake", False)) + json.dumps(found)
    assert found["cores"] >= 1 and found["threads"] >= 1 and found["torch"]
    assert os.uname().nodename not in text
    assert str(Path.home()) not in text and str(Path.cwd()) not in text


def test_writing_replaces_whole_files_and_leaves_no_scratch(tmp_path: Path) -> None:
    target = tmp_path / "page.md"
    write_text(target, "one")
    write_text(target, "two")
    assert target.read_text() == "two" and [p.name for p in tmp_path.iterdir()] == ["page.md"]
    blocked = tmp_path / "folder"
    blocked.mkdir()
    with pytest.raises(OSError):
        write_text(blocked, "three")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "page.md"]


def test_targets_that_cannot_be_written_are_refused_beforehand(tmp_path: Path) -> None:
    check_target(None, "--json")
    check_target(tmp_path / "fine.json", "--json")
    with pytest.raises(BenchError, match="--json must be a file"):
        check_target(tmp_path, "--json")
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="--json cannot be written"):
        check_target(tmp_path / "file" / "out.json", "--json")


def test_tables_are_aligned_markdown() -> None:
    assert table(("a", "b", "c"), [("long name", "1", "z"), ("x", "22", "zz")], left=("c",)).splitlines() == [
        "| a         |  b | c  |",
        "|-----------|---:|----|",
        "| long name |  1 | z  |",
        "| x         | 22 | zz |",
    ]


def test_spread_and_page() -> None:
    assert spread([3.0, 1.0, 2.0]) == (2.0, 1.0, 3.0)
    page = results_page("caching")
    assert page is None or (page.name == "caching.md" and page.parent.name == "results")


# ---------------------------------------------------------------------------------------------------------- the whole run


def measured(value: float, note: Note) -> Results:
    done = note("runs", None)
    done()
    return Results("fake", False, rows=[{"variant": "plain"}], bars=[Bar.at_most("time", value, 1.0)])


def page_of(results: Results) -> str:
    return bars_last(results, "Fake, measured", "About.")


@pytest.mark.parametrize(("value", "code"), [(0.5, 0), (2.0, 1)])
def test_a_run_writes_json_pictures_and_page_and_prints_the_bars(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float, code: int
) -> None:
    docs, written = tmp_path / "docs" / "results" / "fake.md", tmp_path / "out.json"
    drawn: list[tuple[Path, bool]] = []

    def pictures(results: Results, folder: Path) -> None:
        drawn.append((folder, docs.exists()))

    found = conduct("fake", measured, page_of, {"value": value}, json_path=written, docs=docs, pictures=pictures)
    assert found == code
    assert drawn == [(tmp_path / "docs" / "pictures", False)], "a page never points at pictures that are not there yet"
    data, text = json.loads(written.read_text()), docs.read_text()
    assert data["name"] == "fake" and data["bars"][0]["value"] == value
    assert text.startswith("# Fake, measured\n\nWritten by `hasten bench fake`, never by hand.\n\nMachine: ")
    bars = bars_table([Bar.at_most("time", value, 1.0)])
    assert text.endswith(f"About.\n\n## Bars\n\n{bars}\n")
    out, err = capsys.readouterr()
    assert out == bars + "\n" and "runs" in err
    conduct("fake", measured, page_of, {"value": value}, json_path=None, docs=None, shown=lambda results: "all of it")
    assert capsys.readouterr().out == "all of it\n"


def test_what_cannot_be_run_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[dict[str, Any]] = []

    def refuses(**settings: Any) -> Results:
        calls.append(settings)
        raise BenchError("batch must be at least 1, not 0")

    for json_path, docs in ((tmp_path, None), (None, tmp_path)):
        assert conduct("fake", refuses, page_of, {}, json_path=json_path, docs=docs) == 2
    assert not calls, "files are tried before anything is measured"
    assert conduct("fake", refuses, page_of, {"batch": 0}, json_path=tmp_path / "out.json", docs=None) == 2
    assert calls[0]["batch"] == 0 and not (tmp_path / "out.json").exists()
    out, err = capsys.readouterr()
    assert out == "" and [line.partition(" must")[0] for line in err.splitlines()] == [
        "hasten bench fake: --json",
        "hasten bench fake: --docs",
        "hasten bench fake: batch",
    ]


def test_an_error_of_the_measurement_is_not_swallowed() -> None:
    def fails(note: Note) -> Results:
        note("runs", 3)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        conduct("fake", fails, page_of, {}, json_path=None, docs=None)


def test_settings_come_from_the_command_line(tmp_path: Path) -> None:
    calls: list[Any] = []

    def run(*arguments: Any, **settings: Any) -> int:
        calls.append((arguments, settings))
        return 1

    known = {"rounds": (7, "timings"), "updates": ((10, 17), "of each part")}
    for given in (["--rounds", "3", "--json", str(tmp_path / "a.json")], ["--updates", "5", "6"]):
        assert run_from_command_line(run, command_line("fake", "First line.\n\nMore."), known, given) == 1
    assert calls == [
        ((False, tmp_path / "a.json", None), {"rounds": 3, "updates": (10, 17)}),
        ((False, None, None), {"rounds": 7, "updates": [5, 6]}),
    ]
    assert "First line." in command_line("fake", "First line.\n\nMore.").format_help()
    assert "More." not in command_line("fake", "First line.\n\nMore.").format_help()


def test_results_are_read_back_by_their_name(tmp_path: Path) -> None:
    Results("fake", True, rows=[{"variant": "plain"}]).write_json(tmp_path / "out.json")
    assert read_results(tmp_path / "out.json", "fake")["rows"] == [{"variant": "plain"}]
    with pytest.raises(BenchError, match="holds no results of this benchmark"):
        read_results(tmp_path / "out.json", "other")
    (tmp_path / "half.json").write_text('{"name": "fa')
    for name in ("half.json", "missing.json"):
        with pytest.raises(BenchError, match=f"{name} cannot be read as results"):
            read_results(tmp_path / name, "fake")
