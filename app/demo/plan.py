"""Plan: solves for a plan, draws the front of time and error, and lets cells be edited, saved, loaded and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.compare import MOST_STEPS, model_field
from hasten.app.demo.page import Run, Tab, Work, buttons, caption_of, one_line, start, status_line
from hasten.app.demo.runs import Line, Models
from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan

NAME = "plan"
SAMPLES = "\n".join(
    (
        "a small red circle left of a large blue square",
        "a large green cross",
        "a small cyan triangle above a small purple circle",
    )
)
MOST_PROMPTS = 16
MOST_CELLS = 20_000
SHARES = (0.2, 0.35, 0.5, 0.65, 0.8)
"""Of the steps that the front's plans compute."""
PROBES = 4
"""Steps whose sensitivity is measured for the front, where speed counts more than the last bit of error."""
FEWEST_STEPS = 3
TARGETS = ("speed-up", "error")


@dataclass(frozen=True)
class Held:
    """The plan that a visitor works on.

    Attributes:
        plan: As it stands.
        original: As it was made or loaded.
        model: The pipeline that it is for.
        prompts: What it was made from, or what it is to be checked on.
        seed: Of the prompts' noise.
    """

    plan: Plan
    original: Plan
    model: str
    prompts: tuple[str, ...]
    seed: int

    @property
    def edited(self) -> bool:
        """Whether cells were changed."""
        return self.plan != self.original


@dataclass(frozen=True)
class Point:
    """A plan on the front.

    Attributes:
        name: Of the plan.
        bound: The speed-up if reuse were free.
        error: Predicted, or replayed where it is the visitor's own: relative L2 of the final latents.
        own: Whether it is the visitor's.
    """

    name: str
    bound: float
    error: float
    own: bool = False


@dataclass(frozen=True)
class Front:
    """What is known of the front.

    Attributes:
        points: So far.
        missing: Why the visitor's plan is not among them, or nothing.
    """

    points: tuple[Point, ...]
    missing: str = ""


def prompts_of(text: str) -> tuple[str, ...]:
    """One a line.

    Raises:
        BadInput: Too few or too many.
    """
    found = tuple(caption_of(line) for line in (text or "").splitlines() if line.strip())
    if not 2 <= len(found) <= MOST_PROMPTS:
        raise BadInput(f"there must be 2 to {MOST_PROMPTS} prompts, one a line, not {len(found)}")
    return found


def _checked(models: Models, prompts: str, model: str, steps: int) -> tuple[str, ...]:
    if model not in models.names:
        raise BadInput(f"model must be one of {', '.join(models.names)}, not {model!r}")
    if not FEWEST_STEPS <= steps <= MOST_STEPS:
        raise BadInput(f"steps must be from {FEWEST_STEPS} to {MOST_STEPS}, not {steps}")
    return prompts_of(prompts)


def make(models: Models, prompts: str, model: str, target: str, speedup: float, error: float, steps: int, replays: int, seed: int) -> Work:
    """The work of the tab's button; shows a `Held`."""
    found = _checked(models, prompts, model, steps)
    if target not in TARGETS:
        raise BadInput(f"target must be one of {', '.join(TARGETS)}, not {target!r}")
    wanted: dict[str, Any] = {"speedup": float(speedup)} if target == "speed-up" else {"error": float(error)}

    def work(line: Line) -> None:
        from hasten.pipelines.planning import expected
        from hasten.pipelines.planning import plan as solve

        with models.picture(model, line) as held:
            call = {**held.arguments(None, None), "num_inference_steps": int(steps), "batch": len(found), "replays": int(replays)}
            line.say("looking at the denoiser")
            calls = expected(held.pipe, found, **call).calls
            line.expect(calls, f"measuring and solving, {len(found)} prompts")
            try:
                with line.watching(held.pipe.scheduler):
                    made = solve(held.pipe, list(found), seed=int(seed), progress=False, **wanted, **call)
            except ValueError as why:
                raise BadInput(str(why)) from why
            made = replace(made, facts={**made.facts, "num_inference_steps": int(steps)})
            line.show(Held(made, made, model, found, int(seed)))

    return work


