"""Steer: several particles of a caption, judged on the way; who came from whom, what it cost, and other methods in the same time."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from hasten.app.demo import markup
from hasten.app.demo.compare import MOST_STEPS, SAMPLE, guidance_field, model_field
from hasten.app.demo.markup import Shown
from hasten.app.demo.page import Run, Tab, Work, buttons, caption_of, start, status_line
from hasten.app.demo.runs import Line, Models
from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.accelerators.steering.report import SearchReport

NAME = "steer"
STEERING = ("fk", "best-of-n", "halving", "svdd", "code")
SEARCHING = ("random", "zero-order", "paths", "rollover", "reno", "carinox")
REWARDS = ("shapes", "shapes-proxy", "brightness", "sharpness", "jpeg-size", "colour:red", "colour:blue")
PRETRAINED = ("clip", "pickscore", "hps", "image_reward", "aesthetic")
MOST_PARTICLES = 16
POOL, ROUNDS = 4, 4096
"""Of the rivals: samples at a time, and more rounds than any budget allows."""
TOLERANCE = 1.05
"""Of the time that best-of-N may take."""


@dataclass(frozen=True)
class Steered:
    """What a method has made of the caption.

    Attributes:
        name: Of the method.
        image: The best.
        reward: Of the image; NaN where it has none.
        seconds: Of all its calls.
        spent: Particle steps, pictures decoded, and pictures scored.
        right: The shapes verifier's verdict.
        report: Who came from whom, for the method that was asked for.
    """

    name: str
    image: Image
    reward: float
    seconds: float
    spent: tuple[int, int, int]
    right: bool | None
    report: SearchReport | None = field(default=None, repr=False)


def rewards_of(models: Models) -> list[str]:
    """Rewards that the page offers; modules of the visitor's own are none of them."""
    zoo = all(choice.shipped for choice in models.choices.values())
    return list(REWARDS if zoo else (*PRETRAINED, *REWARDS[2:]))


