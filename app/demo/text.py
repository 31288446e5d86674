"""Text: a diffusion language model answers, and every token is shown when it is committed; schedules stand side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.page import Run, Tab, Work, buttons, caption_of, start, status_line
from hasten.app.demo.runs import Line, Models
from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from hasten.pipelines.text import TextOutput, TextPipeline, TextUpdate

NAME = "text"
SCHEDULES = (
    "static", "threshold", "factor", "hierarchical", "entropy-bound", "klass", "ccd", "credit", "saber", "rcr", "editing", "wino",
    "freedave",
)  # fmt: skip
"""As `hasten text --schedule` takes them."""
SAMPLES = ("3? + ? = 91", "483 + 759 = ?", "depth 3 ????????", "1??4/?4??/?1??/4??1")
LENGTHS = ("16", "32", "48", "64")
HUES = 12
"""Colours of steps, over and over."""


@dataclass(frozen=True)
class Token:
    """A place of an answer.

    Attributes:
        text: As it is printed.
        step: That committed it; 0 where it is a mask or a guess.
        masked: Whether nothing is known of it.
    """

    text: str
    step: int
    masked: bool = False


@dataclass(frozen=True)
class Answer:
    """What a schedule has made so far.

    Attributes:
        schedule: Its name.
        tokens: By their places.
        step: Of the schedule, so far.
        output: The whole, once it is there.
        seconds: Without the pauses.
        verdict: Whether the puzzle is solved; None where the prompt is none.
        why: What is wrong.
    """

    schedule: str
    tokens: tuple[Token, ...] = ()
    step: int = 0
    output: TextOutput | None = None
    seconds: float = 0.0
    verdict: bool | None = None
    why: str = ""


def answer(
    models: Models,
    prompt: str,
    schedule: str,
    settings: str,
    beside: Sequence[str],
    length: str,
    temperature: float,
    seed: int,
    pace: float,
) -> Work:
    """The work of the tab's button; shows all `Answer`s, as a tuple, after every step."""
    from hasten.app.text import schedule_of

    prompt = caption_of(prompt)
    if length not in LENGTHS:
        raise BadInput(f"length must be one of {', '.join(LENGTHS)}, not {length!r}")
    names = list(dict.fromkeys([schedule, *beside]))
    rules = {name: schedule_of(name, settings.split() if name == schedule else ()) for name in names}
    call = {"gen_length": int(length), "temperature": float(temperature), "seeds": int(seed)}

    def work(line: Line) -> None:
        from hasten.pipelines.text import TextPipeline

        answers = {name: Answer(name) for name in names}

        def show(found: Answer) -> None:
            answers[found.schedule] = found
            line.show(tuple(answers.values()))

        with models.text(line) as (model, tokenizer):
            for number, (name, rule) in enumerate(rules.items()):
                line.expect(0, f"{name}, schedule {number + 1} of {len(names)}" if len(names) > 1 else name)
                pipe = TextPipeline(model, tokenizer, rule)
                try:
                    found = _decoded(pipe, prompt, name, line, show, float(pace), call)
                except ValueError as why:
                    raise BadInput(str(why)) from why
                show(_judged(prompt, found))

    return work


def _decoded(pipe: TextPipeline, prompt: str, name: str, line: Line, show: Any, pace: float, call: dict[str, Any]) -> Answer:
    """One schedule's answer, shown step by step where the schedule tells of its steps."""
    from hasten.accelerators.decoding.freedave import FreeDave

    if isinstance(pipe.engine.schedule, FreeDave):
        output = pipe(prompt, **call)
        return Answer(name, _final(pipe, output), max(output.steps[0], default=0), output, output.seconds)
    since: dict[int, int] = {}
    slept, step = 0.0, 0
    updates = pipe.stream(prompt, **call)
    while True:
        began = time.perf_counter()
        try:
            update = next(updates)
        except StopIteration as end:
            output = end.value
            return Answer(name, _final(pipe, output), step, output, output.seconds - slept)
        step = update.step
        show(Answer(name, _places(pipe, update, since), step))
        asleep = time.perf_counter()
        line.sleep(pace - (asleep - began))
        slept += time.perf_counter() - asleep


def _places(pipe: TextPipeline, update: TextUpdate, since: dict[int, int]) -> tuple[Token, ...]:
    """The answer after a step; `since` keeps for each place the step that committed it."""
    from hasten.accelerators.decoding.engine import COMMITTED, MASKED

    places = []
    for place, (token, mark) in enumerate(zip(update.tokens, update.marks, strict=True)):
        if mark < COMMITTED:
            since.pop(place, None)
            places.append(Token("·" if mark == MASKED else _shown(pipe, token), 0, mark == MASKED))
        else:
            places.append(Token(_shown(pipe, token), since.setdefault(place, update.step)))
    return tuple(places)


