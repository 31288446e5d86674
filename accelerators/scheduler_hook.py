"""One hook on a scheduler instance, for the length of one pipeline call.

The instance's class becomes a subclass of itself that overrides `step`, `set_timesteps` and `scale_model_input`; signatures stay
(pipelines inspect them), the name stays (it is written into configs), and the class is put back when the last listener leaves. A copy
that a pipeline makes of its scheduler carries the subclass but is not the hooked object, so it reports nothing.

Any number of listeners hear of what was done. One driver at most may take a step into its own hands: it is given the step and its
arguments, and returns what the pipeline gets.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor

_SWAPPING = threading.Lock()

Reindex = Callable[[Tensor, int], None]


class SchedulerListener(Protocol):
    """Hears of a scheduler's progress."""

    def timesteps_set(self, scheduler: Any) -> None:
        """`set_timesteps` has returned."""

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """`scale_model_input` has returned: the denoiser is about to be called at `timestep`. Not every scheduler has it."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """`step` has returned; `model_output` and `sample`, the latents, are what it was given."""

    def reindexed(self, scheduler: Any, index: Tensor, rows: int) -> None:
        """Of the `rows` rows that went through the denoiser, row i goes on from what was row index[i]; the others are gone."""


class SchedulerDriver(Protocol):
    """Takes a scheduler's steps into its own hands."""

    def timesteps_set(self, scheduler: Any) -> None:
        """`set_timesteps` has returned; heard before any listener."""

    def step(self, proceed: Callable[..., Any], arguments: inspect.BoundArguments) -> Any:
        """Instead of the scheduler's `step`.

        Args:
            proceed: The scheduler's own.
            arguments: Its arguments without the scheduler.
        """


class _Hook:
    """What a hooked scheduler's class knows: whose it is, what it was, who listens, and who drives."""

    def __init__(self, scheduler: Any, base: type) -> None:
        self.scheduler = scheduler
        self.base = base
        self.listeners: list[SchedulerListener] = []
        self.driver: SchedulerDriver | None = None

    @property
    def used(self) -> bool:
        return bool(self.listeners) or self.driver is not None

    def reindex(self, index: Tensor, rows: int) -> None:
        """Tells all listeners that rows have moved."""
        for listener in tuple(self.listeners):
            listener.reindexed(self.scheduler, index, rows)

    def subclass(self) -> type:
        members: dict[str, Any] = {"__module__": self.base.__module__, "__qualname__": self.base.__qualname__, "_hasten_hook": self}
        members["step"] = self._reporting(
            "step",
            lambda listener, call: listener.stepped(self.scheduler, _argument(call, 0, "model_output"), _argument(call, 2, "sample")),
        )
        members["set_timesteps"] = self._reporting("set_timesteps", lambda listener, call: listener.timesteps_set(self.scheduler))
        if hasattr(self.base, "scale_model_input"):
            members["scale_model_input"] = self._reporting(
                "scale_model_input", lambda listener, call: listener.scaled(self.scheduler, _argument(call, 1, "timestep"))
            )
        return type(self.base.__name__, (self.base,), members)

    def _reporting(self, name: str, tell: Callable[[SchedulerListener, tuple[tuple[Any, ...], dict[str, Any]]], None]) -> Any:
        original = getattr(self.base, name)

        @functools.wraps(original)
        def method(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
            if scheduler is not self.scheduler:
                return original(scheduler, *args, **kwargs)
            driver = self.driver
            if name == "step" and driver is not None:
                proceed = functools.partial(original, scheduler)
                arguments = inspect.signature(proceed).bind(*args, **kwargs)
                out = driver.step(proceed, arguments)
            else:
                out = original(scheduler, *args, **kwargs)
                if name == "set_timesteps" and driver is not None:
                    driver.timesteps_set(scheduler)
            for listener in tuple(self.listeners):
                tell(listener, (args, kwargs))
            return out

        return method


def _argument(call: tuple[tuple[Any, ...], dict[str, Any]], index: int, name: str) -> Any:
    args, kwargs = call
    return args[index] if index < len(args) else kwargs.get(name)


def _entered(scheduler: Any) -> _Hook:
    """The scheduler's hook, put on if it has none; under the lock."""
    hook: _Hook | None = type(scheduler).__dict__.get("_hasten_hook")
    if hook is None or hook.scheduler is not scheduler:  # the latter: a copy made while its original was hooked
        hook = _Hook(scheduler, type(scheduler) if hook is None else hook.base)
        scheduler.__class__ = hook.subclass()
    return hook


def _left(hook: _Hook) -> None:
    """Takes the hook off when nobody uses it any more; under the lock."""
    if not hook.used:
        hook.scheduler.__class__ = hook.base


@contextmanager
def hooked(scheduler: Any, listener: SchedulerListener) -> Iterator[None]:
    """Reports the completed calls of this very instance to `listener`.

    Any number of listeners share one subclass, so they may come and go in any order.
    """
    with _SWAPPING:
        hook = _entered(scheduler)
        hook.listeners.append(listener)
    try:
        yield
    finally:
        with _SWAPPING:
            hook.listeners = [other for other in hook.listeners if other is not listener]
            _left(hook)


@contextmanager
def driven(scheduler: Any, driver: SchedulerDriver) -> Iterator[Reindex]:
    """Lets `driver` carry out the steps of this very instance.

    Yields:
        What tells the listeners that rows have moved; see `SchedulerListener.reindexed`.

    Raises:
        RuntimeError: Somebody drives it already.
    """
    with _SWAPPING:
        hook = _entered(scheduler)
        if hook.driver is not None:
            raise RuntimeError(
                f"this {type(scheduler).__name__} is being steered already; one pipeline is steered or searched once at a time: wrap the "
                "plain pipeline, and give every thread a pipeline with a scheduler of its own"
            )
        hook.driver = driver
    try:
        yield hook.reindex
    finally:
        with _SWAPPING:
            hook.driver = None
            _left(hook)
