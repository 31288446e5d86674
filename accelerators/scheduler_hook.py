"""One hook on a scheduler instance, for the length of one pipeline call.

The instance's class becomes a subclass of itself that overrides `step`, `set_timesteps` and `scale_model_input`; signatures stay
(pipelines inspect them), the name stays (it is written into configs), and the class is put back when the last listener leaves. A copy
that a pipeline makes of its scheduler carries the subclass but is not the hooked object, so it reports nothing.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

_SWAPPING = threading.Lock()


class SchedulerListener(Protocol):
    """Hears of a scheduler's progress."""

    def timesteps_set(self, scheduler: Any) -> None:
        """`set_timesteps` has returned."""

    def scaled(self, scheduler: Any, timestep: Any) -> None:
        """`scale_model_input` has returned: the denoiser is about to be called at `timestep`. Not every scheduler has it."""

    def stepped(self, scheduler: Any, model_output: Any, sample: Any) -> None:
        """`step` has returned; `model_output` and `sample`, the latents, are what it was given."""


class _Hook:
    """What a hooked scheduler's class knows: whose it is, what it was, and who listens."""

    def __init__(self, scheduler: Any, base: type) -> None:
        self.scheduler = scheduler
        self.base = base
        self.listeners: list[SchedulerListener] = []

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
            out = original(scheduler, *args, **kwargs)
            if scheduler is self.scheduler:
                for listener in tuple(self.listeners):
                    tell(listener, (args, kwargs))
            return out

        return method


def _argument(call: tuple[tuple[Any, ...], dict[str, Any]], index: int, name: str) -> Any:
    args, kwargs = call
    return args[index] if index < len(args) else kwargs.get(name)


@contextmanager
def hooked(scheduler: Any, listener: SchedulerListener) -> Iterator[None]:
    """Reports the completed calls of this very instance to `listener`.

    Any number of listeners share one subclass, so they may come and go in any order.
    """
    with _SWAPPING:
        hook = type(scheduler).__dict__.get("_hasten_hook")
        if hook is None or hook.scheduler is not scheduler:  # the latter: a copy made while its original was hooked
            hook = _Hook(scheduler, type(scheduler) if hook is None else hook.base)
            scheduler.__class__ = hook.subclass()
        hook.listeners.append(listener)
    try:
        yield
    finally:
        with _SWAPPING:
            hook.listeners = [other for other in hook.listeners if other is not listener]
            if not hook.listeners:
                scheduler.__class__ = hook.base
