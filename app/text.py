"""`hasten text`: answers from a diffusion language model, with the order in which its tokens were committed."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.app.errors import BadInput
from hasten.app.options import parse_settings
from hasten.app.output import Outcome

if TYPE_CHECKING:
    from hasten.accelerators.decoding.freedave import FreeDave
    from hasten.accelerators.decoding.schedule import Schedule
    from hasten.pipelines.text import TextOutput, TextPipeline, TextUpdate

WITHOUT_A_SCHEDULER = ("wino", "freedave")
"""Schedules beside those of `SCHEDULERS`."""


@dataclass(frozen=True)
class TextOptions:
    """What the command line says; None where it says nothing.

    Attributes:
        model: "puzzles", a folder or an id on the hub.
        schedule: Name of a schedule.
        settings: Of the schedule, each as "name=value".
        gen_length, block_length: Tokens of an answer and of a block.
        temperature: Of the Gumbel noise; 0 takes the most probable tokens.
        seed: Of the first row.
        cache: Of the engine.
        dtype, device: Of the model.
        trust_remote_code: Whether code beside the weights may be run.
    """

    model: str = "puzzles"
    schedule: str = "credit"
    settings: Sequence[str] = ()
    gen_length: int | None = None
    block_length: int | None = None
    temperature: float = 0.0
    seed: int = 0
    cache: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


def answer(options: TextOptions, prompts: Sequence[str], trace: bool) -> Outcome:
    """Answers the prompts as one batch.

    Args:
        trace: Whether every step is shown as well.

    Raises:
        BadInput: An option is not allowed.
    """
    if not prompts:
        raise BadInput('PROMPT is missing: say what to answer, such as "3? + ? = 91"')
    schedule = schedule_of(options.schedule, options.settings)
    pipe = loaded(options, schedule)
    length = options.gen_length
    if length is None and options.model == "puzzles":
        from hasten.pipelines.zoo.puzzles import GEN_LENGTH

        length = GEN_LENGTH
    updates: list[TextUpdate] = []
    try:
        found = pipe(
            list(prompts), gen_length=length, temperature=options.temperature, seeds=options.seed,
            stream=updates.append if trace else None,
        )  # fmt: skip
    except ValueError as why:
        raise BadInput(str(why)) from None
    verdicts = [_verdict(prompt, text) if options.model == "puzzles" else None for prompt, text in zip(prompts, found.texts, strict=True)]
    lines = []
    if trace:
        lines.append(drawn(pipe, prompts, updates))
    lines += [_line(*row) for row in zip(prompts, found.texts, verdicts, strict=True)]
    lines.append(_summary(found, schedule))
    return Outcome(_data(options, prompts, found, verdicts), "\n".join(lines))


def schedule_of(name: str, settings: Sequence[str]) -> Schedule | FreeDave:
    """A schedule by name, with settings "name=value"; values are JSON, or else words.

    Raises:
        BadInput: There is no such schedule or setting, or a value is out of range.
    """
    from hasten.accelerators.decoding.freedave import FreeDave
    from hasten.accelerators.decoding.wino import WINO
    from hasten.pipelines.decoding_schedulers import SCHEDULERS, decoding_scheduler

    if name not in (*SCHEDULERS, *WITHOUT_A_SCHEDULER):
        raise BadInput(f"--schedule must be one of {', '.join((*SCHEDULERS, *WITHOUT_A_SCHEDULER))}, not {name!r}")
    values = parse_settings(settings, "threshold=0.9")
    try:
        if name == "wino":
            return WINO(**values)
        if name == "freedave":
            return FreeDave(**values)
        return decoding_scheduler(name, **values).schedule
    except TypeError as why:
        raise BadInput(f"--set: {name} has no such setting ({' '.join(str(why).split())})") from None
    except ValueError as why:
        raise BadInput(f"--set: {why}") from None


def loaded(options: TextOptions, schedule: Schedule | FreeDave) -> TextPipeline:
    """The model, ready to answer.

    Raises:
        BadInput: There is no such model, or it does not go with the options.
    """
    import torch
    from transformers.utils import logging

    from hasten.pipelines.text import TextPipeline

    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what goes wrong is said in a line of our own
    dtypes: dict[str, torch.dtype | str] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "auto": "auto"}
    if options.dtype not in dtypes:
        raise BadInput(f"--dtype must be one of {', '.join(dtypes)}, not {options.dtype!r}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    try:
        return TextPipeline.from_pretrained(
            options.model, schedule, dtype=dtypes[options.dtype], device=device, trust_remote_code=options.trust_remote_code,
            block_length=options.block_length, cache=options.cache,
        )  # fmt: skip
    except OSError as why:
        raise BadInput(f"--model {options.model!r} cannot be loaded: {' '.join(str(why).split())[:200]}") from None
    except ValueError as why:
        raise BadInput(" ".join(str(why).split())[:300]) from None


def _verdict(prompt: str, text: str) -> str | None:
    """What the puzzles' checker says; None where the prompt is no puzzle."""
    from hasten.pipelines.zoo.puzzles import check

    try:
        verdict = check(prompt, text)
    except ValueError:
        return None
    return "right" if verdict.solved else f"wrong: {verdict.reason}"


