"""One dynamic programme for every method that chooses when to refresh: a row of steps is cut into segments of least total cost.

BAC's adaptive caching scheduler (arXiv 2506.13456), CacheQuant's dynamic programming schedule (arXiv 2503.01323) and the planner
differ only in the cost of a segment.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segments:
    """Optimal cuts for every number of segments.

    Attributes:
        values: [budget + 1] least cost with exactly so many segments; infinite where the lengths do not allow it.
        pointers: [budget + 1, steps] start of the last segment of an optimal cut of the steps up to and including each.
    """

    values: np.ndarray
    pointers: np.ndarray

    def starts(self, segments: int) -> list[int]:
        """First steps of the segments of an optimal cut.

        Raises:
            ValueError: There is no cut into so many segments.
        """
        steps = self.pointers.shape[1]
        if not 1 <= segments < len(self.values) or not np.isfinite(self.values[segments]):
            able = [m for m in range(1, len(self.values)) if np.isfinite(self.values[m])]
            have = f"from {able[0]} to {able[-1]}" if able else "none"
            raise ValueError(f"{steps} steps cannot be cut into {segments} segments of the lengths allowed; possible: {have}")
        found, end = [], steps - 1
        for m in range(segments, 0, -1):
            start = int(self.pointers[m, end])
            found.append(start)
            end = start - 1
        return found[::-1]


def segment_dp(cost: np.ndarray, budget: int, min_length: int = 1, max_length: int | None = None) -> Segments:
    """Cuts steps 0 to T - 1 into segments of least total cost, for every number of segments up to `budget`.

    Args:
        cost: [T, T]; cost[a, b] is that of the segment of steps a to b, both included. Only a <= b is read.
        budget: Most segments.
        min_length, max_length: Of a segment, in steps; the last one may be shorter than `min_length`.

    Raises:
        ValueError: The cost is not square or not a number somewhere, or a limit is out of range.
    """
    cost = np.asarray(cost, dtype=np.float32)
    if cost.ndim != 2 or cost.shape[0] != cost.shape[1] or not len(cost):
        raise ValueError(f"cost must be square, not {cost.shape}")
    steps = len(cost)
    most = steps if max_length is None else max_length
    if not 1 <= budget <= steps:
        raise ValueError(f"budget must be from 1 to the number of steps, {steps}, not {budget}")
    if not 1 <= min_length <= most:
        raise ValueError(f"min_length must be from 1 to max_length, {most}, not {min_length}")
    # by_end[i, a] is the cost of the segment a..i, infinite where it has no allowed length.
    by_end = cost.T.copy()
    start, end = np.meshgrid(np.arange(steps), np.arange(steps))
    length = end - start + 1
    barred = (length < 1) | (length > most) | ((length < min_length) & (end < steps - 1))
    if np.isnan(by_end[~barred]).any():
        raise ValueError("cost must be a number for every segment of an allowed length")
    by_end[barred] = np.inf
    values = np.full(budget + 1, np.inf, np.float64)
    pointers = np.zeros((budget + 1, steps), np.int32)
    best = by_end[:, 0].copy()  # one segment
    values[1] = best[-1]
    rows, block = np.arange(steps), 256
    for m in range(2, budget + 1):
        before = np.concatenate([[np.inf], best[:-1]]).astype(np.float32)  # cost of what ends just before each start
        best = np.empty_like(best)
        for low in range(0, steps, block):
            high = min(steps, low + block)
            total = by_end[low:high, :high] + before[:high]  # a segment starts no later than it ends
            pointers[m, low:high] = total.argmin(1)
            best[low:high] = total[rows[: high - low], pointers[m, low:high]]
        values[m] = best[-1]
    return Segments(values, pointers)
