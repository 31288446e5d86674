"""Skips a guidance branch: the branch that is not computed is the one that is, plus their difference as it was when both were.

Where the pipeline calls the denoiser once for each branch, the later call is answered. Where it calls it once with the rows of both, the
conditional half alone is run and the other is put back beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.segments import noise_fractions, polynomial_weights

TOLERANCE = 2e-2
"""Most relative difference between rows that run alone and in the whole batch: kernels choose differently by batch size."""
FIT = 0.3
"""Most relative residual of the guided output as a combination of both halves; rescaled guidance changes its size a little."""


def combined(made: Callable[..., Tensor], *outputs: Any) -> Any:
    """A denoiser's outputs of the same form, tensor by tensor made into one."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return made(*outputs)
    if type(first) in (tuple, list):
        return type(first)(combined(made, *entries) for entries in zip(*outputs, strict=True))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first)(**{f.name: combined(made, *(getattr(o, f.name) for o in outputs)) for f in fields(first)})
    return first


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a denoiser's output; the first is its prediction."""
    if isinstance(output, Tensor):
        return [output]
    if is_dataclass(output) and not isinstance(output, type):
        output = [getattr(output, f.name) for f in fields(output)]
    return [tensor for entry in output for tensor in tensors(entry)] if isinstance(output, tuple | list) else []


