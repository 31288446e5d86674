"""One hook on a scheduler instance, for the length of one pipeline call.

The instance's class becomes a subclass of itself that overrides `step` and `set_timesteps`; the signature stays (pipelines
inspect it), the name stays (it is written into configs), and the class is put back in `finally`. A copy that a pipeline makes
of its scheduler carries the subclass but is not the hooked object, so it reports nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class SchedulerListener(Protocol):
    """Hears of a scheduler's progress."""

    def timesteps_set(self, scheduler: Any) -> None:
        """`set_timesteps` has returned."""

    def stepped(self, scheduler: Any, sample: Any) -> None:
        """`step` has returned; `sample` is the latents it was given."""


@contextmanager
def hooked(scheduler: Any, listener: SchedulerListener) -> Iterator[None]:
    """Reports the completed `set_timesteps` and `step` calls of this very instance to `listener`."""
    base = type(scheduler)

    @functools.wraps(base.step)
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.step(self, *args, **kwargs)
        if self is scheduler:
            listener.stepped(self, kwargs["sample"] if "sample" in kwargs else args[2] if len(args) > 2 else None)
        return out

    @functools.wraps(base.set_timesteps)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = base.set_timesteps(self, *args, **kwargs)
        if self is scheduler:
            listener.timesteps_set(self)
        return out

    members = {"step": step, "set_timesteps": set_timesteps, "__module__": base.__module__, "__qualname__": base.__qualname__}
    scheduler.__class__ = type(base.__name__, (base,), members)
    try:
        yield
    finally:
        scheduler.__class__ = base
