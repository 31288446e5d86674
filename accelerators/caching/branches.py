"""Tells which guidance branch a denoiser call belongs to.

The name of `cache_context` where the pipeline enters one; else the conditioning. Calls between two scheduler steps of the first
step are branches of their own; later calls are matched with them by the very tensors they were given, or by their values where a
pipeline builds them anew. Never by call parity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hasten.accelerators.caching.trace import Position, version_of


@dataclass
class _Seen:
    """What a branch was called with when it was first seen. Holding the tensors keeps their memory from being reused."""

    name: str
    tensors: dict[Position, tuple[Tensor, int | None]]
    plain: tuple[Any, ...]


def _flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[dict[Position, Tensor], tuple[Any, ...]]:
    tensors: dict[Position, Tensor] = {}
    plain: list[Any] = []
    items: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
    for key, value in items:
        if isinstance(value, Tensor):
            tensors[key] = value
        elif isinstance(value, bool | int | float | str) or value is None:
            plain.append((key, value))
        elif isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value):
            plain.append((key, tuple(value)))
        elif isinstance(value, Mapping):
            inner, more = _flatten((), value)
            tensors |= {f"{key}.{name}": tensor for name, tensor in inner.items()}
            plain += [(key, *entry) for entry in more]
    return tensors, tuple(plain)


def _identical(seen: tuple[Tensor, int | None], now: Tensor) -> bool:
    """Whether it is the same memory, unchanged. In inference mode torch keeps no version, so nothing is certain there."""
    tensor, version = seen
    return (
        version is not None
        and version_of(now) == version
        and tensor.data_ptr() == now.data_ptr()
        and (tensor.shape, tensor.stride(), tensor.dtype) == (now.shape, now.stride(), now.dtype)
    )


def _equal(seen: tuple[Tensor, int | None], now: Tensor) -> bool:
    tensor = seen[0]
    if tensor.shape != now.shape or tensor.dtype != now.dtype or tensor.device != now.device:
        return False
    return _identical(seen, now) or bool(torch.equal(tensor, now))


class Branches:
    """Names the branches of one run.

    Tensors that change from step to step (control residuals) are found to differ from all branches and so do not tell them apart.
    """

    def __init__(self) -> None:
        self._seen: list[_Seen] = []
        self.order: list[str] = []

    def name(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, latents: Position, context: str | None, learning: bool
    ) -> tuple[str, str | None]:
        """The branch of this call, and the reason if that is ambiguous.

        Args:
            latents: Where the latents stand; they are no conditioning.
            context: Name of the `cache_context` that is entered, if any.
            learning: Whether this is still the run's first step, where every call is a branch of its own.
        """
        if context is not None:
            if context not in self.order:
                self.order.append(context)
            return context, None
        tensors, plain = _flatten(args, kwargs)
        tensors.pop(latents, None)
        tensors = {key: tensor for key, tensor in tensors.items() if tensor.ndim >= 2}  # a timestep per sample tells nothing
        if learning:
            return self._new(tensors, plain), None
        fitting = [seen for seen in self._seen if seen.plain == plain]
        # Identity first: it costs nothing. Values only where identity does not decide.
        for same in (_identical, _equal):
            scores = [sum(same(entry, tensors[key]) for key, entry in seen.tensors.items() if key in tensors) for seen in fitting]
            best = max(scores, default=0)
            matches = [seen.name for seen, score in zip(fitting, scores, strict=True) if score == best]
            if best > 0 and len(matches) == 1:
                return matches[0], None
        if not fitting or (best == 0 and any(seen.tensors for seen in fitting)):
            name = self._new(tensors, plain)
            batch = {t.shape[0] for t in tensors.values()}
            return name, f"a guidance branch that the first step did not have ({name}, batch {sorted(batch)})"
        if len(matches) > 1:
            return matches[0], f"the branches {', '.join(matches)} have the same conditioning, so the call may be either's"
        return matches[0], None

    def _new(self, tensors: dict[Position, Tensor], plain: tuple[Any, ...]) -> str:
        name = f"branch{len(self._seen)}"
        self._seen.append(_Seen(name, {key: (t, version_of(t)) for key, t in tensors.items()}, plain))
        self.order.append(name)
        return name
