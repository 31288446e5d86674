"""What the tabs do, without a page: on a pipeline that is not of the zoo, and on students with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hasten.app.cli import app
from hasten.app.demo import compare, plan, steer, steps, text
from hasten.app.demo.command import DemoOptions
from hasten.app.demo.runs import Line, Models, follow
from hasten.app.errors import BadInput

COMPARED: dict[str, Any] = {
    "interval": 2, "threshold": 0.5, "cached": 0.75, "boundary": 0.5, "skip": 1, "steps": 4, "guidance": 0, "seed": 0,
}  # fmt: skip


def shown(work: Callable[[Line], None]) -> list[Any]:
    """All values that a run shows."""
    return [value for news in follow(work) for value in news.values]


@pytest.fixture(scope="module")
def own(tiny_pipeline_folder: Path) -> Models:
    """A page for a pipeline of the visitor's."""
    return Models([str(tiny_pipeline_folder)])


def test_a_pipeline_of_ones_own_is_compared_without_verdicts(own: Models) -> None:
    plain, found = shown(compare.compare(own, "a cat", own.default, "fora", **COMPARED))
    assert plain.name == "plain" and plain.correct == [None]
    comparison = found.comparison
    assert not found.has_fewer and len(comparison.plain.rounds) == len(comparison.accelerated.rounds) == 3
    assert "verifier" not in compare.figures(found) and "fewer" not in compare.figures(found)
    assert (comparison.plan.actions[1] != 0).any()  # the second step of an interval of two
    again = shown(compare.compare(own, "a cat", own.default, "fora", **COMPARED))[1].comparison
    for one, other in ((comparison.plain, again.plain), (comparison.accelerated, again.accelerated)):
        assert one.images[0].tobytes() == other.images[0].tobytes()  # a seed is a picture

    (fewer,) = shown(compare.fewer_steps(own, found))
    share = comparison.accelerated.seconds / comparison.plain.seconds
    assert fewer.comparison.fewer.steps == max(1, min(4, round(4 * share)))
    assert not found.has_fewer and fewer.has_fewer  # what the visitor had stays as it was
    assert "fewer steps" in compare.figures(fewer) and compare.gallery(fewer).count("<img") == 4
    left, right = compare.slider(fewer)
    assert left.size == right.size == (512, 512)


def test_a_method_that_cannot_be_is_refused_with_its_reason(own: Models) -> None:
    with pytest.raises(BadInput, match="steps"):
        compare.compare(own, "a cat", own.default, "fora", **{**COMPARED, "steps": 0})
    with pytest.raises(BadInput, match="caption is empty"):
        compare.compare(own, " ", own.default, "fora", **COMPARED)
    with pytest.raises(BadInput, match="compare a picture first"):
        compare.fewer_steps(own, None)


def test_a_pipeline_of_ones_own_is_steered_by_what_any_picture_has(own: Models) -> None:
    assert "shapes" not in steer.rewards_of(own) and "brightness" in steer.rewards_of(own)
    work = steer.steered(own, "a cat", own.default, "fk", 2, "brightness", 4, 0, 0, True)
    values = shown(work)
    assert [len(value) for value in values] == [1, 2, 3]
    first, best, zero = values[-1]
    assert first.report is not None and first.report.pictures and best.report is None and zero.report is None
    assert best.name.startswith("best of ") and int(best.name.split()[-1]) % steer.POOL == 0
    assert best.spent[0] == int(best.name.split()[-1]) * 4  # particle steps: samples times steps
    assert zero.spent[0] <= best.spent[0]
    assert steer.filmstrip(first).count("<figure") == len(first.report.pictures)
    assert 'class="kept"' in steer.filmstrip(first) and steer.curves(first).count("<svg") == 2
    assert steer.side_by_side(values[-1]).count("<img") == 3


def test_a_search_has_no_filmstrip_and_says_so(own: Models) -> None:
    (value,) = shown(steer.steered(own, "a cat", own.default, "random", 1, "brightness", 3, 0, 0, False))
    assert "<figure" not in steer.filmstrip(value[0]) and "random" in steer.filmstrip(value[0])
    assert "<svg" in steer.curves(value[0])


