"""`hasten generate --steer` and `--search`: pictures that a reward has chosen, and what choosing them cost."""

from __future__ import annotations

import io
import json
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from hasten.app import files
from hasten.app.drawing import StepBar, pictures_of
from hasten.app.errors import BadInput
from hasten.app.generate import file_name, save_executed
from hasten.app.output import Outcome, table
from hasten.app.setup import BATCH, Options, Ready, check, prepare
from hasten.app.steering import NOT_PLAIN, Chosen, Steering, choose

if TYPE_CHECKING:
    from PIL.Image import Image

    from hasten.accelerators.steering.report import SearchReport
    from hasten.pipelines.searching import SearchedPipeline
    from hasten.pipelines.steering import SteeredPipeline

RIVAL_POOL, RIVAL_ROUNDS = 8, 4096
"""Of the best-of-N that has the same time: samples at a time, and more rounds than any time allows."""


@dataclass
class Run:
    """One caption, drawn.

    Attributes:
        images: Best first.
        rewards: Of the images; NaN where a reward was none.
        seconds: Of the whole call.
        report: As plain data, taken when the call ended.
        warnings: What was not done as asked.
        plots: PNGs by name.
    """

    images: list[Image]
    rewards: list[float]
    seconds: float
    report: dict[str, Any]
    warnings: list[str]
    plots: dict[str, bytes]

    def spent(self, unit: str) -> int:
        """Of the units of `Cost`."""
        return int(self.report["cost"]["spent"][unit])

    def to_json(self) -> dict[str, Any]:
        """Plain data; a reward that is none is None."""
        return {"reward": _finite(self.rewards[0]), "seconds": self.seconds, "report": self.report, "warnings": self.warnings}


@dataclass(frozen=True)
class Runner:
    """Draws captions one by one: each has all its particles in a call of its own, so that its picture does not depend on other captions.

    Args:
        steering: The options.
        chosen: What they mean.
        ready: The model and the job.
    """

    steering: Steering
    chosen: Chosen
    ready: Ready

    @property
    def pipe(self) -> Any:
        """The pipeline, accelerated where it was asked for."""
        return self.ready.fast if self.ready.fast is not None else self.ready.model.pipe

    @property
    def micro_batch(self) -> int | None:
        """Particles at a time. Cached blocks belong to all particles, so an accelerated pipeline is steered whole unless told otherwise."""
        asked = self.steering.micro_batch
        if asked is not None or (self.steering.steer is not None and self.ready.fast is not None):
            return asked
        return BATCH if self.ready.checked.choice.shipped else 1

    def wrapped(self) -> SteeredPipeline | SearchedPipeline:
        """The pipeline that steers or searches.

        Raises:
            BadInput: The method does not go with the pipeline.
        """
        from hasten.pipelines.searching import search
        from hasten.pipelines.steering import steer

        make = steer if self.steering.steer is not None else search
        extra = dict(self.chosen.extra)
        if self.steering.steer is not None and self.steering.plots is not None:
            extra["keep_pictures"] = True
        try:
            return make(
                self.pipe, self.chosen.reward.verifier, self.chosen.method, budget=self.chosen.budget, micro_batch=self.micro_batch, **extra
            )
        except ValueError as why:
            raise BadInput(str(why)) from why

    def rival(self, seconds: float | None) -> SearchedPipeline:
        """Best-of-N of the same pipeline and reward, with N as the time allows, or one sample where no time is told.

        Raises:
            BadInput: The pipeline's noise cannot be given.
        """
        from hasten.accelerators.search.random_search import RandomSearch
        from hasten.accelerators.steering.budget import Budget
        from hasten.pipelines.searching import search

        method = RandomSearch(1, 1) if seconds is None else RandomSearch(RIVAL_ROUNDS, RIVAL_POOL, growth=1)
        try:
            return search(self.pipe, self.chosen.reward.verifier, method, budget=Budget(seconds=seconds), micro_batch=self.micro_batch)
        except ValueError as why:
            raise BadInput(f"--versus: {why}") from why

    def warm_up(self) -> None:
        """Draws one sample in few steps, so that no method's time holds what only the first call takes."""
        steps = self.ready.job.steps
        # A plan fits one number of steps alone.
        call = self.ready.job.call([0], steps=steps if self.ready.checked.options.plan is not None else min(2, steps))
        with self._watched("warming up", bar=False), _caught():
            self.rival(None)(**call)

    def draw(self, wrapped: SteeredPipeline | SearchedPipeline, number: int, label: str, *, plots: bool = False) -> Run:
        """Draws caption `number`."""
        call = self.ready.job.call([number])
        # A search calls the pipeline many times, so there is no telling how far it is.
        with self._watched(label, bar=not hasattr(wrapped, "found")), _caught() as said:
            began = time.perf_counter()
            output = wrapped(**call)
            seconds = time.perf_counter() - began
        report = wrapped.report
        assert report is not None
        data = report.to_json()
        images = pictures_of(self.ready.model.pipe, output)
        rewards = [report.lineage.nodes[node].reward for node in report.selected[0]]
        if "draft_steps" in self.chosen.extra and wrapped.method is self.chosen.method:
            rewards = self._judged(images, self.ready.job.captions[number])  # the report's are those of the drafts
        noted = list(dict.fromkeys([*report.warnings, *said]))
        return Run(images, rewards, seconds, data, noted, _plots(report) if plots else {})

    def _judged(self, images: Sequence[Image], caption: str) -> list[float]:
        import numpy as np
        import torch

        from hasten.accelerators.steering.verifiers import checked_score

        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in images]).permute(0, 3, 1, 2)
        with torch.no_grad():
            scores = checked_score(self.chosen.reward.verifier, pixels.to(self.ready.model.device).float() / 255, [caption] * len(images))
        return [float(score) for score in scores]

    @contextmanager
    def _watched(self, label: str, *, bar: bool) -> Iterator[None]:
        """Says on a terminal what is going on."""
        if bar:
            with StepBar(1, label) as steps, steps.call(self.ready.model.pipe.scheduler, label):
                yield
        else:
            with Console(stderr=True).status(label):
                yield

    def settings(self) -> dict[str, Any]:
        """Everything that a picture depends on beside what `Ready.settings` says, as plain data."""
        from hasten.accelerators.steering.budget import Budget

        method, chosen = self.chosen.method, self.chosen
        limits = {entry.name: getattr(chosen.budget, entry.name) for entry in fields(Budget)}
        return {
            "steer": self.steering.steer,
            "search": self.steering.search,
            "settings": {entry.name: getattr(method, entry.name) for entry in fields(method) if entry.name not in NOT_PLAIN},
            "kernel": self.steering.kernel,
            **chosen.extra,
            "reward": chosen.reward.text,
            "rank": self.steering.rank,
            "budget": {name: limit for name, limit in limits.items() if limit is not None},
            "micro_batch": self.micro_batch,
        }