def pareto(
    models: Models,
    held: Held | None,
    prompts: str,
    model: str,
    target: str,
    speedup: float,
    error: float,
    steps: int,
    replays: int,
    seed: int,
) -> Work:
    """The work of "Front": the planner's plans for several numbers of computed steps, and the visitor's own replayed; shows `Front`s."""
    found = _checked(models, prompts, model, steps)
    counts = sorted({max(1, round(int(steps) * share)) for share in SHARES})
    own, missing = held.plan if held is not None else None, ""
    if held is not None and (held.model, held.plan.steps) != (model, int(steps)):
        own, missing = None, f"Your plan is not drawn: it is for {held.plan.steps} steps of {held.model}, the front for {steps} of {model}."

    def work(line: Line) -> None:
        with models.picture(model, line) as loaded:
            call = {**loaded.arguments(None, None), "num_inference_steps": int(steps)}
            passes = 1 + PROBES + len(counts) * int(replays) + 2 * (own is not None)
            line.expect(passes * int(steps), f"measuring, and solving for {len(counts)} plans")
            with line.watching(loaded.pipe.scheduler):
                for points in _front(loaded.pipe, found, counts, own, int(replays), int(seed), call):
                    line.show(Front(points, missing))

    return work


def _front(
    pipe: Any, prompts: tuple[str, ...], counts: Sequence[int], own: Plan | None, replays: int, seed: int, call: dict[str, Any]
) -> Iterator[tuple[Point, ...]]:
    """The points so far. `hasten.pipelines.planning.front` with fewer probes and replays, and each point as soon as it is known."""
    from hasten.pipelines.accelerated import denoisers_of
    from hasten.pipelines.calibration import Runs, measure, repairing
    from hasten.pipelines.planning import replay

    steps, seeds = call["num_inference_steps"], tuple(seed + i for i in range(len(prompts)))
    runs = Runs(pipe, next(iter(denoisers_of(pipe))), prompts, seeds, len(prompts), call)
    measured = measure(runs, steps, _silent, min(PROBES, steps - 1))
    repair = repairing(runs, measured, _silent, replays)
    points: list[Point] = []
    for count in counts:
        schedule, error = repair.search(count)
        points.append(Point(f"{count} of {steps} steps", schedule.plan(measured.trace).speedup_bound(measured.trace), error))
        yield tuple(points)
    if own is not None:
        seen = replay(pipe, own, list(prompts), seed=seed, batch=len(prompts), **call)
        yield (*points, Point("your plan", own.speedup_bound(measured.trace), seen.error, own=True))


def _silent() -> None:
    """The scheduler tells how far it is."""


# ------------------------------------------------------------------------------------------------------------------ editing


def toggled(plan: Plan, cell: str) -> Plan:
    """The plan with one cell's next action: compute, reuse, forecast, and compute again.

    Args:
        plan: What is edited; it stays.
        cell: "step,site,branch", from 0.

    Raises:
        BadInput: There is no such cell, it is in the first step, or it stands for the guidance branch.
    """
    from hasten.accelerators.caching.plan import GUIDANCE, Action

    if re.fullmatch(r"\d{1,5},\d{1,5},\d{1,5}", cell) is None:
        raise BadInput(f"a cell is named by step, site and branch, not {cell[:40]!r}")
    step, site, branch = map(int, cell.split(","))
    if step >= plan.steps or site >= len(plan.sites) or branch >= len(plan.branches):
        raise BadInput(f"the plan has {plan.steps} steps, {len(plan.sites)} sites and {len(plan.branches)} branches, and no cell {cell}")
    if step == 0:
        raise BadInput("the first step is computed: there is nothing yet to reuse")
    if plan.sites[site] == GUIDANCE:
        raise BadInput("whether a guidance branch is skipped is not edited here")
    cycle = (Action.COMPUTE, Action.REUSE, Action.FORECAST)
    now = Action(int(plan.actions[step, site, branch]))
    then = cycle[(cycle.index(now) + 1) % len(cycle)]
    actions = plan.actions.copy()
    actions[step, site, branch] = then
    weights = plan.weights
    if weights is not None:
        weights = weights.copy()
        weights[step, site, branch] = 0.0  # what was fitted for another action
        if (now == Action.COMPUTE) != (then == Action.COMPUTE):
            _forget(weights, actions, step, site, branch)
    facts = {name: value for name, value in plan.facts.items() if name != "certificate"}  # which was for the plan as it was
    method = str(facts.get("method", "plan"))
    facts["method"] = method if method.endswith(", edited") else f"{method}, edited"
    return replace(plan, actions=actions, weights=weights, facts=facts)


