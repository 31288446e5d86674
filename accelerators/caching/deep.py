"""Carries out plans for a UNet's deep branch: its output is reused as a value, the layers above it run on the present latents.

Modules are never replaced (the model's forward reads their attributes): their calls are answered. What nobody will read is answered
with placeholders of the right number, shape and dtype; the module before the first layer that runs answers with the stored value, which
the model itself joins with the live skip.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.forward import Finite, Recompute
from hasten.accelerators.caching.plan import Action, PlanError
from hasten.accelerators.caching.segments import Span
from hasten.accelerators.caching.state import Kept, Packed, as_is, moved, probe, unpacked
from hasten.accelerators.caching.unet import Deep
from hasten.accelerators.dispatch import Call, Handler


def mapped(value: Any, made: Callable[[Any], Any]) -> Any:
    """A nest of tuples and lists with its tensors, packed or not, replaced."""
    if isinstance(value, Tensor | Packed):
        return made(value)
    if type(value) in (tuple, list):
        return type(value)(mapped(entry, made) for entry in value)
    return value


def kept_in(value: Any) -> list[Kept]:
    """The tensors of a nest of tuples and lists, packed or not."""
    found: list[Kept] = []
    mapped(value, found.append)
    return found


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest of tuples and lists."""
    return [kept for kept in kept_in(value) if isinstance(kept, Tensor)]


class DeepState:
    """The stored output of a deep branch.

    Args:
        denoiser: The UNet.
        deep: Its layers.
        site: Which deep branch.
        actions: [steps] of the plan.
        finite: Whether a value may be used.
        corrections: For each step, what the stored value is corrected with, or None.
        force_store: Store at every step.
        pack: What is done to a value that is stored.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        deep: Deep,
        site: str,
        actions: np.ndarray,
        finite: Finite,
        corrections: list[Affine | None] | None = None,
        force_store: bool = False,
        pack: Callable[[Tensor], Kept] = as_is,
    ) -> None:
        self.pack = pack
        if (actions == Action.FORECAST).any():
            raise PlanError("the deep branch of a UNet is reused as a value: a plan for it may compute and reuse, not forecast")
        self.site, self.actions, self.finite = site, actions, finite
        self.producer, self.entry = denoiser.get_submodule(site), denoiser.get_submodule("conv_in")
        self.skipped = {path: denoiser.get_submodule(path) for path in deep.skipped(deep.sites.index(site))}
        self.corrections = corrections
        # A step's value is kept if the next one reuses it.
        self.keeps = [force_store or (k + 1 < len(actions) and actions[k + 1] == Action.REUSE) for k in range(len(actions))]
        self.reusing = np.flatnonzero(actions == Action.REUSE)
        self.bytes_planned = 0
        self.value: Any = None
        self.source = -1
        self.templates: dict[str, Any] = {}
        self.shape = torch.Size()
        """Of what the input convolution returned when the value was stored."""

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for t in kept_in(self.value))

    def start(self, step: int, doubt: str | None) -> DeepForward | None:
        reuse = self.actions[step] == Action.REUSE
        if not reuse and not self.keeps[step]:
            return None
        why = doubt
        if reuse and why is None:
            if self.value is None:
                why = "nothing is stored for it yet"
            elif not all(self.finite(probe(kept)) for kept in kept_in(self.value)):
                why, self.value = "its stored value is not finite", None
        return DeepForward(self, step, bool(reuse), why)

    def release(self, step: int) -> None:
        if self.value is not None and not (self.reusing >= step).any() and not self.keeps[min(step, len(self.keeps) - 1)]:
            self.value = None

    def clear(self) -> None:
        self.value = None

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        if batch is not None and self.shape[:1] != (batch,):
            return
        self.value = mapped(self.value, lambda kept: moved(kept, rows))
        self.shape = torch.Size((len(rows), *self.shape[1:]))

        def resized(template: tuple[torch.Size, torch.dtype, torch.device]) -> Any:
            return (torch.Size((len(rows), *template[0][1:])), *template[1:])

        self.templates = {path: _templates(value, resized) for path, value in self.templates.items()}

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        return (
            {Span(0, 1, step): dict(enumerate(tensors_in(unpacked(self.value))))} if self.source == step and self.value is not None else {}
        )


class _Template(tuple):
    """Shape, dtype and device of a tensor."""


def _templates(value: Any, made: Callable[[Any], Any]) -> Any:
    if isinstance(value, _Template):
        return _Template(made(value))
    if type(value) in (tuple, list):
        return type(value)(_templates(entry, made) for entry in value)
    return value


def _placeholder(value: Any) -> Any:
    """Zeros that take no memory, in the place of tensors that nobody reads."""
    if isinstance(value, _Template):
        shape, dtype, device = value
        return torch.zeros((), dtype=dtype, device=device).expand(shape)
    if type(value) in (tuple, list):
        return type(value)(_placeholder(entry) for entry in value)
    return value


class DeepForward:
    """One call of the UNet: a `Pass`."""

    def __init__(self, branch: DeepState, step: int, reuse: bool, why: str | None) -> None:
        self.branch, self.step = branch, step
        self.reused = reuse and why is None
        self.reasons = [f"{branch.site}: {why}"] if reuse and why is not None else []
        self.answered = False
        self.found: Any = None

    def handlers(self) -> dict[nn.Module, Handler]:
        branch = self.branch
        if self.reused:
            resting = {module: self._rest(path) for path, module in branch.skipped.items()}
            return {**resting, branch.producer: self._answer, branch.entry: self._enter}
        watching = {module: self._watch(path) for path, module in branch.skipped.items()}
        return {**watching, branch.producer: self._keep, branch.entry: self._enter}

    def _enter(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = call(*args, **kwargs)
        if self.reused and out.shape != self.branch.shape:
            raise Recompute("the batch, or the resolution, is no longer that of the stored value")
        self.branch.shape = out.shape
        return out

    def _rest(self, path: str) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if path not in self.branch.templates:
                raise Recompute(f"{path} was not called when the deep branch was stored")
            return _placeholder(self.branch.templates[path])

        return handle

    def _answer(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.answered = True
        fix = self.branch.corrections[self.step] if self.branch.corrections is not None else None
        value = unpacked(self.branch.value)
        return value if fix is None else mapped(value, lambda tensor: fix.apply(tensor, 1))

    def _watch(self, path: str) -> Handler:
        def handle(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = call(*args, **kwargs)
            self.branch.templates[path] = mapped(out, lambda t: _Template((t.shape, t.dtype, t.device)))
            return out

        return handle

    def _keep(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.found = call(*args, **kwargs)
        return self.found

    def finish(self) -> None:
        if self.reused and not self.answered:
            raise Recompute("the model did not call the module whose output is reused")
        if self.found is not None:
            # The model may go on to work in place on what the module returned.
            self.branch.value, self.branch.source = mapped(self.found, lambda t: self.branch.pack(t.clone())), self.step

    def executed(self, planned: np.ndarray) -> np.ndarray:
        return planned if self.reused else np.full(len(planned), Action.COMPUTE, np.uint8)
