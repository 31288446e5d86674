"""Ctrl-C and SIGTERM: the first ends the work at the next denoising step, the second at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopper:
    """Catches the two signals while it is entered; outside the main thread it only answers.

    Attributes:
        signal: The first that came; None while none did.
        patient: Whether somebody looks at `asked`; else the first signal ends the process as it always would.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stopper:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._caught) for number in self.SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def asked(self) -> bool:
        """Whether the work is to end."""
        return self.signal is not None

    @property
    def code(self) -> int:
        """The exit code that shells give to the signal."""
        return 128 + (self.signal or 0)

    def _caught(self, number: int, frame: FrameType | None) -> None:
        first, self.signal = self.signal is None, number
        if not (first and self.patient):
            raise SystemExit(self.code)
