"""Compare: plain and accelerated from the same noise, timed in turns, and fewer steps in the same time beside them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.markup import Shown
from hasten.app.demo.page import Run, Tab, Work, buttons, caption_of, start, status_line
from hasten.app.demo.runs import Line, Models
from hasten.app.errors import BadInput
from hasten.app.methods import DECIDERS, INTERVALS, METHODS

if TYPE_CHECKING:
    from hasten.accelerators.caching.plan import Plan
    from hasten.app.measure import Comparison, Variant

NAME = "compare"
SAMPLE = "a small red circle left of a large blue square"
MOST_STEPS = 200
PATIENCE = 6.0
"""Seconds of the first plain and accelerated picture up to which there are two more rounds, so that times are medians."""


@dataclass(frozen=True)
class Result:
    """What a visitor has compared.

    Attributes:
        comparison: Its `fewer` is the plain variant until fewer steps were asked for.
        planned: What the method asked for.
        model: The pipeline's name.
        notes: What was not reused, and why.
    """

    comparison: Comparison
    planned: Plan | None
    model: str
    notes: tuple[str, ...]

    @property
    def has_fewer(self) -> bool:
        """Whether fewer steps were drawn."""
        return self.comparison.fewer is not self.comparison.plain


def method_options(method: str, interval: int, threshold: float, cached: float, boundary: float, skip: int) -> dict[str, Any]:
    """Of all sliders those that the method has, as `Options` takes them."""
    options: dict[str, Any] = {"method": method}
    if method in INTERVALS:
        options["interval"] = int(interval)
    if method in DECIDERS:
        options["threshold"] = float(threshold)
    if method == "delta-dit":
        options |= {"cached": str(float(cached)), "boundary": str(float(boundary))}
    if skip > 1:
        options["skip_guidance"] = int(skip)
    return options


def compare(
    models: Models, caption: str, model: str, method: str, interval: int, threshold: float, cached: float, boundary: float, skip: int,
    steps: int, guidance: float, seed: int,
) -> Work:  # fmt: skip
    """The work of the tab's button; shows `Variant`s as they are drawn, and a `Result`."""
    from hasten.app.drawing import Job
    from hasten.app.measure import Comparison, Variant, judge
    from hasten.app.setup import Options, check

    caption = caption_of(caption)
    if not 1 <= steps <= MOST_STEPS:
        raise BadInput(f"steps must be from 1 to {MOST_STEPS}, not {steps}")
    if model not in models.names:
        raise BadInput(f"model must be one of {', '.join(models.names)}, not {model!r}")
    scale = float(guidance) or None
    own = method_options(method, interval, threshold, cached, boundary, skip)
    checked = check(Options(model, steps=int(steps), guidance=scale, seed=int(seed), **own))

    def work(line: Line) -> None:
        from hasten.pipelines.accelerated import accelerate

        with models.picture(model, line) as held:
            job = Job((caption,), int(seed), int(steps), 1, held.arguments(scale, None))
            try:
                fast = accelerate(held.pipe, checked.method)
            except ValueError as why:
                raise BadInput(str(why)) from why
            with line.watching(held.pipe.scheduler):
                warm = min(2, job.steps)
                line.expect(warm + 6 * job.steps, "tracing the denoiser")
                fast.baseline(**job.call([0], warm))  # it traces, and is not timed
                plain, accelerated = Variant("plain", job.steps), Variant("accelerated", job.steps)
                rounds, done = 3, 0
                while done < rounds:
                    line.say(f"plain, round {done + 1}")
                    _draw(plain, fast, fast.baseline, job, job.steps)
                    if done == 0:
                        plain.correct = judge(plain.images, job.captions, held.choice.shipped)
                        line.show(plain)
                    line.say(f"accelerated, round {done + 1}")
                    _draw(accelerated, fast, fast, job, job.steps)
                    done += 1
                    if done == 1:
                        report = fast.report
                        accelerated.correct = judge(accelerated.images, job.captions, held.choice.shipped)
                        if plain.call_seconds + accelerated.call_seconds > PATIENCE:
                            rounds = 1
            assert report.plan is not None
            told = [*(f"not reused: {reason}" for reason in report.reasons), *(f"warning: {warning}" for warning in report.warnings)]
            comparison = Comparison(job, plain, accelerated, plain, report, report.plan)
            line.show(Result(comparison, report.planned, model, tuple(told)))

    return work


