"""Runs: what they tell, how they are stopped, and that nothing of them stays."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from hasten.app.demo.runs import Line, Models, News, Stopped, follow
from hasten.app.errors import BadInput

PATIENCE = 10.0


def until(condition: Callable[[], Any]) -> None:
    """Waits for what another thread does."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def denoised(scheduler: Any, steps: int, after: Callable[[int], None] = lambda step: None) -> None:
    """A loop as pipelines have it."""
    scheduler.set_timesteps(steps)
    sample = torch.zeros(1, 4)
    for step, timestep in enumerate(scheduler.timesteps):
        sample = scheduler.step(torch.zeros(1, 4), timestep, sample).prev_sample
        after(step)


def test_values_come_in_their_order_and_none_is_lost() -> None:
    def work(line: Line) -> None:
        line.expect(4, "counting")
        for value in range(200):
            line.show(value)

    news = list(follow(work))
    assert [value for each in news for value in each.values] == list(range(200))
    assert news[-1].label == "counting"


def test_steps_are_counted_on_the_watched_scheduler_alone() -> None:
    watched, other = DDIMScheduler(), DDIMScheduler()

    def work(line: Line) -> None:
        line.expect(8, "drawing")
        with line.watching(watched):
            denoised(watched, 6)
            denoised(other, 5)
        denoised(watched, 7)  # no longer watched

    assert list(follow(work))[-1].done == 6 / 8


def test_a_closed_generator_stops_the_run_after_the_present_step() -> None:
    scheduler, seen, go = DDIMScheduler(), [], threading.Event()
    ended = threading.Event()

    def after(step: int) -> None:
        seen.append(step)
        if step == 2:
            go.wait(PATIENCE)

    def work(line: Line) -> None:
        try:
            with line.watching(scheduler):
                line.show("begun")
                denoised(scheduler, 50, after)
        finally:
            ended.set()

    news = follow(work)
    assert next(news).values == ["begun"]
    until(lambda: seen == [0, 1, 2])
    news.close()  # what Gradio does with the generator of a run that was cancelled
    go.set()
    until(ended.is_set)
    assert seen == [0, 1, 2]
    assert type(scheduler) is DDIMScheduler  # the hook is off


def test_what_a_run_raises_reaches_the_page() -> None:
    def work(line: Line) -> None:
        line.show(1)
        raise BadInput("the reason")

    news = follow(work)
    assert next(news).values == [1]
    with pytest.raises(BadInput, match="the reason"):
        list(news)


class Large:
    """Stands for latents."""


def test_a_stopped_run_leaves_nothing_in_memory() -> None:
    alive: list[weakref.ref[Large]] = []
    scheduler = DDIMScheduler()

    def work(line: Line) -> None:
        latents = Large()
        alive.append(weakref.ref(latents))
        with line.watching(scheduler):
            line.show("begun")
            denoised(scheduler, 1000, lambda step: time.sleep(0.01))

    news = follow(work)
    next(news)
    assert alive[0]() is not None
    news.close()
    until(lambda: not any(thread.name == "hasten-demo-run" for thread in threading.enumerate()))
    del news
    gc.collect()
    assert alive[0]() is None


def test_a_failed_run_leaves_nothing_in_memory() -> None:
    alive: list[weakref.ref[Large]] = []

    def work(line: Line) -> None:
        latents = Large()
        alive.append(weakref.ref(latents))
        raise BadInput("no")

    def handled() -> str:
        try:
            list(follow(work))
        except BadInput as error:
            return str(error)
        return ""

    assert handled() == "no"
    gc.collect()
    assert alive[0]() is None


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def guarded(tiny_pipeline_folder: Any) -> Iterator[tuple[Models, str]]:
    name = str(tiny_pipeline_folder)
    yield Models([name]), name


def test_one_run_at_a_time_has_a_model_and_the_next_is_told_why_it_waits(guarded: tuple[Models, str]) -> None:
    models, name = guarded
    inside, leave = threading.Event(), threading.Event()

    def first(line: Line) -> None:
        with models.picture(name, line):
            inside.set()
            leave.wait(PATIENCE)

    def second(line: Line) -> None:
        with models.picture(name, line) as model:
            line.show(model)

    one = follow(first)
    threading.Thread(target=lambda: list(one), daemon=True).start()
    assert inside.wait(PATIENCE)
    news: list[News] = []
    thread = threading.Thread(target=lambda: news.extend(follow(second)), daemon=True)
    thread.start()
    until(lambda: any("waiting" in each.label for each in news))
    assert not any(each.values for each in news)
    leave.set()
    thread.join(PATIENCE)
    assert [value.choice.name for each in news for value in each.values] == [name]


def test_a_visitor_who_waits_can_leave_and_the_model_is_free_afterwards(guarded: tuple[Models, str]) -> None:
    models, name = guarded
    line, waiting, gone = Line(), Line(), threading.Event()
    with models.picture(name, line):

        def work() -> None:
            with pytest.raises(Stopped), models.picture(name, waiting):
                pass
            gone.set()

        threading.Thread(target=work, daemon=True).start()
        waiting.stop()
        assert gone.wait(PATIENCE)
    with models.picture(name, line):
        pass


def test_a_model_is_free_after_a_run_that_failed(guarded: tuple[Models, str]) -> None:
    models, name = guarded
    line = Line()
    with pytest.raises(ZeroDivisionError), models.picture(name, line):
        raise ZeroDivisionError
    with models.picture(name, line) as first:
        pass
    with models.picture(name, line) as second:
        assert first is second  # loaded once


def test_only_models_of_the_page_are_opened(guarded: tuple[Models, str]) -> None:
    models, _ = guarded
    with pytest.raises(BadInput, match="model must be one of"), models.picture("/etc/passwd", Line()):
        pass
    with pytest.raises(BadInput, match="--model must be"):
        Models(["no-such-model"])
