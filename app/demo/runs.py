"""Work on the models: one run of each at a time, told to the page while it lasts, and stopped at its next denoising step.

A run belongs to one call of one visitor. It has a thread of its own; what it finds goes through a `Line` to the generator that the page
reads, and nothing of it is kept here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hasten.app.errors import BadInput
from hasten.app.models import Choice, Model, choose_model, open_model

if TYPE_CHECKING:
    from torch import Tensor

BEAT = 0.1
"""Seconds between two looks of the page at a run, at least."""


class Stopped(Exception):
    """The visitor has stopped the run, or left."""


@dataclass(frozen=True)
class News:
    """What a run has to tell.

    Attributes:
        label: What it is doing.
        done: How far it is, from 0 to 1; None where nobody knows.
        values: What it has found since the last news, oldest first.
    """

    label: str
    done: float | None
    values: list[Any] = field(default_factory=list)


class Line:
    """Between a run and the page that waits for it; hears a scheduler's steps, see `SchedulerListener`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._values: list[Any] = []
        self._label, self._steps, self._expected = "starting", 0, 0
        self._fresh = self._finished = False
        self._error: BaseException | None = None

    # ------------------------------------------------------------------------------------------------- the run's end

    def expect(self, steps: int, label: str) -> None:
        """From now on `steps` steps are to come; 0 where their number is not known."""
        with self._changed:
            self._steps, self._expected = 0, steps
        self.say(label)

    def say(self, label: str) -> None:
        """What is being done now.

        Raises:
            Stopped: Nobody waits for it any more.
        """
        self.check()
        with self._changed:
            self._label, self._fresh = label, True
            self._changed.notify()

    def show(self, value: Any) -> None:
        """Something was found."""
        with self._changed:
            self._values.append(value)
            self._changed.notify()

    def check(self) -> None:
        """Raises Stopped where nobody waits any more."""
        if self._stop.is_set():
            raise Stopped

    def sleep(self, seconds: float) -> None:
        """Waits; errors as `check`."""
        if seconds > 0:
            self._stop.wait(seconds)
        self.check()

    @contextmanager
    def watching(self, scheduler: Any) -> Iterator[None]:
        """Counts the steps of this scheduler, and stops after one of them."""
        from hasten.accelerators.scheduler_hook import hooked

        with hooked(scheduler, self):
            yield

    def timesteps_set(self, scheduler: Any) -> None:
        """A call begins; errors as `check`."""
        self.check()

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """Nothing to tell."""

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        """Nothing to tell."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """One step further; errors as `check`."""
        with self._changed:
            self._steps += 1
            self._fresh = True
            self._changed.notify()
        self.check()

    # ------------------------------------------------------------------------------------------------ the page's end

    def carry(self, work: Callable[[Line], None]) -> None:
        """Does the work; what it raises is kept for the page."""
        try:
            work(self)
        except Stopped:
            pass  # as it was asked to
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify()

    def stop(self) -> None:
        """Asks the run to end at its next step."""
        self._stop.set()

    def news(self) -> Iterator[News]:
        """News as they come, until the work is done; raises what it raised."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._fresh or self._values or self._finished, timeout=1.0)
                values, self._values = self._values, []
                fresh, self._fresh = self._fresh, False
                done = min(1.0, self._steps / self._expected) if self._expected else None
                label, finished = self._label, self._finished
            if values or fresh:
                yield News(label, done, values)
            if finished:
                break
            time.sleep(BEAT)
        error, self._error = self._error, None
        if error is not None:
            raise error


def follow(work: Callable[[Line], None]) -> Iterator[News]:
    """Does the work in a thread of its own and yields its news. Closing the generator stops the work.

    Raises:
        Exception: What the work raised.
    """
    line = Line()
    threading.Thread(target=line.carry, args=(work,), name="hasten-demo-run", daemon=True).start()
    try:
        yield from line.news()
    finally:
        line.stop()


class Models:
    """The models of a page: each is loaded when it is first asked for, and used by one run at a time.

    Args:
        names: Of pipelines that make pictures, as `--model` takes them; the first is the page's default.
        dtype, device: As `open_model` takes them.

    Raises:
        BadInput: There is no such model.
    """

    def __init__(self, names: Sequence[str], dtype: str = "auto", device: str = "auto") -> None:
        self.choices: dict[str, Choice] = {name: choose_model(name) for name in names}
        self._dtype, self._device = dtype, device
        self._loaded: dict[str, Any] = {}
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    @property
    def names(self) -> list[str]:
        """Of all pipelines that make pictures."""
        return list(self.choices)

    @property
    def default(self) -> str:
        """The first one's name."""
        return self.names[0]

    @contextmanager
    def picture(self, name: str, line: Line) -> Iterator[Model]:
        """A pipeline, while nobody else has it.

        Raises:
            BadInput: It is none of this page's, or cannot be loaded.
        """
        choice = self.choices.get(name)
        if choice is None:
            raise BadInput(f"model must be one of {', '.join(self.choices)}, not {name!r}")
        with self._held(name, line, lambda: open_model(choice, dtype=self._dtype, device=self._device)) as model:
            yield model

    @contextmanager
    def text(self, line: Line) -> Iterator[tuple[Any, Any]]:
        """The puzzles model and its tokenizer, while nobody else has them."""
        from hasten.pipelines.zoo.puzzles import load_puzzles

        with self._held("puzzles", line, load_puzzles) as found:
            yield found

    @contextmanager
    def shapes(self, line: Line) -> Iterator[Model]:
        """The shapes model, which the step LoRA that ships is for, whatever models the page has."""
        choice = choose_model("shapes")
        with self._held("shapes", line, lambda: open_model(choice, dtype=self._dtype, device=self._device)) as model:
            yield model

    @contextmanager
    def _held(self, name: str, line: Line, load: Callable[[], Any]) -> Iterator[Any]:
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        if not lock.acquire(blocking=False):
            line.say(f"waiting for {name}, which is being loaded or drawing for somebody else")
            while not lock.acquire(timeout=BEAT):
                line.check()
        try:
            if name not in self._loaded:
                line.say(f"loading {name}")
                self._loaded[name] = load()
            line.check()
            yield self._loaded[name]
        finally:
            lock.release()

    def warm_up(self) -> None:
        """Loads the default model and draws a picture in two steps, so that the first visitor need not wait for what is done once."""
        line = Line()
        with self.picture(self.default, line) as model:
            from hasten.app.drawing import Job

            job = Job(("a small red circle",), 0, 2, 1, model.arguments(None, None))
            model.pipe(**job.call([0]))