def fewer_steps(models: Models, found: Result | None) -> Work:
    """The work of "Fewer steps at equal time": plain, with as many steps as the accelerated picture's time affords; shows a `Result`."""
    from dataclasses import replace

    from hasten.app.measure import Variant, judge

    if found is None:
        raise BadInput("compare a picture first: the time to keep to is that of its accelerated one")
    before = found.comparison

    def work(line: Line) -> None:
        from hasten.pipelines.accelerated import accelerate

        job, share = before.job, before.accelerated.seconds / before.plain.seconds
        variant = Variant("fewer steps", max(1, min(job.steps, round(job.steps * share))))
        with models.picture(found.model, line) as held:
            fast = accelerate(held.pipe)
            with line.watching(held.pipe.scheduler):
                rounds = len(before.plain.rounds)
                line.expect(rounds * variant.steps, f"{variant.steps} steps")
                for _ in range(rounds):
                    _draw(variant, fast, fast.baseline, job, variant.steps)
            variant.correct = judge(variant.images, job.captions, held.choice.shipped)
        line.show(replace(found, comparison=replace(before, fewer=variant)))

    return work


def _draw(variant: Variant, fast: Any, call: Any, job: Any, steps: int) -> None:
    """Another round of a variant; pictures of the first are kept."""
    from hasten.app.drawing import pictures_of

    output = call(**job.call([0], steps))
    if not variant.images:
        variant.images = pictures_of(fast.pipe, output)
    variant.rounds.append((fast.report.seconds, fast.report.call_seconds))


# ------------------------------------------------------------------------------------------------------------------ showing


def figures(found: Result) -> str:
    """Measured times, the bound, and what the verifier says."""
    comparison = found.comparison
    rows = comparison.table()[: 4 if found.has_fewer else 3]
    columns = [list(row) for row in zip(*rows, strict=True)]  # a column for each variant: narrow pages have room
    if comparison.plain.verdict:
        verdicts = [variant.correct[0] for variant in comparison.variants]
        columns[-1] = ["verifier", *("✓ correct" if right else "✗ wrong" for right in verdicts[: len(rows) - 1])]
    rounds = len(comparison.plain.rounds)
    turns = f"median of {rounds} rounds in turns" if rounds > 1 else "one round"
    small = (
        f"Times: {turns}; the call has text and decoder, too. Speed-up: of the loop; at most: if reuse were free. "
        "PSNR and error: against plain with the same noise."
    )
    return markup.table(columns) + markup.note(small) + "".join(markup.note(line) for line in found.notes)


def gallery(found: Result) -> str:
    """All pictures, and the difference between two of them."""
    from PIL import Image

    from hasten.app.compare import amplification
    from hasten.app.measure import decibels, values

    comparison = found.comparison
    plain, accelerated = comparison.plain, comparison.accelerated
    scale = amplification(comparison)
    change = abs(values(accelerated.images[0]) - values(plain.images[0])) * scale
    difference = Image.fromarray((change.clip(0, 1) * 255).round().astype("uint8"))
    speed = f"{comparison.speedup(accelerated):.2f}× the speed, {decibels(comparison.psnr(accelerated))}"
    shown = [
        Shown(plain.images[0], "plain", f"{plain.steps} steps, {plain.seconds:.2f} s", plain.correct[0]),
        Shown(accelerated.images[0], "accelerated", f"{accelerated.seconds:.2f} s\n{speed}", accelerated.correct[0]),
        Shown(difference, "difference", f"{scale}× amplified"),
    ]
    if found.has_fewer:
        fewer = comparison.fewer
        small = f"{fewer.steps} steps, {fewer.seconds:.2f} s\n{decibels(comparison.psnr(fewer))}"
        shown.append(Shown(fewer.images[0], "fewer steps", small, fewer.correct[0]))
    return markup.pictures(shown)


def maps(found: Result) -> str:
    """What was planned, and under it what was executed."""
    executed = found.comparison.plan
    planned = markup.heat_map(found.planned, "planned") if found.planned is not None else ""
    return planned + markup.heat_map(executed, "executed")


def slider(found: Result) -> tuple[Any, Any]:
    """What lies on both sides: the accelerated picture on the right, on the left plain, or fewer steps once they were drawn."""
    comparison = found.comparison
    left = comparison.fewer if found.has_fewer else comparison.plain
    return markup.enlarged(left.images[0]), markup.enlarged(comparison.accelerated.images[0])


# ------------------------------------------------------------------------------------------------------------------- layout


def default_method(models: Models) -> str:
    """Of the page's default model."""
    return {"shapes-unet": "deepcache"}.get(models.default, "delta-dit" if models.choices[models.default].shipped else "auto")


