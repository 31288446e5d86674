"""Hears the names of the `cache_context`s that a pipeline enters on its denoiser: they name the guidance branches."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from torch import nn


class Named(Protocol):
    """Is told which context its denoiser is in."""

    context: str | None


_SESSIONS: ContextVar[Mapping[int, Named] | None] = ContextVar("hasten_sessions", default=None)
_NAMING = threading.Lock()


class _Contexts:
    """Stands for a denoiser's `cache_context` while any session listens for its names."""

    def __init__(self, denoiser: nn.Module) -> None:
        self.key = id(denoiser)
        self.hidden = denoiser.__dict__.get("cache_context")
        self.original: Callable[..., AbstractContextManager[Any]] = denoiser.cache_context  # type: ignore[assignment]
        self.users = 0

    @contextmanager
    def __call__(self, name: str, **fields: Any) -> Iterator[None]:
        session = (_SESSIONS.get() or {}).get(self.key)
        with self.original(name, **fields):
            if session is None:
                yield
                return
            before, session.context = session.context, name
            try:
                yield
            finally:
                session.context = before


@contextmanager
def named_contexts(denoiser: nn.Module, session: Named) -> Iterator[None]:
    """Hears the names of the `cache_context`s that the pipeline enters on the denoiser, in this context only."""
    if not hasattr(denoiser, "cache_context"):
        yield
        return
    token = _SESSIONS.set({**(_SESSIONS.get() or {}), id(denoiser): session})
    with _NAMING:
        names = denoiser.__dict__.get("cache_context")
        if not isinstance(names, _Contexts):
            names = denoiser.__dict__["cache_context"] = _Contexts(denoiser)
        names.users += 1
    try:
        yield
    finally:
        _SESSIONS.reset(token)
        with _NAMING:
            names.users -= 1
            if names.users == 0:
                if names.hidden is None:
                    del denoiser.__dict__["cache_context"]
                else:
                    denoiser.__dict__["cache_context"] = names.hidden
