"""What calibration measures of a denoiser on full-compute runs, and keeps: one table that serves every method.

For every site and step a sketch of its offset is kept (the same few thousand entries each time), and from the sketches the inner
products of all steps. Whatever is a weighted sum of stored offsets can be judged from those: plain reuse, polynomials, and the
weights that fit best.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.segments import Span

SKETCH_BYTES = 200_000_000
"""Most bytes of sketches, whatever the model."""


@dataclass(frozen=True)
class SiteTable:
    """How one site's value changes over a run, means over all rows.

    Attributes:
        cosine: [T, T] cosine similarity of the values at every two steps.
        distance: [T, T] mean absolute difference.
    """

    cosine: np.ndarray
    distance: np.ndarray

    @property
    def drift(self) -> float:
        """Mean of the distances over all pairs of steps."""
        steps = len(self.distance)
        return float(self.distance.sum() / max(1, steps * (steps - 1)))


@dataclass(frozen=True)
class Tables:
    """Measured on full-compute runs under one sampler, number of steps and guidance.

    Attributes:
        gram: [samples, T, T] inner products of the summed offset of all sites at every two steps, as the guidance weighs them.
        sensitivity: [T] relative error of the final latents for a unit error of that sum at a step, as measured by replays.
        levels: [T] noise levels, or None.
        distances: [samples, T, T] mean absolute differences of the same sums.
        sites: By site, where a method asked for single sites.
    """

    gram: np.ndarray
    sensitivity: np.ndarray
    levels: tuple[float, ...] | None = None
    distances: np.ndarray | None = None
    sites: Mapping[str, SiteTable] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return int(self.gram.shape[-1])

    @property
    def mean(self) -> np.ndarray:
        """[T, T] over the samples."""
        return self.gram.mean(0)


def _some(tensor: Tensor, width: int, known: dict[tuple[int, int], Tensor]) -> Tensor:
    """The same `width` entries of every row [rows, entries], scaled so that norms are kept on average."""
    rows = tensor.detach().flatten(1)
    key = rows.shape[1], min(width, rows.shape[1])
    if key not in known:
        generator = torch.Generator().manual_seed(rows.shape[1])
        known[key] = torch.randperm(rows.shape[1], generator=generator)[: key[1]].to(rows.device)
    return rows.index_select(1, known[key]).float() * (key[0] / key[1]) ** 0.5


class SiteSketches:
    """Collects a sketch of every site's value during runs; given to a session as its observer.

    Args:
        steps: Of a run.
        sites: Their names, in the plan's order.
        rows: Of all branches together.
        budget: Most bytes kept.
    """

    def __init__(self, steps: int, sites: tuple[str, ...], rows: int, budget: int = SKETCH_BYTES) -> None:
        self.steps, self.sites = steps, sites
        self.width = max(16, min(16_384, budget // (4 * steps * max(1, rows) * max(1, len(sites)))))
        self.kept: dict[tuple[str, int], Tensor] = {}
        self._columns: dict[tuple[int, int], Tensor] = {}

    def __call__(self, branch: str, step: int, values: dict[Span, dict[int, Tensor]]) -> None:
        """Keeps the first stream of every site."""
        for span, value in values.items():
            sketch = _some(value[min(value)], self.width, self._columns).cpu()
            key = branch, span.start
            if key not in self.kept:
                self.kept[key] = torch.zeros(len(sketch), self.steps, sketch.shape[1])
            self.kept[key][:, step] = sketch

    def tables(self) -> dict[str, SiteTable]:
        """By site; guidance branches and rows are averaged."""
        found = {}
        for i, site in enumerate(self.sites):
            kept = [sketch for (_, at), sketch in self.kept.items() if at == i]
            if not kept:
                continue
            sketch = torch.cat(kept) if len({k.shape[1:] for k in kept}) == 1 else kept[0]
            unit = torch.nn.functional.normalize(sketch.double(), dim=-1)
            # The scaling that keeps norms is undone for mean absolute differences.
            distance = torch.cdist(sketch, sketch, p=1).mean(0) / sketch.shape[-1]
            found[site] = SiteTable(np.asarray((unit @ unit.mT).mean(0)), np.asarray(distance))
        return found


class Sketches:
    """Collects sketches of the offsets during runs; given to a session as its observer.

    Args:
        steps: Of a run.
        guidance_scale: Of batched guidance, whose rows are [unconditional; conditional] (diffusers' order); None where every row
            stands for itself.
        rows: Of all branches together.
        budget: Most bytes kept.
    """

    def __init__(self, steps: int, guidance_scale: float | None, rows: int, budget: int = SKETCH_BYTES) -> None:
        self.steps, self.scale = steps, guidance_scale
        self.width = max(64, min(16_384, budget // (4 * steps * max(1, rows))))
        self.branches: dict[str, Tensor] = {}
        self._columns: dict[tuple[int, int], Tensor] = {}

    def __call__(self, branch: str, step: int, values: dict[Span, dict[int, Tensor]]) -> None:
        """Adds up the offsets of all sites of one step; streams lie side by side."""
        sums: dict[tuple[int, int], Tensor] = {}
        for span in sorted(values):
            for stream, tensor in values[span].items():
                key = stream, tensor[0].numel()
                part = _some(tensor, self.width, self._columns)
                sums[key] = sums[key] + part if key in sums else part
        if not sums:
            return
        sketch = torch.cat([sums[key] for key in sorted(sums)], 1).cpu()
        if self.scale is not None and len(sketch) % 2 == 0:
            without, given = sketch.chunk(2)
            sketch = without + self.scale * (given - without)
        if branch not in self.branches:
            self.branches[branch] = torch.zeros(len(sketch), self.steps, sketch.shape[1])
        self.branches[branch][:, step] = sketch

    def _weighed(self) -> list[Tensor]:
        """[samples, T, entries]; two calls a step are weighed as guidance does, other branches stand side by side."""
        kept = list(self.branches.values())
        if not kept:
            raise ValueError("nothing was collected: the runs stored no offsets")
        if self.scale is not None and len(kept) == 2 and kept[0].shape == kept[1].shape:
            first, second = kept  # conditional first, as diffusers' pipelines call them; the other order weighs nearly alike
            kept = [second + self.scale * (first - second)]
        return kept

    def gram(self) -> np.ndarray:
        """[samples, T, T] inner products."""
        return sum(np.asarray(sketch.double() @ sketch.double().mT) for sketch in self._weighed())  # type: ignore[return-value]

    def distances(self) -> np.ndarray:
        """[samples, T, T] mean absolute differences."""
        return sum(np.asarray(torch.cdist(sketch, sketch, p=1)) / sketch.shape[-1] for sketch in self._weighed())  # type: ignore[return-value]
