"""How far a batch run is, on a terminal's stderr."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from hasten.app.batch.folder import FAILED


class _Left(ProgressColumn):
    """The time that is left at the pace so far."""

    def render(self, task: Task) -> Text:
        pace = task.fields["pace"]
        if not pace or task.total is None:
            return Text("")
        left = round((task.total - task.completed) / pace)
        return Text(f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")


class BatchBar:
    """Counts what is done and what failed; draws it where stderr is a terminal.

    Args:
        jobs: In all.
        shown: Whether it is drawn at all.

    Attributes:
        done, failed: Jobs so far, with those of earlier runs.
    """

    def __init__(self, jobs: int, shown: bool = True) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
            _Left(),
        )
        self._bar = Progress(*columns, console=console, disable=not (shown and console.is_terminal), refresh_per_second=2)
        self._task = self._bar.add_task("loading", total=jobs, counts="", pace=0.0)
        self._jobs = jobs
        self.done = self.failed = 0
        self._began, self._before = time.monotonic(), 0
        self._processor = time.process_time()

    def __enter__(self) -> BatchBar:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """What is being done before the drawing."""
        self._bar.update(self._task, description=text)

    def begin(self) -> None:
        """The drawing begins: what is done already does not count for the pace."""
        self._began, self._before = time.monotonic(), self.done + self.failed
        self._processor = time.process_time()
        self.say("drawing")
        self._show()

    def stepped(self, done: int, total: int) -> None:
        """So many of so many denoising steps of the present call are done."""
        self._bar.update(self._task, description=f"drawing, step {done} of {total}")

    def batch(self, rows: Sequence[dict[str, Any]]) -> None:
        """A batch is done."""
        bad = sum(row["status"] == FAILED for row in rows)
        self.failed += bad
        self.done += len(rows) - bad
        self._show()

    @property
    def pace(self) -> float:
        """Pictures per second since the drawing began."""
        seconds = time.monotonic() - self._began
        return (self.done + self.failed - self._before) / seconds if seconds > 0 else 0.0

    @property
    def processor_seconds(self) -> float:
        """What this process's threads spent since the drawing began."""
        return time.process_time() - self._processor

    def _show(self) -> None:
        failed = f", {self.failed} failed" if self.failed else ""
        counts = f"{self.done} of {self._jobs} done{failed}, {self.pace:.2f} a second"
        self._bar.update(self._task, completed=self.done + self.failed, counts=counts, pace=self.pace)