def _forget(weights: Any, actions: Any, step: int, site: int, branch: int) -> None:
    """Clears the weights of later forecasts that were fitted to other computed steps than they now have before them."""
    from hasten.accelerators.caching.plan import Action

    computed = 0
    for later in range(step + 1, len(actions)):
        if actions[later, site, branch] == Action.COMPUTE:
            computed += 1
            if computed >= weights.shape[3]:
                return
        else:
            weights[later, site, branch] = 0.0


def edit(held: Held | None, cell: str) -> Held:
    """Errors as `toggled`, and where there is no plan."""
    if held is None:
        raise BadInput("make or load a plan first")
    return replace(held, plan=toggled(held.plan, cell))


def load(path: str | None, model: str, seed: int) -> Held:
    """A plan from a file of the visitor's.

    Raises:
        BadInput: It is too large to be shown.
        PlanError: It is none.
    """
    from hasten.accelerators.caching.plan import Plan, PlanError

    if path is None:
        raise BadInput("choose a plan file")
    try:
        plan = Plan.load(path)
    except PlanError as why:
        raise PlanError(str(why).replace(str(path), Path(path).name)) from None
    if plan.actions.size > MOST_CELLS:
        raise BadInput(f"the plan has {plan.actions.size} cells, and at most {MOST_CELLS} are shown here")
    return Held(plan, plan, model, (), int(seed))


def save(plan: Plan, folder: Path) -> str:
    """Writes the plan where the page may serve it from, and returns the file."""
    target = folder / plan.hash / f"plan-{plan.hash}.safetensors"
    target.parent.mkdir(parents=True, exist_ok=True)
    plan.save(target)
    return str(target)


# ------------------------------------------------------------------------------------------------------------------ showing


def summary(held: Held) -> str:
    """What the plan promises, and what it is bound to."""
    from hasten.app.plans import certificate_lines

    plan = held.plan
    lines = [f"plan {plan.hash}: {plan.facts.get('method', 'plan')}", *certificate_lines(plan)]
    if held.edited:
        lines.append("edited: what was measured of the plan holds no more; Front replays it")
    known = ("model", "scheduler", "guidance", "dtype")
    facts = ", ".join(f"{name} {json.dumps(plan.facts[name])}" for name in known if name in plan.facts)
    return "".join(markup.note(line) for line in [*lines, f"bound to {facts}" if facts else ""] if line)


def difference(first: Plan, second: Plan, title: str) -> str:
    """What differs between two plans, as words."""
    if ("certificate" in first.facts) != ("certificate" in second.facts):  # an edited plan has none, and need not say so at length
        first, second = (
            replace(plan, facts={name: fact for name, fact in plan.facts.items() if name != "certificate"}) for plan in (first, second)
        )
    words = first.diff(second) or "the same"
    return f'<div class="hasten-diff">{markup.note(title)}<pre>{escape(words)}</pre></div>'


def front_plot(found: Front) -> str:
    """Error over speed-up: the planner's front, and the visitor's plan."""
    points = found.points

    def draw(axes: Any) -> None:
        line = sorted((point for point in points if not point.own), key=lambda point: point.bound)
        axes.plot([point.bound for point in line], [point.error for point in line], "o-", color="#3f86d6", markersize=4, label="planner")
        for point in (point for point in points if point.own):
            axes.plot([point.bound], [point.error], "D", color="#e08a1e", markersize=6, label="your plan")
        axes.set_xlabel("speed-up of the denoiser loop, at most")
        axes.set_ylabel("relative L2 error of the latents")
        axes.legend(frameon=False, fontsize=8)

    head = ("plan", "at most", "error")
    body = [(point.name, f"{point.bound:.2f}×", f"{point.error:.4f}") for point in points]
    return (
        markup.plot(draw)
        + markup.table([head, *body])
        + markup.note(
            "Errors of the planner's plans are as predicted on these prompts (geometric mean); that of your plan is replayed on them."
        )
        + (markup.note(found.missing) if found.missing else "")
    )


# ------------------------------------------------------------------------------------------------------------------- layout


CELL_SCRIPT = """element.addEventListener('click', (event) => {
    const cell = event.target.closest('[data-cell]');
    if (cell) trigger('select', {cell: cell.dataset.cell});
});"""


