"""Intercepts the calls of single module instances, reversibly and only for the context that asked.

`nn.Module.__call__` looks for `_compiled_call_impl` on the instance before anything else, so a callable put there sits
outside compiled code, outside accelerate's and diffusers' hooks (they replace `forward`), and changes no class.
The callable asks a context variable who is listening: another thread or another pipeline on the same module passes
straight through to what the module did before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn

Call = Callable[..., Any]
Handler = Callable[[Call, tuple[Any, ...], dict[str, Any]], Any]
"""Receives what the module would have done and the arguments; returns the module's output."""

_LISTENING: ContextVar[Mapping[int, Handler] | None] = ContextVar("hasten_listening", default=None)
_INSTALLING = threading.Lock()
_SLOT = "_compiled_call_impl"


class _Dispatch:
    """What sits in a module's slot while anybody listens to it."""

    def __init__(self, module: nn.Module, previous: Call | None) -> None:
        self.module = module
        self.previous = previous
        self.users = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.previous if self.previous is not None else self.module._call_impl
        handlers = _LISTENING.get()
        handler = handlers.get(id(self.module)) if handlers is not None else None
        if handler is None:
            return call(*args, **kwargs)
        return handler(call, args, kwargs)


def _around(handler: Handler, inner: Handler | None) -> Handler:
    """A handler whose `call` is what the inner handler makes of it."""
    if inner is None:
        return handler

    def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return handler(lambda *args, **kwargs: inner(call, args, kwargs), args, kwargs)

    return handle


@contextmanager
def intercept(handlers: Mapping[nn.Module, Handler], *, around: bool = False) -> Iterator[None]:
    """Routes the calls of `handlers`' modules through their handlers, in this context, until the block is left.

    Nothing is left on the modules afterwards.

    Args:
        handlers: By module.
        around: Where a module has a handler already, it is what the new one calls; else it is hidden.
    """
    installed: list[tuple[nn.Module, _Dispatch]] = []
    before = _LISTENING.get() or {}
    routed = {id(module): _around(handler, before.get(id(module)) if around else None) for module, handler in handlers.items()}
    token = _LISTENING.set({**before, **routed})
    try:
        with _INSTALLING:
            for module in handlers:
                slot = module.__dict__.get(_SLOT)
                if not isinstance(slot, _Dispatch):
                    # The instance's own dictionary, since a compiled module forwards plain attributes to its original.
                    slot = module.__dict__[_SLOT] = _Dispatch(module, slot)
                slot.users += 1
                installed.append((module, slot))
        yield
    finally:
        _LISTENING.reset(token)
        with _INSTALLING:
            for module, dispatch in installed:
                dispatch.users -= 1
                # Whoever compiled the module meanwhile has put another callable there, which stays.
                if dispatch.users == 0 and module.__dict__.get(_SLOT) is dispatch:
                    if dispatch.previous is None:
                        del module.__dict__[_SLOT]
                    else:
                        module.__dict__[_SLOT] = dispatch.previous


def compiled_whole(module: nn.Module) -> bool:
    """Whether the module as a whole is compiled, so that the calls of its parts cannot be seen."""
    slot = module.__dict__.get(_SLOT)
    if isinstance(slot, _Dispatch):
        slot = slot.previous
    # `module.compile()`, `torch.compile(module)`, `module.forward = torch.compile(module.forward)`
    return slot is not None or hasattr(module, "_orig_mod") or hasattr(module.forward, "_torchdynamo_orig_callable")
