"""Carries out plans for a UNet's deep branch: its output is reused or forecast as a value, the layers above it run on the present latents.

Modules are never replaced (the model's forward reads their attributes): their calls are answered. What nobody will read is answered
with placeholders of the right number, shape and dtype; the module before the first layer that runs answers with the stored value, which
the model itself joins with the live skip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hasten.accelerators.caching.affine import Affine
from hasten.accelerators.caching.forward import Finite, Recompute
from hasten.accelerators.caching.plan import Action
from hasten.accelerators.caching.segments import Span, forecast_terms, noise_fractions
from hasten.accelerators.caching.state import AS_IS, Packer, kept_in, mapped, moved, probe, unpacked
from hasten.accelerators.caching.unet import Deep
from hasten.accelerators.dispatch import Call, Handler


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors of a nest of tuples and lists."""
    return [kept for kept in kept_in(value) if isinstance(kept, Tensor)]


def deep_program(
    actions: np.ndarray, *, weights: np.ndarray | None = None, order: int = 1, levels: Sequence[float] | None = None
) -> list[tuple[tuple[int, float], ...]]:
    """For each step the stored steps, with weights, whose values stand in for the branch; nothing where it is computed.

    Args:
        actions: [steps] of the plan.
        weights, order, levels: As for `program`, of this one site.
    """
    steps = len(actions)
    times = noise_fractions(levels) if levels is not None and len(levels) == steps else np.arange(steps, dtype=np.float64)
    computed: list[int] = []
    terms: list[tuple[tuple[int, float], ...]] = []
    for k, action in enumerate(actions):
        if action == Action.COMPUTE or not computed:
            computed = [k, *computed]
            terms.append(())
        elif action == Action.FORECAST:
            terms.append(forecast_terms(computed, times, k, order, weights[k] if weights is not None else None))
        else:
            terms.append(((computed[0], 1.0),))
    return terms


def weighed(values: Sequence[Any], weights: Sequence[float]) -> Any:
    """The weighed sum of nests of one structure, in the tensors' own dtype; sums are taken in float32."""
    if len(values) == 1 and weights[0] == 1:
        return values[0]
    sums = []
    for parts in zip(*(tensors_in(value) for value in values), strict=True):
        total = weights[0] * parts[0].float()
        for weight, part in zip(weights[1:], parts[1:], strict=True):
            total = torch.add(total, part.float(), alpha=weight)
        sums.append(total.to(parts[0].dtype))
    rest = iter(sums)
    return mapped(values[0], lambda _: next(rest))


class DeepState:
    """The stored outputs of a deep branch.

    Args:
        denoiser: The UNet.
        deep: Its layers.
        site: Which deep branch.
        terms: What stands in for it at each step: see `deep_program`.
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
        terms: Sequence[tuple[tuple[int, float], ...]],
        finite: Finite,
        corrections: list[Affine | None] | None = None,
        force_store: bool = False,
        pack: Packer = AS_IS,
    ) -> None:
        self.pack = pack
        self.site, self.terms, self.finite = site, terms, finite
        self.producer, self.entry = denoiser.get_submodule(site), denoiser.get_submodule("conv_in")
        self.skipped = {path: denoiser.get_submodule(path) for path in deep.skipped(deep.sites.index(site))}
        self.corrections = corrections
        self.last = {source: k for k, sources in enumerate(terms) for source, _ in sources}
        """By source, the last step that reads it."""
        self.force_store = force_store
        self.bytes_planned = 0
        self.values: dict[int, Any] = {}
        """By the step that they were computed at."""
        self.templates: dict[str, Any] = {}
        self.shape = torch.Size()
        """Of what the input convolution returned when the value was stored."""

    @property
    def bytes(self) -> int:
        return sum(t.nbytes for value in self.values.values() for t in kept_in(value))

    def keeps(self, step: int) -> bool:
        """Whether a later step reads what this one computes."""
        return self.force_store or step in self.last

    def start(self, step: int, doubt: str | None) -> DeepForward | None:
        reuse = bool(self.terms[step])
        if not reuse and not self.keeps(step):
            return None
        why = doubt
        if reuse and why is None:
            sources = [source for source, _ in self.terms[step]]
            if not all(source in self.values for source in sources):
                why = "nothing is stored for it yet"
            elif not all(self.finite(probe(kept)) for source in sources for kept in kept_in(self.values[source])):
                why = "its stored value is not finite"
                self.values.clear()
        return DeepForward(self, step, reuse, why)

    def release(self, step: int) -> None:
        self.values = {source: value for source, value in self.values.items() if self._wanted(source, step)}

    def _wanted(self, source: int, step: int) -> bool:
        """Whether a value is read at `step` or later."""
        return self.last.get(source, -1) >= step or (self.force_store and source >= step)

    def clear(self) -> None:
        self.values.clear()

    def reindex(self, rows: Tensor, batch: int | None = None) -> None:
        if batch is not None and self.shape[:1] != (batch,):
            return
        self.values = moved(self.values, rows)
        self.shape = torch.Size((len(rows), *self.shape[1:]))

        def resized(template: tuple[torch.Size, torch.dtype, torch.device]) -> Any:
            return (torch.Size((len(rows), *template[0][1:])), *template[1:])

        self.templates = {path: _templates(value, resized) for path, value in self.templates.items()}

    def stored(self, step: int) -> dict[Span, dict[int, Tensor]]:
        return {Span(0, 1, step): dict(enumerate(tensors_in(unpacked(self.values[step]))))} if step in self.values else {}


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
        terms = self.branch.terms[self.step]
        value = weighed([unpacked(self.branch.values[source]) for source, _ in terms], [weight for _, weight in terms])
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
            fresh = mapped(self.found, lambda t: self.branch.pack(t.clone()))
            if terms := self.branch.terms[self.step]:
                # Computed although it should have been reused: what is stored may no longer fit, and this is newer.
                self.branch.values = {terms[0][0]: fresh}
            else:
                self.branch.values[self.step] = fresh

    def executed(self, planned: np.ndarray) -> np.ndarray:
        return planned if self.reused else np.full(len(planned), Action.COMPUTE, np.uint8)
