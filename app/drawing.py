"""Draws pictures from captions in batches, each picture from a seed of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from hasten.accelerators.scheduler_hook import hooked
from hasten.app.errors import BadInput

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from hasten.accelerators.caching.report import RunReport
    from hasten.pipelines.accelerated import AcceleratedPipeline


@dataclass(frozen=True)
class Job:
    """What is to be drawn. Picture i starts from the noise of `seed + i`, whatever batch it is in.

    Attributes:
        captions: One for each picture.
        seed: Of the first picture.
        steps: Denoising steps.
        batch: Pictures at a time.
        arguments: Further arguments of the pipeline's call.
    """

    captions: tuple[str, ...]
    seed: int
    steps: int
    batch: int
    arguments: dict[str, Any]

    def __len__(self) -> int:
        return len(self.captions)

    @property
    def batches(self) -> list[range]:
        """Which pictures are drawn together."""
        return [range(start, min(start + self.batch, len(self))) for start in range(0, len(self), self.batch)]

    def call(self, pictures: Sequence[int], steps: int | None = None) -> dict[str, Any]:
        """Arguments of the pipeline's call that draws these pictures."""
        import torch

        # On the CPU, whatever the device, so that a seed means the same picture everywhere.
        generators = [torch.Generator("cpu").manual_seed(self.seed + i) for i in pictures]
        prompts = [self.captions[i] for i in pictures]
        return {"prompt": prompts, "generator": generators, "num_inference_steps": steps or self.steps, **self.arguments}


class StepBar:
    """A progress bar on stderr, moved by the steps of a pipeline's scheduler; nothing is shown where stderr is no terminal."""

    def __init__(self, calls: int, label: str) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:3.0f}%"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        # Few refreshes: the bar must not take time from what is timed.
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2, transient=True)
        self._task = self._progress.add_task(label, total=calls)
        self._calls = 0
        self._steps = 1

    def __enter__(self) -> StepBar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def expect(self, calls: int) -> None:
        """Changes how many calls there will be in all."""
        self._progress.update(self._task, total=calls)

    @contextmanager
    def call(self, scheduler: Any, label: str) -> Iterator[None]:
        """Follows one call of the pipeline."""
        self._progress.update(self._task, description=label)
        with hooked(scheduler, self):
            yield
        self._calls += 1
        self._progress.update(self._task, completed=self._calls)

    def timesteps_set(self, scheduler: Any) -> None:
        """The scheduler says how many steps there are."""
        self._steps = max(1, len(scheduler.timesteps))

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """Nothing to show."""

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        """Nothing to show."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """One step further."""
        self._progress.advance(self._task, 1 / self._steps)


def pictures_of(pipe: Any, output: Any) -> list[Image]:
    """The pictures in what a pipeline returned.

    Raises:
        BadInput: There are none (it makes videos, sound or the like).
    """
    from PIL.Image import Image

    images = getattr(output, "images", None)
    if not isinstance(images, list) or not all(isinstance(image, Image) for image in images):
        raise BadInput(
            f"--model must be a pipeline that makes pictures, but {type(pipe).__name__} returns {', '.join(vars(output)) or 'none'}"
        )
    return [image.convert("RGB") for image in images]


@dataclass(frozen=True)
class Drawn:
    """One batch: the pictures and what the run did (None where the plain pipeline drew them)."""

    pictures: range
    images: list[Image]
    report: RunReport | None


def draw(pipe: Any, fast: AcceleratedPipeline | None, job: Job) -> Iterator[Drawn]:
    """Draws the job batch by batch, with `fast` where it is given."""
    call: Callable[..., Any] = pipe if fast is None else fast
    with StepBar(len(job.batches), "drawing") as bar:
        for pictures in job.batches:
            with bar.call(pipe.scheduler, f"picture {pictures.start + 1} of {len(job)}"):
                output = call(**job.call(pictures))
            yield Drawn(pictures, pictures_of(pipe, output), fast.report if fast is not None else None)


def check_number(option: str, value: float | None, least: float, *, whole: bool = False) -> None:
    """Raises BadInput unless `value` is None, or a finite number of at least `least`."""
    if value is not None and not (math.isfinite(value) and value >= least):
        raise BadInput(f"{option} must be {'a whole number' if whole else 'a number'} of at least {least:g}, not {value:g}")