@contextmanager
def _caught() -> Iterator[list[str]]:
    """Collects the texts of the library's warnings, which are shown with the results; others go where they always go."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield said
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            said.append(" ".join(str(warning.message).split()))
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


def _plots(report: SearchReport) -> dict[str, bytes]:
    """The family tree, the reward curves, and what the candidates looked like where that was kept."""
    axes_of = {"lineage": report.plot_lineage(), "rewards": report.plot_rewards()}
    figures: dict[str, Any] = {name: axes.get_figure(root=True) for name, axes in axes_of.items()}
    if report.pictures:
        figures["gallery"] = report.plot_gallery()
    drawn = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=120)
        drawn[name] = buffer.getvalue()
    return drawn


# --------------------------------------------------------------------------------------------------------------------- command


def generate_steered(options: Options, steering: Steering, captions: Sequence[str], out: Path, save_plan: Path | None = None) -> Outcome:
    """Draws the captions into `out`, steered or searched for; with `versus`, best-of-N in the same time beside each.

    Raises:
        BadInput: Something that was asked for is not allowed; nothing was written.
        BudgetError: The budget does not suffice for one sample.
        SteeringError: The method does not fit the pipeline or the number of steps.
        VerifierError: The reward is not one number for each picture.
    """
    checked = check(_one_by_one(options))
    _check_targets(steering, checked.method is not None, out, save_plan)
    chosen = choose(steering, shipped=checked.choice.shipped, captions=captions)
    runner = Runner(steering, chosen, prepare(checked, captions))
    ready, wrapped = runner.ready, runner.wrapped()
    chosen.reward.load(ready.model.device)
    settings = {**ready.settings(), "steering": runner.settings()}
    if steering.versus:
        runner.warm_up()
    drawn = Drawn(steering, settings, out)
    for number, caption in enumerate(captions):
        label = f"picture {number + 1} of {len(captions)}"
        run = runner.draw(wrapped, number, label, plots=steering.plots is not None)
        if save_plan is not None and number == 0:
            assert ready.fast is not None
            save_executed(ready.fast.report, save_plan, ready.job.steps)
        rival = runner.draw(runner.rival(run.seconds), number, f"best of N for {label}") if steering.versus else None
        drawn.add(file_name(number, caption, ready.job.seed + number).removesuffix(".png"), caption, ready.job.seed + number, run, rival)
    data = drawn.to_json()
    if steering.report is not None:
        files.write(steering.report, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False).encode())
    return Outcome(data, "\n".join(drawn.lines()))


def _one_by_one(options: Options) -> Options:
    """Options of a run in which every caption is a call of its own, and nothing is cached unless that was asked for.

    Raises:
        BadInput: Several captions at a time were asked for.
    """
    if options.batch is not None:
        raise BadInput("--batch is for plain drawing: steered captions are drawn one by one; --micro-batch limits the particles at a time")
    caching = (
        options.method, options.interval, options.cached, options.boundary, options.preset, options.plan, options.threshold,
        options.skip_guidance,
    )  # fmt: skip
    return replace(options, batch=1, method="none" if all(value is None for value in caching) else options.method)


def _check_targets(steering: Steering, cached: bool, out: Path, save_plan: Path | None) -> None:
    files.check_folder("--out", out)
    if steering.plots is not None:
        files.check_folder("--plots", steering.plots)
    if steering.report is not None:
        files.check_target("--report", steering.report)
    if save_plan is not None:
        if steering.search is not None or not cached:
            raise BadInput("--save-plan needs one run with a plan: --steer with a caching option such as --method")
        files.check_target("--save-plan", save_plan)


@dataclass
class Drawn:
    """What was drawn so far; pictures are written as they come.

    Attributes:
        steering: The options.
        settings: Of all pictures.
        out: The folder.
        images: What was written.
        runs: Of the captions, and best-of-N's where it was asked for.
    """

    steering: Steering
    settings: dict[str, Any]
    out: Path
    images: list[dict[str, Any]] = field(default_factory=list)
    runs: list[tuple[Run, Run | None]] = field(default_factory=list)

    def add(self, stem: str, caption: str, seed: int, run: Run, rival: Run | None) -> None:
        """Writes the pictures of a caption, and the plots; what is large is let go."""
        several = len(run.images) > 1
        for rank, (image, reward) in enumerate(zip(run.images, run.rewards, strict=True), 1):
            self._write(f"{stem}-{rank}" if several else stem, image, caption, seed, {"reward": _finite(reward), "rank": rank})
        if rival is not None:
            how = {"reward": _finite(rival.rewards[0]), "best_of_n": rival.spent("decodes")}
            self._write(f"{stem}-best-of-n", rival.images[0], caption, seed, how)
        if self.steering.plots is not None:
            for name, data in run.plots.items():
                files.write(self.steering.plots / f"{stem}-{name}.png", data)
        run.images, run.plots = [], {}
        self.runs.append((run, rival))

    def _write(self, stem: str, image: Image, caption: str, seed: int, how: dict[str, Any]) -> None:
        path, entry = self.out / f"{stem}.png", {"caption": caption, "seed": seed, **how}
        files.write(path, files.png(image, caption, {**self.settings, **entry}))
        self.images.append({"file": str(path), **entry})

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        runs = [{**run.to_json(), "best_of_n": None if rival is None else rival.to_json()} for run, rival in self.runs]
        return {**self.settings, "seconds": sum(run.seconds for run, _ in self.runs), "images": self.images, "runs": runs}

    def lines(self) -> list[str]:
        """For people: the files with their rewards, the warnings, best-of-N beside it, and a summary."""
        runs = [run for run, _ in self.runs]
        rivals = [rival for _, rival in self.runs if rival is not None]
        lines = [f"{entry['file']}  reward {_number(entry['reward'])}" for entry in self.images]
        lines += [f"warning: {text}" for text in dict.fromkeys(text for run in runs for text in run.warnings)]
        if rivals:
            heading = ("", "reward", "seconds", "particle steps", "pictures scored")
            lines.append(table([heading, _row(self.steering.name, runs), _row("best of N in the same time", rivals)]))
        if len(rivals) > 1:
            pairs = [(run.rewards[0], rival.rewards[0]) for run, rival in zip(runs, rivals, strict=True)]
            better, worse = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
            even = len(pairs) - better - worse
            lines.append(f"of {len(pairs)} captions {self.steering.name} is better on {better}, best of N on {worse}, and {even} are even")
        costs = ", ".join(f"{_total(runs, unit)} {unit.replace('_', ' ')}" for unit in ("particle_steps", "decodes", "verifier_rows"))
        count = f"{len(runs)} caption{'s' if len(runs) > 1 else ''} of {self.settings['steps']} steps"
        reward = f"reward {self.settings['steering']['reward']} {_number(_mean_reward(runs))}"
        lines.append(f"{count} in {sum(run.seconds for run in runs):.1f} s; {runs[0].report['method']}: {reward}; {costs}")
        return lines


def _row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """Of the table: means of the rewards, sums of the rest."""
    seconds = f"{sum(run.seconds for run in runs):.2f}"
    return name, _number(_mean_reward(runs)), seconds, str(_total(runs, "particle_steps")), str(_total(runs, "decodes"))


def _total(runs: Sequence[Run], unit: str) -> int:
    return sum(run.spent(unit) for run in runs)


def _mean_reward(runs: Sequence[Run]) -> float:
    return sum(run.rewards[0] for run in runs) / len(runs)


def _finite(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _number(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else "none"
