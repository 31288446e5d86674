"""Lineage and report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hasten.accelerators.steering.budget import Budget, Cost, Meter
from hasten.accelerators.steering.report import ROOT, Lineage, SearchReport


@pytest.fixture
def report() -> SearchReport:
    """Three candidates; the second has two children, the third is lost; one child is returned."""
    lineage = Lineage()
    roots = lineage.add(2, [ROOT] * 3, [0.5, 2.0, -math.inf])
    children = lineage.add(5, [roots[1], roots[1], roots[0]], [1.0, 3.0, math.nan])
    lineage.add(5, [ROOT], [7.0], prompt=1)
    meter = Meter(Budget(particle_steps=30))
    meter.charge(Cost(particle_steps=12, decodes=6))
    return SearchReport("a method", lineage, [[children[1]], [6]], meter, {"particles": 3}, ["short of time"])


def test_ancestry_survivors_and_unique_ancestors(report: SearchReport) -> None:
    assert report.lineage.ancestry(4) == [1, 4]
    assert report.survivors == [{1, 4}, {6}]
    assert report.lineage.stages(0) == [2, 5] and report.lineage.at(5, 0) == [3, 4, 5]
    assert report.lineage.unique_ancestors(0) == 2 and report.lineage.unique_ancestors(7) == 0
    assert report.rewards == [3.0, 7.0]
    assert [node.slot for node in report.lineage.nodes] == [0, 1, 2, 0, 1, 2, 0]


def test_slots_go_on_where_a_stage_is_added_to() -> None:
    lineage = Lineage()
    lineage.add(0, [ROOT] * 2, [0.0, 1.0])
    lineage.add(0, [ROOT], [2.0])
    lineage.add(1, [0], [2.0], slots=[7])
    assert [node.slot for node in lineage.nodes] == [0, 1, 2, 7]
    with pytest.raises(ValueError, match="a parent must be a node that was added before, from -1 to 3, not 4"):
        lineage.add(1, [4], [0.0])


def test_the_curve_leaves_out_what_is_lost_and_keeps_the_best_so_far(report: SearchReport) -> None:
    assert report.curve(0) == [(2, 1.25, 2.0, 2.0), (5, 2.0, 3.0, 3.0)]


def test_it_is_plain_data_and_readable(report: SearchReport) -> None:
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["nodes"]["rows"][2] == [2, ROOT, None, 0, 2] and data["rewards"] == [3.0, 7.0]
    assert data["cost"]["unspent"] == {"particle_steps": 18} and data["unique_ancestors"] == [2, 1]
    text = str(report)
    for part in (
        "a method",
        "12 particle steps of 30",
        "left 18 particle steps",
        "returned 3.0000, unique ancestors 2",
        "warning: short of time",
    ):
        assert part in text


@pytest.mark.parametrize("name", ["plot_lineage", "plot_rewards"])
def test_pictures_are_written_to_files_or_drawn_on_axes(report: SearchReport, name: str, tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    target = tmp_path / "picture.png"
    getattr(report, name)(target)
    assert target.read_bytes().startswith(b"\x89PNG") and target.stat().st_size > 5_000
    axes = Figure().subplots()
    assert getattr(report, name)(axes, prompt=1, title="mine") is axes and axes.get_title() == "mine"
    assert getattr(report, name)().get_title() == "a method"


def test_the_lineage_picture_has_a_bold_line_for_each_step_of_what_was_returned(report: SearchReport) -> None:
    axes = report.plot_lineage()
    widths = sorted(line.get_linewidth() for line in axes.lines)
    assert widths == [0.7, 0.7, 2.0]
    empty = SearchReport("nothing", Lineage(), [[]], Meter())
    empty.plot_lineage()
    empty.plot_rewards()
    assert math.isnan(empty.rewards[0]) and json.dumps(empty.to_json(), allow_nan=False)