def _line(prompt: str, text: str, verdict: str | None) -> str:
    return f"{prompt}  ->  {text}" + (f"   ({verdict})" if verdict is not None else "")


def _summary(found: TextOutput, schedule: Schedule | FreeDave) -> str:
    per = sum(map(len, found.tokens)) / max(1, sum(found.forwards))
    exact = "" if found.exact else "; the cache is approximate"
    return f"{type(schedule).__name__}: {found.calls} forwards, {per:.2f} tokens per forward, {found.seconds:.2f} s{exact}"


def _data(options: TextOptions, prompts: Sequence[str], found: TextOutput, verdicts: Sequence[str | None]) -> dict[str, Any]:
    rows = [
        {
            "prompt": prompt, "text": text, "verdict": verdict, "tokens": tokens, "steps": steps, "forwards": forwards,
            "tokens_per_forward": round(per, 4),
        }
        for prompt, text, verdict, tokens, steps, forwards, per in zip(
            prompts, found.texts, verdicts, found.tokens, found.steps, found.forwards, found.tokens_per_forward, strict=True
        )
    ]  # fmt: skip
    run = {"calls": found.calls, "seconds": round(found.seconds, 4), "exact": found.exact}
    return {"model": options.model, "schedule": options.schedule, "settings": list(options.settings), **run, "rows": rows}


# --------------------------------------------------------------------------------------------------------------------- trace

COLOURS = ("red", "dark_orange", "yellow", "green3", "cyan", "dodger_blue1", "medium_purple", "magenta")
"""Of steps, over and over."""


def drawn(pipe: TextPipeline, prompts: Sequence[str], updates: Sequence[TextUpdate]) -> str:
    """Each row's answer after each step: a token has the colour of the step that committed it, a mask is a dot, a guess is dim."""
    from rich.console import Console
    from rich.text import Text

    from hasten.accelerators.decoding.engine import COMMITTED, MASKED

    console = Console(file=io.StringIO(), force_terminal=_colours(), width=10_000, highlight=False)
    for row, prompt in enumerate(prompts):
        console.print(prompt, style="bold", markup=False)
        since: dict[int, int] = {}
        for update in (update for update in updates if update.row == row):
            line = Text(f"{update.step:4d}  ")
            for place, (token, mark) in enumerate(zip(update.tokens, update.marks, strict=True)):
                if mark < COMMITTED:
                    since.pop(place, None)
                    line.append("\u00b7" if mark == MASKED else _shown(pipe, token), style="dim")
                else:
                    step = since.setdefault(place, update.step)
                    line.append(_shown(pipe, token), style=COLOURS[(step - 1) % len(COLOURS)])
            console.print(line)
    written = console.file
    assert isinstance(written, io.StringIO)
    return written.getvalue().rstrip("\n")


def _colours() -> bool:
    """Whether stdout shows colours."""
    from rich.console import Console

    return Console().is_terminal


def _shown(pipe: TextPipeline, token: int) -> str:
    """A token as it is printed: special ones as a bar, line ends as a sign."""
    if token == pipe.eos_id:
        return "\u258f"
    return str(pipe.tokenizer.decode([token])).replace("\n", "\u23ce") or "\u258f"
