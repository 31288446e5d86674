"""A scale and a shift for each channel, applied to what is reused; under batched guidance, those of each half of the batch.

The tables come from a plan, which keeps what `AffineStatistics` fitted.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from hasten.kernels.arguments import Fix


class Affine:
    """`scale * value + shift` along one dimension.

    Args:
        scale, shift: [channels], or [groups * channels] for that many equal groups of consecutive rows.

    Attributes:
        group: The one group that all rows belong to; None where each has its share of them.
    """

    def __init__(self, scale: np.ndarray, shift: np.ndarray) -> None:
        self.group: int | None = None
        self._given = torch.tensor(scale, dtype=torch.float32), torch.tensor(shift, dtype=torch.float32)
        self._at: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def apply(self, value: Tensor, dim: int) -> Tensor:
        """A new tensor.

        Args:
            dim: Which dimension the channels are.

        Raises:
            RuntimeError: The batch is no multiple of the groups, or the channels are others.
        """
        given = self._on(value.device, value.dtype)
        channels = value.shape[dim]
        groups = len(given[0]) // channels
        shape = [groups, *[1] * value.ndim]
        shape[dim if dim < 0 else dim + 1] = channels
        scale, shift = (t.view(shape) for t in given)
        if self.group is not None and groups > 1:
            return torch.addcmul(shift[self.group], value, scale[self.group])
        grouped = value.unflatten(0, (groups, -1))
        return torch.addcmul(shift, grouped, scale).flatten(0, 1)

    def table(self, device: torch.device, channels: int) -> Fix:
        """As the fused kernels take it: float32 [groups, channels] each, of the one group alone where all rows belong to it."""
        scale, shift = (t.view(-1, channels) for t in self._on(device, torch.float32))
        if self.group is not None and len(scale) > 1:
            scale, shift = scale[self.group, None], shift[self.group, None]
        return Fix(scale, shift)

    def _on(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Copied to the device once, not at every step."""
        if (device, dtype) not in self._at:
            scale, shift = (t.to(device, dtype) for t in self._given)
            self._at[device, dtype] = scale, shift
        return self._at[device, dtype]


def affines(corrections: Mapping[str, np.ndarray], site: str, branch: int, steps: int) -> list[Affine | None] | None:
    """For each step what a site's reused value is corrected with; None where the plan corrects nothing there.

    Args:
        corrections: Of a plan.
        branch: Number of the guidance branch.
    """
    table = corrections.get(site)
    if table is None:
        return None
    found: list[Affine | None] = []
    for k in range(steps):
        scale, shift = table[:, k, branch]
        plain = bool((scale == 1).all()) and not shift.any()
        found.append(None if plain else Affine(scale, shift))
    return found