def default_steps(models: Models) -> int:
    """What the page's default model recommends, else 20."""
    from hasten.pipelines.zoo.loading import call_defaults

    folder = models.choices[models.default].folder
    return int(call_defaults(folder).get("num_inference_steps", 20)) if folder is not None else 20


def model_field(models: Models) -> Any:
    """Which pipeline; hidden where there is one."""
    return gradio.Dropdown(models.names, value=models.default, label="Model", visible=len(models.names) > 1)


def guidance_field() -> Any:
    """Of the pipeline's call."""
    return gradio.Slider(0.0, 20.0, 0.0, step=0.1, label="Guidance scale", info="0: the model's own")


def build(models: Models) -> Tab:
    """The tab's components and what they do."""
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            fields: dict[str, Any] = {"caption": gradio.Textbox(SAMPLE, label="Caption", lines=2, elem_id="compare-caption")}
            fields["model"] = model_field(models)
            method = default_method(models)
            fields["method"] = gradio.Dropdown([name for name in METHODS if name != "none"], value=method, label="Method")
            sliders = {
                "interval": gradio.Slider(2, 10, 2, step=1, label="Interval", info="every N-th step computes everything"),
                "threshold": gradio.Slider(0.01, 1.0, 0.1, step=0.01, label="Threshold", info="the change below which a step is reused"),
                "cached": gradio.Slider(0.05, 1.0, 0.75, step=0.05, label="Cached", info="share of the blocks that is reused between"),
                "boundary": gradio.Slider(
                    0.0, 1.0, 0.5, step=0.05, label="Boundary", info="share of the steps, at the end, in which front blocks are reused"
                ),
            }
            for name, slider_ in sliders.items():
                slider_.visible = name in shown_sliders(method)
            fields |= sliders
            fields["skip"] = gradio.Slider(
                1, 10, 1, step=1, label="Skip guidance", info="both branches only on every N-th step, after a third of them; 1: always"
            )
            fields["steps"] = gradio.Slider(1, MOST_STEPS, default_steps(models), step=1, label="Steps")
            fields["guidance"] = guidance_field()
            fields["seed"] = gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31)
            run, stop = buttons(NAME, "Compare")
        with gradio.Column(scale=2, min_width=300):
            status = status_line()
            sides = gradio.ImageSlider(
                label="plain | accelerated", interactive=False, height=420, max_height=420, elem_classes="hasten-slider", format="png"
            )
            fewer = gradio.Button("Fewer steps at equal time", elem_id="compare-fewer")
            pictures = gradio.HTML(markup.hint("Plain, accelerated and their difference appear here."), elem_id="compare-pictures")
            table = gradio.HTML("", elem_id="compare-figures")
            plan = gradio.HTML("", elem_id="compare-plan")
    state = gradio.State(None, time_to_live=3600)
    tab = Tab(NAME, fields)

    def render(value: Any) -> dict[Any, Any]:
        if not isinstance(value, Result):  # the plain picture, ahead of the rest
            seconds = f"{value.steps} steps, {value.seconds:.2f} s"
            early = [Shown(value.images[0], value.name, seconds, value.correct[0]), Shown(None, "accelerated"), Shown(None, "difference")]
            return {pictures: markup.pictures(early)}
        label = "fewer steps | accelerated" if value.has_fewer else "plain | accelerated"
        return {
            sides: gradio.ImageSlider(value=slider(value), label=label), pictures: gallery(value), table: figures(value),
            plan: maps(value), state: value,
        }  # fmt: skip

    outputs = [sides, pictures, table, plan, state]
    start(Run(tab, "compare", "pictures", lambda **given: compare(models, **given), render, outputs, {}), run, stop, status)
    again = Run(
        Tab(NAME, {}), "fewer_steps", "pictures", lambda found: fewer_steps(models, found), render, outputs, {"found": state}
    )  # fmt: skip
    start(again, fewer, stop, status)
    fields["method"].change(
        lambda name: [gradio.Slider(visible=each in shown_sliders(name)) for each in sliders],
        fields["method"], list(sliders.values()), queue=False, show_progress="hidden", api_visibility="private",
    )  # fmt: skip
    return tab


def shown_sliders(method: str) -> list[str]:
    """Those that a method has."""
    shown = ["interval"] if method in INTERVALS else ["threshold"] if method in DECIDERS else []
    return [*shown, "cached", "boundary"] if method == "delta-dit" else shown
