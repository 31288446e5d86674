"""What calibration measures of a denoiser on full-compute runs, and keeps: one table that serves every method.

For every site and step a sketch of its offset is kept (the same few thousand entries each time), and from the sketches the inner
products of all steps. Whatever is a weighted sum of stored offsets can be judged from those: plain reuse, polynomials, and the
weights that fit best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from hasten.accelerators.caching.segments import Span

SKETCH_BYTES = 200_000_000
"""Most bytes of sketches, whatever the model."""


@dataclass(frozen=True)
class Tables:
    """Measured on full-compute runs under one sampler, number of steps and guidance.

    Attributes:
        gram: [samples, T, T] inner products of the summed offset of all sites at every two steps, as the guidance weighs them.
        sensitivity: [T] relative error of the final latents for a unit error of that sum at a step, as measured by replays.
        levels: [T] noise levels, or None.
        distances: [samples, T, T] mean absolute differences of the same sums.
    """

    gram: np.ndarray
    sensitivity: np.ndarray
    levels: tuple[float, ...] | None = None
    distances: np.ndarray | None = None

    @property
    def steps(self) -> int:
        return int(self.gram.shape[-1])

    @property
    def mean(self) -> np.ndarray:
        """[T, T] over the samples."""
        return self.gram.mean(0)


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
                rows = tensor.detach().flatten(1)
                key = stream, rows.shape[1]
                if key not in self._columns:
                    generator = torch.Generator().manual_seed(rows.shape[1])
                    count = min(self.width, rows.shape[1])
                    self._columns[key] = torch.randperm(rows.shape[1], generator=generator)[:count].to(rows.device)
                part = rows.index_select(1, self._columns[key]).float() * (rows.shape[1] / len(self._columns[key])) ** 0.5
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
