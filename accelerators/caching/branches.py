"""Tells which guidance branch a denoiser call belongs to.

The name of `cache_context` where the pipeline enters one; else the conditioning. Calls between two scheduler steps of the first
step are branches of their own; later calls are matched with them by the very tensors they were given, or by their values where a
pipeline builds them anew. Never by call parity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hasten.accelerators.caching.trace import Position, version_of


class Sighting(NamedTuple):
    """The branch of a call; a reason not to reuse anything in it, or None; whether what is stored for the branch no longer holds."""

    name: str
    doubt: str | None = None
    stale: bool = False


@dataclass
class _Given:
    """A conditioning tensor. Holding it keeps its memory from being reused.

    `constant` once the very same tensor was given again: such a tensor does not change from step to step, unless somebody changes
    the conditioning.
    """

    tensor: Tensor
    version: int | None
    permuted: Tensor | None = None
    constant: bool = False

    def identical(self, now: Tensor) -> bool:
        """Whether it is the same memory, unchanged. In inference mode torch keeps no version, so nothing is certain there."""
        tensor = self.tensor
        return (
            self.version is not None
            and version_of(now) == self.version
            and tensor.data_ptr() == now.data_ptr()
            and (tensor.shape, tensor.stride(), tensor.dtype) == (now.shape, now.stride(), now.dtype)
        )

    def equal(self, now: Tensor) -> bool:
        return self.identical(now) or any(
            (kept.shape, kept.dtype, kept.device) == (now.shape, now.dtype, now.device) and bool(torch.equal(kept, now))
            for kept in (self.tensor, self.permuted)
            if kept is not None
        )


@dataclass
class _Number:
    """A number among the arguments, told from a time in the same way: a time changes, a scale is constant."""

    value: float
    constant: bool = False


@dataclass
class _Arguments:
    """What a call was given besides the latents."""

    tensors: dict[Position, Tensor] = field(default_factory=dict)
    numbers: dict[Position, float] = field(default_factory=dict)
    plain: list[tuple[Position, Any]] = field(default_factory=list)


@dataclass
class _Seen:
    """What a branch was called with when it was first seen."""

    name: str
    given: dict[Position, _Given]
    numbers: dict[Position, _Number]
    plain: list[tuple[Position, Any]]


def _arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any], prefix: str = "") -> _Arguments:
    found = _Arguments()
    items: list[tuple[Any, Any]] = [*enumerate(args), *kwargs.items()]
    for name, value in items:
        key: Position = f"{prefix}{name}" if prefix else name
        if isinstance(value, Tensor):
            if value.ndim >= 2:  # a timestep per sample tells nothing
                found.tensors[key] = value
        elif isinstance(value, bool | str) or value is None:
            found.plain.append((key, value))
        elif isinstance(value, int | float):
            found.numbers[key] = value
        elif isinstance(value, list | tuple) and all(isinstance(v, bool | int | float | str) for v in value):
            found.plain.append((key, tuple(value)))
        elif isinstance(value, Mapping):
            inner = _arguments((), value, f"{key}.")
            found.tensors |= inner.tensors
            found.numbers |= inner.numbers
            found.plain += inner.plain
    return found


class Branches:
    """Names the branches of one run.

    Tensors that change from step to step (control residuals) are found to differ from all branches and so do not tell them apart.
    """

    def __init__(self) -> None:
        self._seen: dict[str, _Seen] = {}
        self.order: list[str] = []

    def name(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, latents: Position, context: str | None, learning: bool) -> Sighting:
        """The branch of this call.

        Args:
            latents: Where the latents stand; they are no conditioning.
            context: Name of the `cache_context` that is entered, if any.
            learning: Whether this is still the run's first step, where every call is a branch of its own.
        """
        now = _arguments(args, kwargs)
        now.tensors.pop(latents, None)
        if context is not None:
            return self._check(self._seen[context], now) if context in self._seen else Sighting(self._new(now, context))
        if learning:
            return Sighting(self._new(now))
        fitting = [seen for seen in self._seen.values() if seen.plain == now.plain]
        best, matches = 0, fitting
        # Identity first: it costs nothing. Values only where identity does not decide.
        for same in (_Given.identical, _Given.equal):
            scores = [
                sum(same(given, now.tensors[key]) for key, given in seen.given.items() if key in now.tensors)
                + sum(number.value == now.numbers.get(key) for key, number in seen.numbers.items())
                for seen in fitting
            ]
            best = max(scores, default=0)
            matches = [seen for seen, score in zip(fitting, scores, strict=True) if score == best]
            if best > 0 and len(matches) == 1:
                return self._check(matches[0], now)
        if not fitting or (best == 0 and any(seen.given for seen in fitting)):
            name = self._new(now)
            batch = {t.shape[0] for t in now.tensors.values()}
            return Sighting(name, f"a guidance branch that the first step did not have ({name}, batch {sorted(batch)})")
        if len(matches) > 1:
            names = ", ".join(seen.name for seen in matches)
            return Sighting(matches[0].name, f"the branches {names} have the same conditioning, so the call may be either's", stale=True)
        return self._check(matches[0], now)

    def reindex(self, rows: Tensor, batch: int) -> None:
        """Lets the conditioning follow the samples; it is recognised in its old order as well, where the pipeline does not permute it."""
        for seen in self._seen.values():
            for given in seen.given.values():
                latest = given.tensor if given.permuted is None else given.permuted
                if latest.shape[0] == batch:
                    given.permuted = latest.index_select(0, rows.to(latest.device))
                    given.constant = False

    def _new(self, now: _Arguments, name: str | None = None) -> str:
        name = name if name is not None else f"branch{len(self._seen)}"
        self._seen[name] = _Seen(name, *_kept(now))
        self.order.append(name)
        return name

    def _check(self, seen: _Seen, now: _Arguments) -> Sighting:
        """Whether the branch still has the conditioning under which its offsets were stored."""
        changed = seen.plain != now.plain
        for key, given in seen.given.items():
            tensor = now.tensors.get(key)
            if tensor is not None and given.identical(tensor):
                given.constant = True
            elif given.constant:
                # Values are compared only here, where the very same tensor was given so far and now another is.
                changed = changed or tensor is None or not given.equal(tensor)
                given.constant = False
        for key, number in seen.numbers.items():
            same = number.value == now.numbers.get(key)
            changed = changed or (number.constant and not same)
            number.constant = same
        if not changed:
            return Sighting(seen.name)
        seen.given, seen.numbers, seen.plain = _kept(now)
        return Sighting(seen.name, "the conditioning changed since the offsets were stored", stale=True)


def _kept(now: _Arguments) -> tuple[dict[Position, _Given], dict[Position, _Number], list[tuple[Position, Any]]]:
    tensors = {key: _Given(tensor, version_of(tensor)) for key, tensor in now.tensors.items()}
    return tensors, {key: _Number(value) for key, value in now.numbers.items()}, now.plain