def test_a_plan_is_made_drawn_and_replayed(own: Models) -> None:
    prompts = "a cat\na dog"
    (held,) = shown(plan.make(own, prompts, own.default, "error", 2.0, 0.5, 5, 1, 0))
    assert held.plan.facts["certificate"]["held_out"] == 1 and held.plan.facts["num_inference_steps"] == 5
    edited = plan.edit(held, "2,1,0")
    fronts = shown(plan.pareto(own, edited, prompts, own.default, "error", 2.0, 0.5, 5, 1, 0))
    points = fronts[-1].points
    assert [point.own for point in points] == [False] * (len(points) - 1) + [True]
    bounds = [point.bound for point in points[:-1]]
    assert bounds == sorted(bounds, reverse=True) and len(set(bounds)) == len(bounds)  # more computed steps, less speed
    assert "your plan" in plan.front_plot(fronts[-1])
    elsewhere = shown(plan.pareto(own, edited, prompts, own.default, "error", 2.0, 0.5, 4, 1, 0))[-1]
    assert not any(point.own for point in elsewhere.points) and "it is for 5 steps" in plan.front_plot(elsewhere)


@pytest.mark.parametrize("schedule", text.SCHEDULES)
def test_every_schedule_answers(models: Models, schedule: str) -> None:
    values = shown(text.answer(models, "3? + ? = 91", schedule, "", (), "16", 0.0, 0, 0.0))
    ((last,),) = values[-1:]
    assert last.output is not None and last.verdict is not None
    assert len(last.tokens) == len(last.output.tokens[0]) and all(token.step for token in last.tokens)
    drawn = text.card(last)
    assert drawn.count('class="token"') == len(last.tokens) and f"from {last.output.forwards[0]} forwards" in drawn
    if schedule != "freedave":  # which tells of no steps
        counts = [sum(bool(token.step) for token in each[0].tokens) for each in values[:-1]]
        assert len(counts) >= 2 and counts[0] < counts[-1]


def test_a_prompt_that_is_no_puzzle_has_no_verdict(models: Models) -> None:
    (last,) = shown(text.answer(models, "<b>hello</b>", "threshold", "threshold=0.5", (), "16", 0.0, 0, 0.0))[-1]
    assert last.verdict is None and "<b>hello" not in text.cards((last,))
    with pytest.raises(BadInput, match="no such setting"):
        text.answer(models, "3? + ? = 91", "threshold", "nonsense=1", (), "16", 0.0, 0, 0.0)


# ------------------------------------------------------------------------------------------------------------- students


def test_without_a_student_the_tab_says_so(models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(steps, "lora_folder", lambda: tmp_path / "shapes-steps")
    with pytest.raises(BadInput, match="not here: there is no step LoRA in shapes-steps"):
        steps.students(models, "a small red circle", 1, 4, 0)


def test_students_stand_beside_their_teacher_and_leave_the_model_as_it_was(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from hasten.accelerators.distillation.adapters import Adapters
    from hasten.pipelines.step_lora import StepLoRA, facts_of

    with models.shapes(Line()) as held:
        network, scheduler = held.pipe.transformer, held.pipe.scheduler
        layer = next(name for name, module in network.named_modules() if name.endswith("attn1.to_q"))
        adapters = Adapters(network, [layer], 2)
        with torch.no_grad():
            for factor in adapters.factors.values():
                factor.normal_()
        factors = {name: factor.detach().clone() for name, factor in adapters.state().items()}
        adapters.remove()
        facts = facts_of(network, 2, "random", (3.0, 3.0), {1: [999.0], 2: [999.0, 499.0]}, 0.0)
        StepLoRA("transformer", factors, facts).save(tmp_path)
    monkeypatch.setattr(steps, "lora_folder", lambda: tmp_path)
    before = shown(steps.students(models, "a small red circle", 2, 3, 0))
    after = shown(steps.students(models, "a small red circle", 2, 3, 0))[-1]
    found = before[-1]
    assert [(each.name, each.steps) for each in found] == [("teacher", 3), ("student", 2), ("student", 1)]
    assert [len(value) for value in before] == [1, 2, 3]  # each row as soon as it is there
    assert [each.images[0].tobytes() for each in found] == [each.images[0].tobytes() for each in after]
    assert len({each.images[0].tobytes() for each in found}) == 3
    assert held.pipe.scheduler is scheduler and all(right is not None for each in found for right in each.right)
    assert steps.rows(found).count("<img") == 6


# -------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("options", "why"),
    [({"port": 70000}, "--port"), ({"queue": 0}, "--queue"), ({"dtype": "int3"}, "--dtype"), ({"device": "abacus"}, "--device")],
)
def test_options_that_are_not_allowed_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(BadInput, match=f"{why} must be"):
        DemoOptions(**options)


def test_the_command_teaches_and_refuses_in_one_line(tmp_path: Path) -> None:
    told = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "160"})
    assert told.exit_code == 0 and all(word in told.stdout for word in ("--model", "--share", "--queue", "Compare", "Steps"))
    refused = CliRunner().invoke(app, ["demo", "--model", str(tmp_path)])
    assert refused.exit_code == 2 and "model_index.json" in refused.stderr and refused.stderr.count("\n") == 1