def build(models: Models) -> Tab:
    """The tab's components and what they do."""
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            fields: dict[str, Any] = {
                "prompts": gradio.Textbox(SAMPLES, label="Prompts", info="one a line; a third is held out", lines=4, max_lines=8),
            }
            fields["model"] = model_field(models)
            fields |= {
                "target": gradio.Radio(list(TARGETS), value="speed-up", label="Target"),
                "speedup": gradio.Slider(1.0, 8.0, 2.0, step=0.1, label="Speed-up", info="least error at this speed"),
                "error": gradio.Slider(
                    0.005, 0.5, 0.05, step=0.005, label="Error", info="most speed within this relative error", visible=False
                ),
                "steps": gradio.Slider(FEWEST_STEPS, MOST_STEPS, 10, step=1, label="Steps"),
                "replays": gradio.Slider(1, 14, 2, step=1, label="Replays", info="schedules to try; more find better plans"),
                "seed": gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31),
            }
            run, stop = buttons(NAME, "Make a plan")
            with gradio.Row():
                upload = gradio.UploadButton("Load", file_types=[".safetensors"], min_width=80, elem_id="plan-load")
                download = gradio.DownloadButton("Save", interactive=False, min_width=80, elem_id="plan-save")
                other = gradio.UploadButton("Diff", file_types=[".safetensors"], min_width=80, elem_id="plan-other")
        with gradio.Column(scale=2, min_width=300):
            status = status_line()
            grid = gradio.HTML(
                markup.hint("A plan appears here: which block is computed at which step. Click a cell to change it."),
                elem_id="plan-grid", js_on_load=CELL_SCRIPT,
            )  # fmt: skip
            about = gradio.HTML("", elem_id="plan-about")
            changes = gradio.HTML("", elem_id="plan-changes")
            front = gradio.Button("Front: time against error", elem_id="plan-front")
            plotted = gradio.HTML("", elem_id="plan-pareto")
    state = gradio.State(None, time_to_live=3600)
    tab = Tab(NAME, fields)

    def show(held: Held) -> dict[Any, Any]:
        changed = difference(held.original, held.plan, "changed since it was made or loaded") if held.edited else ""
        return {
            grid: markup.heat_map(held.plan, "your plan", cells=True), about: summary(held), changes: changed, state: held,
            download: gradio.DownloadButton(value=save(held.plan, Path(download.GRADIO_CACHE)), interactive=True),
        }  # fmt: skip

    def attempt(work: Callable[[], dict[Any, Any]]) -> dict[Any, Any]:
        """Says in the status where a small change goes wrong."""
        try:
            return {**work(), status: ""}
        except (ValueError, OSError) as error:
            return {status: markup.said(one_line(error), "failed")}

    def clicked(held: Held | None, event: gradio.EventData) -> dict[Any, Any]:
        return attempt(lambda: show(edit(held, str(event.cell))))

    def loaded(path: str | None, model: str, seed: int) -> dict[Any, Any]:
        return attempt(lambda: show(load(path, model, seed)))

    def compared(path: str | None, held: Held | None, model: str, seed: int) -> dict[Any, Any]:
        def work() -> dict[Any, Any]:
            if held is None:
                raise BadInput("make or load a plan first")
            second = load(path, model, seed).plan
            drawn = markup.heat_map(second, "the other plan")
            return {changes: drawn + difference(held.plan, second, "from your plan to the other")}

        return attempt(work)

    outputs = [grid, about, changes, state, download]
    start(Run(tab, "plan", "pictures", lambda **given: make(models, **given), show, outputs, {}), run, stop, status)
    again = Run(
        tab, "front", "pictures", lambda **given: pareto(models, **given), lambda found: {plotted: front_plot(found)}, [plotted],
        {"held": state},
    )  # fmt: skip
    start(again, front, stop, status)
    quick: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
    grid.select(clicked, state, [status, *outputs], **quick)
    upload.upload(loaded, [upload, fields["model"], fields["seed"]], [status, *outputs], **quick)
    other.upload(compared, [other, state, fields["model"], fields["seed"]], [status, changes], **quick)
    fields["target"].change(
        lambda target: [gradio.Slider(visible=target == "speed-up"), gradio.Slider(visible=target == "error")],
        fields["target"], [fields["speedup"], fields["error"]], **quick,
    )  # fmt: skip
    return tab