def steered(
    models: Models, caption: str, model: str, method: str, particles: int, reward: str, steps: int, guidance: float, seed: int,
    versus: bool,
) -> Work:  # fmt: skip
    """The work of the tab's button; shows all `Steered`s, as a tuple, as they are there."""
    from hasten.app.drawing import Job
    from hasten.app.steering import SEARCHES, STEERS, Steering, choose

    caption = caption_of(caption)
    if reward not in rewards_of(models):
        raise BadInput(f"reward must be one of {', '.join(rewards_of(models))}, not {reward!r}")
    if model not in models.names:
        raise BadInput(f"model must be one of {', '.join(models.names)}, not {model!r}")
    if not 1 <= particles <= MOST_PARTICLES or not 1 <= steps <= MOST_STEPS:
        raise BadInput(f"particles must be from 1 to {MOST_PARTICLES} and steps from 1 to {MOST_STEPS}, not {particles} and {steps}")
    known = STEERS if method in STEERS else SEARCHES
    counted = method in known and known[method].number is not None
    count = int(particles) if counted else None
    steering = method in STEERS
    asked = Steering(steer=method, reward=reward, particles=count) if steering else Steering(search=method, reward=reward, rounds=count)
    chosen = choose(asked, shipped=models.choices[model].shipped, captions=[caption])

    def work(line: Line) -> None:
        with models.picture(model, line) as held:
            chosen.reward.load(held.device)
            job = Job((caption,), int(seed), int(steps), 1, held.arguments(float(guidance) or None, None))
            with line.watching(held.pipe.scheduler):
                line.expect(job.steps if steering else 0, method)
                first = _drawn(method, _wrapped(held.pipe, chosen, steering), held, job)
                line.show((first,))
                if versus:
                    line.expect(0, f"best of N in {first.seconds:.1f} s")
                    best, samples = _best_of_n(first.seconds, held, chosen, job)
                    line.show((first, best))
                    line.expect(samples * job.steps // POOL, f"zero-order search, {samples} samples")
                    line.show((first, best, _zero_order(samples, held, chosen, job)))

    return work


def _wrapped(pipe: Any, chosen: Any, steers: bool) -> Any:
    from hasten.pipelines.searching import search
    from hasten.pipelines.steering import steer

    try:
        if steers:
            return steer(pipe, chosen.reward.verifier, chosen.method, budget=chosen.budget, keep_pictures=True, **chosen.extra)
        return search(pipe, chosen.reward.verifier, chosen.method, budget=chosen.budget, micro_batch=MOST_PARTICLES, **chosen.extra)
    except ValueError as why:
        raise BadInput(str(why)) from why


def _best_of_n(seconds: float, held: Any, chosen: Any, job: Any) -> tuple[Steered, int]:
    """The best of as many plain samples as the time affords, a pool at a time, and how many they were."""
    from hasten.accelerators.search.random_search import RandomSearch
    from hasten.pipelines.searching import search

    pool = search(held.pipe, chosen.reward.verifier, RandomSearch(1, POOL), micro_batch=POOL)
    drawn: list[Steered] = []
    while not drawn or sum(each.seconds for each in drawn) + drawn[-1].seconds <= TOLERANCE * seconds:
        drawn.append(_drawn("", pool, held, replace(job, seed=job.seed + len(drawn))))
    best = max(drawn, key=lambda each: each.reward if math.isfinite(each.reward) else -math.inf)
    samples, seconds = POOL * len(drawn), sum(each.seconds for each in drawn)
    steps, decoded, scored = (sum(each.spent[unit] for each in drawn) for unit in range(3))
    whole = replace(best, name=f"best of {samples}", seconds=seconds, spent=(steps, decoded, scored), report=None)
    return whole, samples


def _zero_order(samples: int, held: Any, chosen: Any, job: Any) -> Steered:
    """Noise search with as many samples."""
    from hasten.accelerators.search.zero_order import ZeroOrder
    from hasten.accelerators.steering.budget import Budget
    from hasten.pipelines.searching import search

    budget = Budget(particle_steps=samples * job.steps)
    method = ZeroOrder(rounds=ROUNDS, neighbours=POOL - 1)
    searched = search(held.pipe, chosen.reward.verifier, method, budget=budget, micro_batch=POOL)
    return replace(_drawn("zero-order", searched, held, job), report=None)


def _drawn(name: str, wrapped: Any, held: Any, job: Any) -> Steered:
    from hasten.app.drawing import pictures_of
    from hasten.app.measure import judge

    began = time.perf_counter()
    output = wrapped(**job.call([0]))
    seconds = time.perf_counter() - began
    report, image = wrapped.report, pictures_of(held.pipe, output)[0]
    (right,) = judge([image], job.captions, held.choice.shipped)
    spent = report.meter.spent
    return Steered(name, image, report.rewards[0], seconds, (spent.particle_steps, spent.decodes, spent.verifier_rows), right, report)


# ------------------------------------------------------------------------------------------------------------------ showing


def number(value: float) -> str:
    """A reward, or that there is none."""
    return f"{value:.3f}" if math.isfinite(value) else "none"


def side_by_side(found: Sequence[Steered]) -> str:
    """The picture of every method, and a table of what it cost."""
    shown = [Shown(each.image, each.name, f"reward {number(each.reward)}, {each.seconds:.2f} s", each.right) for each in found]
    head = ("method", "reward", "seconds", "particle steps", "decoded", "scored")
    rows = [(each.name, number(each.reward), f"{each.seconds:.2f}", *map(str, each.spent)) for each in found]
    notes = found[0].report.warnings if found[0].report is not None else []
    return (
        markup.pictures(shown)
        + markup.table([head, *rows])
        + "".join(markup.note(f"{found[0].name}: {text}") for text in dict.fromkeys(notes))
    )


def filmstrip(found: Steered) -> str:
    """What the particles looked like: a column for each step, a row for each particle; framed is what led to the returned picture."""
    from PIL import Image

    report = found.report
    if report is None or not report.pictures:
        return markup.note(f"{found.name} starts whole pictures anew, and keeps no estimates on the way.")
    nodes = report.lineage.nodes
    stages = sorted({nodes[i].stage for i in report.pictures})
    kept, small = report.survivors[0], ""
    cells = [f'<b style="grid-row:1;grid-column:{column}">step {stage}</b>' for column, stage in enumerate(stages, 1)]
    for i, pixels in sorted(report.pictures.items()):
        image = Image.fromarray(pixels)
        small = " hasten-small" if max(image.size) <= markup.SMALL else ""
        image.thumbnail((192, 192))
        place = f"grid-row:{nodes[i].slot + 2};grid-column:{stages.index(nodes[i].stage) + 1}"
        alt = escape(f"particle {nodes[i].slot + 1} at step {nodes[i].stage}")
        cells.append(
            f'<figure class="{"kept" if i in kept else ""}" style="{place}"><img src="{markup.data_uri(image)}" alt="{alt}">'
            f"<figcaption>{number(nodes[i].reward)}</figcaption></figure>"
        )
    width = f"grid-template-columns:repeat({len(stages)},minmax(44px,110px))"
    return f'<div class="hasten-strip{small}" style="{width}">{"".join(cells)}</div>' + markup.note(
        "Estimates of the finished picture, with their rewards. Framed: the line that led to what was returned."
    )


def curves(found: Steered) -> str:
    """The family tree and the rewards."""

    report = found.report
    assert report is not None

    def lineage(axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        report.plot_lineage(axes, title=f"{found.name}: who came from whom")
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))

    tree = markup.plot(lineage)
    return markup.plots([tree, markup.plot(lambda axes: report.plot_rewards(axes, title=f"{found.name}: rewards"))])


# ------------------------------------------------------------------------------------------------------------------- layout


def build(models: Models) -> Tab:
    """The tab's components and what they do."""
    rewards = rewards_of(models)
    with gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            fields: dict[str, Any] = {"caption": gradio.Textbox(SAMPLE, label="Caption", lines=2, elem_id="steer-caption")}
            fields["model"] = model_field(models)
            fields |= {
                "method": gradio.Dropdown([*STEERING, *SEARCHING], value="fk", label="Method"),
                "particles": gradio.Slider(1, MOST_PARTICLES, 4, step=1, label="Particles", info="or rounds of a search"),
                "reward": gradio.Dropdown(rewards, value=rewards[0] if "shapes" in rewards else "brightness", label="Reward"),
                "steps": gradio.Slider(1, MOST_STEPS, 20, step=1, label="Steps"),
                "guidance": guidance_field(),
                "seed": gradio.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31),
                "versus": gradio.Checkbox(True, label="Side by side: best of N and zero-order search in the same time"),
            }
            run, stop = buttons(NAME, "Steer")
        with gradio.Column(scale=2, min_width=300):
            status = status_line()
            sides = gradio.HTML(markup.hint("The chosen picture, its particles and their family tree appear here."), elem_id="steer-sides")
            strip = gradio.HTML("", elem_id="steer-strip")
            plots = gradio.HTML("", elem_id="steer-plots")
    tab = Tab(NAME, fields)

    def render(value: Sequence[Steered]) -> dict[Any, Any]:
        first = {strip: filmstrip(value[0]), plots: curves(value[0])} if len(value) == 1 else {}
        return {sides: side_by_side(value), **first}

    work = Run(tab, "steer", "pictures", lambda **given: steered(models, **given), render, [sides, strip, plots], {})
    start(work, run, stop, status)
    return tab
