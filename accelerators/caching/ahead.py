"""Decisions a step ahead: what a decider would say of the next step is worked out on the device as soon as this one's proxy is known.

The proxies of two steps tell where they are heading. A decider judges the one it will see next, on their straight line, and its verdict
travels to the host while the device is busy with the rest of the step. Whoever asks for it waits for that much of the device's queue, and
never for its end. A jerk is noticed one step late.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hasten.accelerators.caching.state import moved


def sent(values: Sequence[bool | int | float], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A few values on a device, without waiting for it: from memory that is not pinned, a copy waits for all that is queued."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=pinned)


class Ahead:
    """The next step's verdict of a branch, on its way."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forgets everything."""
        self._last: Tensor | None = None
        self._forget_verdict()

    def _forget_verdict(self) -> None:
        self._step = -1
        self._verdict: Tensor | None = None
        self._arrived: torch.cuda.Event | None = None
        self._order: list[int] | None = None

    def foretell(self, step: int, proxy: Tensor, judge: Callable[[Tensor], Tensor]) -> None:
        """Hears the proxy [rows, ...] of the step before `step`; `judge` says [rows] bool of the one that is expected then."""
        last, self._last = self._last, proxy.clone()
        self._forget_verdict()
        if last is None or last.shape != proxy.shape:
            return
        self._step = step
        verdict = judge(torch.lerp(last, proxy, 2.0))
        if not verdict.is_cuda:
            self._verdict = verdict.cpu()
            return
        self._verdict = torch.empty(len(verdict), dtype=torch.bool, pin_memory=True).copy_(verdict, non_blocking=True)
        self._arrived = torch.cuda.Event()
        self._arrived.record(torch.cuda.current_stream(verdict.device))

    def verdict(self, step: int, rows: int) -> list[bool]:
        """Of each row; no row is reused where nothing could be foretold."""
        if self._verdict is None or step != self._step:
            return [False] * rows
        if self._arrived is not None:
            self._arrived.synchronize()
        said: list[bool] = self._verdict.tolist()
        said = said if self._order is None else [said[i] for i in self._order]
        return said if len(said) == rows else [False] * rows

    def reindex(self, rows: Tensor, batch: int | None) -> None:
        """The rows are other ones now."""
        if self._last is None or (batch is not None and len(self._last) != batch):
            return
        self._last = moved(self._last, rows)
        order = rows.tolist()
        self._order = order if self._order is None else [self._order[i] for i in order]

    @property
    def bytes(self) -> int:
        """That are held on the device."""
        return 0 if self._last is None else self._last.nbytes