def rows_of(value: Any, batch: int, rows: slice) -> Any:
    """Arguments with every tensor whose first dimension is the batch cut to some of its rows."""
    if isinstance(value, Tensor):
        return value[rows] if value.ndim and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {key: rows_of(entry, batch, rows) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(rows_of(entry, batch, rows) for entry in value)
    return value


class Differences:
    """The last differences of one branch to the one that is computed, newest first, and the steps they are of."""

    def __init__(self) -> None:
        self.kept: list[tuple[int, Any]] = []

    def add(self, step: int, computed: Any, other: Any, order: int) -> None:
        """Takes in a step at which both were computed."""
        earlier = [entry for entry in self.kept if entry[0] != step]
        self.kept = [(step, combined(lambda a, b: b - a, computed, other)), *earlier][: order + 1]

    def rebuild(self, computed: Any, times: np.ndarray, step: int) -> Any:
        """The other branch's output."""
        nodes = [at for at, _ in self.kept]
        weights = polynomial_weights(times[nodes], float(times[step]))

        def made(base: Tensor, *differences: Tensor) -> Tensor:
            total = base.float()
            for difference, weight in zip(differences, weights, strict=True):
                total = total.add(difference, alpha=float(weight))
            return total.to(base.dtype)

        return combined(made, computed, *(difference for _, difference in self.kept))


class Guidance:
    """What one run knows of its guidance branches.

    Args:
        skips: [steps] where a branch is skipped.
        levels: Noise level of every step, over which differences are extrapolated; the steps' numbers unless told.
        order: 0 repeats the last difference, 1 draws a line through the last two.
        conditional: Of a batch with both branches: the half, 0 or 1, that is computed; None to learn it from the scheduler's input.

    Attributes:
        halved: Branches of the run whose state holds the conditional rows alone.
        reason: Why nothing can be skipped, or None.
    """

    def __init__(self, skips: np.ndarray, levels: Sequence[float] | None, order: int, conditional: int | None) -> None:
        self.skips, self.order, self.conditional = skips, order, conditional
        usable = levels is not None and len(levels) == len(skips)
        self.times = noise_fractions(levels) if usable and levels is not None else np.arange(len(skips), dtype=np.float64)
        self.halved: set[str] = set()
        self.reason: str | None = None
        self.batched: bool | None = None
        self.differences: dict[str, Differences] = {}
        self._latest: tuple[int, Any] | None = None
        self._unlearned: Any = None

    def clear(self) -> None:
        """Forgets all differences: they belong to another picture, or another conditioning."""
        self.differences.clear()
        self.halved.clear()
        self._latest = self._unlearned = None

    @property
    def bytes(self) -> int:
        """Bytes stored now."""
        return sum(tensor.nbytes for one in self.differences.values() for _, kept in one.kept for tensor in tensors(kept))

    # ------------------------------------------------------------------------------------------- a call for each branch

    def computed(self, name: str, first: bool, step: int, evaluation: int, out: Any) -> None:
        """A branch was computed; `first` if it is the one that always is."""
        if first:
            self._latest = evaluation, out
        elif self._latest is not None and self._latest[0] == evaluation:
            self.differences.setdefault(name, Differences()).add(step, self._latest[1], out, self.order)

    def answer(self, name: str, step: int, evaluation: int) -> Any:
        """What a skipped branch is rebuilt as; None where it has to be computed."""
        known = self.differences.get(name)
        if known is None or not known.kept or self._latest is None or self._latest[0] != evaluation:
            return None
        return known.rebuild(self._latest[1], self.times, step)

    # --------------------------------------------------------------------------------------------- both in one batch

    def looks_batched(self, latents: Tensor) -> bool:
        """Whether the first call holds the same latents twice."""
        if self.batched is None:
            half = len(latents) // 2
            self.batched = len(latents) % 2 == 0 and half > 0 and bool(torch.equal(latents[:half], latents[half:]))
        return self.batched

    def rows(self, batch: int) -> slice:
        """Those of the conditional half."""
        half = batch // 2
        return slice(half, batch) if self.conditional == 1 else slice(0, half)

    def why_not(self, name: str) -> str | None:
        """Why a batch cannot be halved now, or None."""
        if self.reason is not None:
            return self.reason
        if self.conditional is None:
            return "which half of the batch is the conditional one is not known yet"
        return None if name in self.differences else "both branches have not been computed yet"

    def both(self, name: str, step: int, out: Any) -> None:
        """Both halves were computed."""
        if self.conditional is None:
            self._unlearned = name, step, out
            return
        halves = [combined(lambda t: t[: len(t) // 2], out), combined(lambda t: t[len(t) // 2 :], out)]
        self.differences.setdefault(name, Differences()).add(step, halves[self.conditional], halves[1 - self.conditional], self.order)

    def join(self, name: str, step: int, out: Any) -> Any:
        """The whole batch, from the conditional half."""
        other = self.differences[name].rebuild(out, self.times, step)
        pair = (other, out) if self.conditional == 1 else (out, other)
        return combined(lambda a, b: torch.cat([a, b]), *pair)

    def learn(self, model_output: Any) -> None:
        """Learns from what the scheduler was given which half is the conditional one: guidance weighs that one more.

        The guided output is p A + q B, with p = 1 - s and q = s where B is the conditional half.
        """
        if self._unlearned is None or self.conditional is not None or not isinstance(model_output, Tensor):
            return
        name, step, out = self._unlearned
        whole = next(iter(tensors(out)), None)
        if whole is None or model_output.ndim != whole.ndim or model_output.ndim < 2:
            return
        a, b = (half[:, : model_output.shape[1]].float() for half in whole.chunk(2))
        if a.shape != model_output.shape:
            self.reason = "the scheduler is given another shape than the denoiser returns, so the halves of the batch cannot be told apart"
            return
        basis, guided = torch.stack([a.flatten(), b.flatten()], 1).double(), model_output.flatten().double()
        gram = basis.T @ basis
        gram += 1e-9 * gram.trace() * torch.eye(2, dtype=gram.dtype, device=gram.device)
        p, q = (weights := torch.linalg.solve(gram, basis.T @ guided)).tolist()
        if float((guided - basis @ weights).norm()) > FIT * float(guided.norm()) or abs(abs(p) - abs(q)) < 0.1:
            self.reason = "the guided output is no combination of two halves of the batch in which one weighs more"
            return
        self.conditional, self._unlearned = int(abs(q) > abs(p)), None
        self.both(name, step, out)

    def reindex(self, rows: Tensor) -> None:
        """Lets the differences follow the samples."""
        own = rows[: len(rows) // 2] if self.batched else rows
        for one in self.differences.values():
            one.kept = [(step, combined(lambda t: t.index_select(0, own.to(t.device)), kept)) for step, kept in one.kept]
        self._latest = None


def separable(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], batch: int, out: Any) -> str:
    """Why half of a batch cannot be run alone; empty if it can: it is tried, and compared with the same rows of the whole."""
    rows = slice(batch // 2, batch)
    try:
        alone = next(iter(tensors(call(*rows_of(args, batch, rows), **rows_of(kwargs, batch, rows)))), None)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:  # what a network says of inputs that do not fit together
        return f"half of the batch cannot be run alone ({' '.join(str(error).split())[:120]})"
    whole = next(iter(tensors(out)), None)
    if alone is None or whole is None or alone.shape != whole[rows].shape:
        return "half of the batch alone gives another shape"
    off = float((alone.float() - whole[rows].float()).norm() / whole[rows].float().norm().clamp_min(1e-12))
    return "" if off <= TOLERANCE else f"half of the batch alone gives another result (off by {100 * off:.0f}%)"
