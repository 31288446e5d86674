"""Steps: the distilled student in 1, 2, 4 and 8 steps beside its teacher, with verdicts and times."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.compare import SAMPLE
from hasten.app.demo.markup import Shown
from hasten.app.demo.page import Run, Tab, Work, buttons, caption_of, start, status_line
from hasten.app.demo.runs import Line, Models
from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.pipelines.step_lora import StepLoRA

NAME = "steps"
COUNTS = (8, 4, 2, 1)
WEIGHTS_FILE = "pytorch_lora_weights.safetensors"
"""As `StepLoRA.save` names it; the page is built without importing what that needs."""
MOST_PICTURES = 8


@dataclass(frozen=True)
class Drawn:
    """One number of steps.

    Attributes:
        name: "teacher" or "student".
        steps: Of the denoiser.
        images: From the same noise as those of the others.
        seconds: Of the whole call, all pictures together.
        right: The verifier's verdicts; None where it cannot judge.
    """

    name: str
    steps: int
    images: list[Image]
    seconds: float
    right: list[bool | None]


def lora_folder() -> Path:
    """Where the step LoRA of the shapes model lies once it was trained."""
    return Path(str(files("hasten.pipelines.zoo"))) / "weights" / "shapes-steps"


def missing() -> str:
    """Why there is no student, or nothing where there is one."""
    if (lora_folder() / WEIGHTS_FILE).is_file():
        return ""
    return f"the distilled student is not here: there is no step LoRA in {lora_folder().name} beside the other models of the zoo"


def students(models: Models, caption: str, pictures: int, steps: int, seed: int) -> Work:
    """The work of the tab's button; shows all `Drawn`s, as a tuple, as they are there."""
    from hasten.app.drawing import Job

    caption = caption_of(caption)
    if not 1 <= pictures <= MOST_PICTURES:
        raise BadInput(f"pictures must be from 1 to {MOST_PICTURES}, not {pictures}")
    if why := missing():
        raise BadInput(why)

    def work(line: Line) -> None:
        from hasten.pipelines.step_lora import StepLoRA

        lora = StepLoRA.load(lora_folder())
        counts = [count for count in COUNTS if count in lora.steps]
        with models.shapes(line) as held:
            job = Job((caption,) * int(pictures), int(seed), int(steps), int(pictures), held.arguments(None, None))
            found: list[Drawn] = []
            held.pipe(**job.call(range(len(job)), 1))  # what only the first call of a batch size takes is not timed
            line.expect(job.steps + sum(counts), f"teacher, {job.steps} steps")
            with line.watching(held.pipe.scheduler):
                found.append(_timed("teacher", held, job, job.steps, {}))
            line.show(tuple(found))
            for count in counts:
                line.say(f"student, {count} step{'s' if count > 1 else ''}")
                found.append(_student(lora, held, job, count, line))
                line.show(tuple(found))

    return work


def _student(lora: StepLoRA, held: Any, job: Any, count: int, line: Line) -> Drawn:
    try:
        with lora.applied(held.pipe, steps=count) as call, line.watching(held.pipe.scheduler):
            return _timed("student", held, job, count, call)
    except ValueError as why:
        raise BadInput(str(why)) from why


def _timed(name: str, held: Any, job: Any, steps: int, further: dict[str, Any]) -> Drawn:
    import time

    from hasten.app.drawing import pictures_of
    from hasten.app.measure import judge

    call = {**job.call(range(len(job)), steps), **further}
    began = time.perf_counter()
    output = held.pipe(**call)
    seconds = time.perf_counter() - began
    images = pictures_of(held.pipe, output)
    return Drawn(name, steps, images, seconds, judge(images, job.captions, held.choice.shipped))


# ------------------------------------------------------------------------------------------------------------------ showing


def rows(found: Sequence[Drawn]) -> str:
    """A row of pictures for each number of steps, and a table."""
    teacher = found[0]
    made, body = [], []
    for each in found:
        title = f"{each.name}, {each.steps} step{'s' if each.steps > 1 else ''}"
        seconds = each.seconds / len(each.images)
        shown = [
            Shown(image, title if number == 0 else f"seed + {number}", "", each.right[number]) for number, image in enumerate(each.images)
        ]
        made.append(markup.pictures(shown))
        judged = [right for right in each.right if right is not None]
        body.append(
            (
                title, f"{seconds:.3f} s", f"{teacher.seconds / each.seconds:.1f}×",
                f"{sum(judged)} of {len(judged)}" if judged else "–",
            )
        )  # fmt: skip
    head = ("", "per picture", "speed-up", "correct")
    return (
        markup.table([head, *body])
        + "".join(made)
        + markup.note("Same noise in every row; times are of the whole call, text and decoder included.")
    )


# ------------------------------------------------------------------------------------------------------------------- layout


def build(models: Models) -> Tab:
    """The tab's components and what they do."""
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            fields: dict[str, Any] = {
                "caption": gradio.Textbox(SAMPLE, label="Caption", lines=2, elem_id="steps-caption"),
                "pictures": gradio.Slider(1, MOST_PICTURES, 4, step=1, label="Pictures"),
                "steps": gradio.Slider(1, 100, 50, step=1, label="Teacher's steps"),
                "seed": gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31),
            }
            gradio.HTML(markup.note("The student is a LoRA on the small shapes model that ships, whatever model the other tabs use."))
            run, stop = buttons(NAME, "Draw")
        with gradio.Column(scale=2, min_width=300):
            status = status_line()
            why = missing()
            words = f"{why[0].upper()}{why[1:]}." if why else "Teacher and student appear here, row by row."
            out = gradio.HTML(markup.hint(words), elem_id="steps-rows")
    tab = Tab(NAME, fields)
    work = Run(tab, "steps", "pictures", lambda **given: students(models, **given), lambda value: {out: rows(value)}, [out], {})
    start(work, run, stop, status)
    return tab