def _final(pipe: TextPipeline, output: TextOutput) -> tuple[Token, ...]:
    return tuple(Token(_shown(pipe, token), step) for token, step in zip(output.tokens[0], output.steps[0], strict=True))


def _shown(pipe: TextPipeline, token: int) -> str:
    """A token as it is printed; the end of the text is a sign."""
    if token == pipe.eos_id:
        return "⏎"
    return str(pipe.tokenizer.decode([token])) or "▏"


def _judged(prompt: str, found: Answer) -> Answer:
    """With what the puzzles' checker says."""
    from hasten.pipelines.zoo.puzzles import check

    assert found.output is not None
    try:
        verdict = check(prompt, found.output.texts[0])
    except ValueError:
        return found  # no puzzle: nothing to check it by
    return replace(found, verdict=verdict.solved, why="" if verdict.solved else verdict.reason)


# ------------------------------------------------------------------------------------------------------------------ showing


def card(found: Answer) -> str:
    """One schedule's answer: its tokens in the colours of their steps, and what it cost."""
    spans = []
    for token in found.tokens:
        if token.step:
            hue = (token.step - 1) % HUES * 360 // HUES
            spans.append(f'<span class="token" style="background:hsl({hue} 75% 78%)" title="step {token.step}">{escape(token.text)}</span>')
        else:
            spans.append(f'<span class="{"mask" if token.masked else "guess"}">{escape(token.text)}</span>')
    below = f"<p>step {found.step} …</p>" if found.step else "<p>waiting …</p>"
    if found.output is not None:
        forwards, tokens = found.output.forwards[0], len(found.output.tokens[0])
        below = (
            f"<p><b>{escape(found.output.texts[0])}</b> {markup.verdict(found.verdict)}"
            f"{f'<small>{escape(found.why)}</small>' if found.why else ''}"
            f"<small>{tokens} tokens from {forwards} forwards: {tokens / max(1, forwards):.2f} a forward, {found.seconds:.3f} s"
            f"{'' if found.output.exact else '; the cache is approximate'}</small></p>"
        )
    return f'<div class="hasten-answer"><h3>{escape(found.schedule)}</h3><div class="hasten-tokens">{"".join(spans)}</div>{below}</div>'


def cards(found: Sequence[Answer]) -> str:
    """Side by side, a table below where there are several that are done."""
    drawn = f'<div class="hasten-answers">{"".join(map(card, found))}</div>'
    whole = [each for each in found if each.output is not None]
    if len(whole) < 2 or len(whole) < len(found):
        return drawn
    head = ("schedule", "forwards", "tokens per forward", "seconds", "solved")
    rows = [
        (
            each.schedule, str(each.output.forwards[0]), f"{each.output.tokens_per_forward[0]:.2f}", f"{each.seconds:.3f}",
            "–" if each.verdict is None else "yes" if each.verdict else "no",
        )
        for each in whole
        if each.output is not None
    ]  # fmt: skip
    return drawn + markup.table([head, *rows], [each.verdict for each in whole])


# ------------------------------------------------------------------------------------------------------------------- layout


def build(models: Models) -> Tab:
    """The tab's components and what they do."""
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            prompt = gradio.Textbox(SAMPLES[0], label="Prompt", info="a puzzle for the small model that ships", elem_id="text-prompt")
            gradio.Examples([[sample] for sample in SAMPLES], [prompt], label="Puzzles")
            fields: dict[str, Any] = {
                "prompt": prompt,
                "schedule": gradio.Dropdown(list(SCHEDULES), value="credit", label="Schedule"),
                "settings": gradio.Textbox("", label="Its settings", placeholder="threshold=0.8", info="NAME=VALUE, spaces between"),
                "beside": gradio.CheckboxGroup(list(SCHEDULES), value=["static", "threshold"], label="Side by side with"),
                "length": gradio.Radio(list(LENGTHS), value="32", label="Most tokens"),
                "temperature": gradio.Slider(0.0, 2.0, 0.0, step=0.05, label="Temperature"),
                "seed": gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31),
                "pace": gradio.Slider(
                    0.0, 1.0, 0.15, step=0.05, label="Pause", info="seconds after each step, for the eye; not in the times"
                ),
            }
            run, stop = buttons(NAME, "Answer")
        with gradio.Column(scale=2, min_width=300):
            status = status_line()
            out = gradio.HTML(markup.hint("Tokens appear here as they are committed, coloured by step."), elem_id="text-answers")
    tab = Tab(NAME, fields)
    work = Run(tab, "text", "text", lambda **given: answer(models, **given), lambda value: {out: cards(value)}, [out], {})
    start(work, run, stop, status)
    return tab
