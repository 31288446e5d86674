"""Takes batches from the folder, draws them and writes them down, until all are done."""

from __future__ import annotations

import gc
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

from hasten.app import files
from hasten.app.batch.failures import one_line, out_of_memory
from hasten.app.batch.folder import DONE, FAILED, Folder
from hasten.app.batch.jobs import Job
from hasten.app.batch.painter import Cancelled, Painted, Painter

POLL, LOOK = 0.2, 2.0
"""Seconds between two tries for batches that others hold, and between two looks at what others have done."""


class Progress(Protocol):
    """Hears how far the work is."""

    def stepped(self, done: int, total: int) -> None:
        """So many of so many denoising steps of the present call are done."""

    def batch(self, rows: Sequence[dict[str, Any]]) -> None:
        """A batch is done, here or elsewhere; these are all its rows."""


@dataclass(frozen=True)
class Share:
    """Which batches a process takes first, and when it ends.

    Attributes:
        rank, world: It begins with batches rank, rank + world, ...; then come those of the others.
        wait: Whether it stays until all are done, to take over what others leave behind; else until none is free.
    """

    rank: int = 0
    world: int = 1
    wait: bool = True

    def order(self, batches: int) -> list[int]:
        """All batches, its own first."""
        return sorted(range(batches), key=lambda batch: ((batch - self.rank) % self.world != 0, batch))


@dataclass
class Ledger:
    """Which batches are done.

    Args:
        folder: That says so.
        batches: Jobs by batch.
        retry: Whether jobs that failed before count as not done, once.
    """

    folder: Folder
    batches: Sequence[tuple[Job, ...]]
    retry: bool = False
    complete: set[int] = field(default_factory=set, init=False)
    _failed_before: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        if self.retry:
            for batch in range(len(self.batches)):
                self._failed_before |= {
                    name: int(row["attempt"]) for name, row in self.folder.rows(batch).items() if row["status"] == FAILED
                }

    def standing(self, batch: int) -> dict[str, dict[str, Any]]:
        """Rows that need no work."""
        rows = self.folder.rows(batch)
        names = {job.id for job in self.batches[batch]}
        return {name: row for name, row in rows.items() if name in names and not self._again(row)}

    def attempts(self, batch: int) -> dict[str, int]:
        """How often each job of the batch was tried, where it failed."""
        return {name: int(row["attempt"]) for name, row in self.folder.rows(batch).items() if row["status"] == FAILED}

    def _again(self, row: dict[str, Any]) -> bool:
        return row["status"] == FAILED and self._failed_before.get(row["id"]) == row["attempt"]

    def news(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of batches that others have done since they were last looked at."""
        for batch in sorted(self.folder.written() - self.complete):
            rows = self.look(batch) if batch < len(self.batches) else None
            if rows is not None:
                yield rows

    @property
    def done(self) -> bool:
        """Whether all batches are, as far as was looked."""
        return len(self.complete) == len(self.batches)

    def look(self, batch: int) -> list[dict[str, Any]] | None:
        """The rows of a batch that is done, in the order of its jobs; None where it is not."""
        rows = self.standing(batch)
        if len(rows) < len(self.batches[batch]):
            return None
        self.complete.add(batch)
        return [rows[job.id] for job in self.batches[batch]]


def work(folder: Folder, painter: Painter, ledger: Ledger, share: Share, *, stop: Callable[[], bool], progress: Progress) -> None:
    """Draws what is not done, until nothing is left to be taken or `stop` says so.

    Raises:
        WriteError: Something cannot be written; nothing is half there.
    """
    with _Writer(folder) as writer:
        for batch in _taken(folder, ledger, share, stop, progress):
            try:
                _draw(folder, painter, ledger, batch, writer, stop, progress)
            except Cancelled:
                writer.release(batch)
                break


def _taken(folder: Folder, ledger: Ledger, share: Share, stop: Callable[[], bool], progress: Progress) -> Iterator[int]:
    """Batches that are not done, locked."""
    left, looked = share.order(len(ledger.batches)), 0.0
    while left and not stop():
        busy = []
        for batch in left:
            if stop():
                return
            if time.monotonic() - looked > LOOK:
                looked = time.monotonic()
                for rows in ledger.news():
                    progress.batch(rows)
            if batch in ledger.complete:
                continue
            if not folder.take(batch):
                busy.append(batch)
                continue
            found = ledger.look(batch)
            if found is None:
                yield batch
            else:
                folder.release(batch)
                progress.batch(found)
        left = busy
        if left and not share.wait:
            return
        if left:
            time.sleep(POLL)


def _draw(
    folder: Folder, painter: Painter, ledger: Ledger, batch: int, writer: _Writer, stop: Callable[[], bool], progress: Progress
) -> None:
    """Draws one batch in its parts. A part that fails is cut into smaller ones, so that one bad job harms no other."""
    jobs, rows, tried = ledger.batches[batch], ledger.standing(batch), ledger.attempts(batch)
    size = folder.split(batch) or len(jobs)
    start = 0
    while start < len(jobs):
        part = jobs[start : start + size]
        if any(job.id not in rows for job in part):
            outcome = painted(painter, part, stop, progress.stepped)
            if isinstance(outcome, Failure) and len(part) > 1:
                size = (len(part) + 1) // 2 if outcome.memory else 1
                folder.record_split(batch, size, outcome.error)
                continue
            made = [failed(part[0], outcome.error)] if isinstance(outcome, Failure) else outcome
            for one in made:
                one.row |= {"batch": batch, "attempt": tried.get(one.job.id, 0) + 1}
                rows[one.job.id] = one.row
            writer.save(batch, made, [rows[job.id] for job in jobs if job.id in rows])
        start += len(part)
    ledger.complete.add(batch)
    writer.release(batch)
    progress.batch([rows[job.id] for job in jobs])


@dataclass(frozen=True)
class Failure:
    """Why a call came to nothing, and whether memory was short."""

    error: str
    memory: bool


def painted(painter: Painter, part: Sequence[Job], stop: Callable[[], bool], stepped: Callable[[int, int], None]) -> list[Made] | Failure:
    """What came of jobs that are drawn in one call, or why the call came to nothing.

    Raises:
        Cancelled: `stop` said so.
    """
    try:
        pictures = painter.paint(part, cancelled=stop, stepped=stepped)
        return [finished(painter, job, picture) for job, picture in zip(part, pictures, strict=True)]
    except Cancelled:
        raise
    except Exception as error:  # a pipeline may fail in any way
        failure = Failure(one_line(error), out_of_memory(error))
    if failure.memory:
        _give_back()  # here, where the traceback holds the call's tensors no more
    return failure


def _give_back() -> None:
    """What the failed call had, which its traceback held until now."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass
class Made:
    """What came of a job.

    Attributes:
        job: The job.
        row: Of the manifest; the hash is put in by `encoded`.
        picture: None where the job failed.
        settings: What is written into the file.
    """

    job: Job
    row: dict[str, Any]
    picture: Painted | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def encoded(self) -> bytes | None:
        """The file, None where there is no picture. The row's hash is of the pixels: width * height * 3 bytes of RGB, row by row."""
        if self.picture is None:
            return None
        self.row["sha256"] = hashlib.sha256(self.picture.image.tobytes()).hexdigest()
        return files.png(self.picture.image, self.job.prompt, self.settings)


def finished(painter: Painter, job: Job, picture: Painted) -> Made:
    """What came of a job that was drawn."""
    about = {"score": picture.score, "plan_hash": picture.plan_hash}
    row = {
        "id": job.id,
        "status": DONE,
        "path": f"images/{job.id}.png",
        "sha256": None,
        "seconds": picture.seconds,
        **about,
        "error": None,
        "warnings": list(picture.warnings),
        "prompt": job.prompt,
        "seed": job.seed,
        "width": picture.image.width,
        "height": picture.image.height,
    }
    return Made(job, row, picture, {**painter.settings(job), **about})


def failed(job: Job, error: str) -> Made:
    """What came of a job that failed."""
    row: dict[str, Any] = {
        "id": job.id,
        "status": FAILED,
        **dict.fromkeys(("path", "sha256", "seconds", "score", "plan_hash")),
        "error": error,
        "warnings": [],
        "prompt": job.prompt,
        "seed": job.seed,
        "width": job.width,
        "height": job.height,
    }
    return Made(job, row)


class _Writer:
    """Encodes and writes one part while the next is drawn, one after another in a thread of its own.

    What goes wrong there is raised here, at the next call, and nothing is written after it.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._thread = ThreadPoolExecutor(1, "hasten-batch-writer")
        self._under_way: list[Future[None]] = []
        self._broken = False

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._settle(0)
        finally:
            self._thread.shutdown()

    def save(self, batch: int, made: Sequence[Made], rows: list[dict[str, Any]]) -> None:
        """Has pictures written, and the batch's rows; see `Folder.save`."""
        self._settle(2)
        self._under_way.append(self._thread.submit(self._save, batch, made, rows))

    def release(self, batch: int) -> None:
        """Lets go of the batch once all of it is written."""
        self._under_way.append(self._thread.submit(self._release, batch))

    def _save(self, batch: int, made: Sequence[Made], rows: list[dict[str, Any]]) -> None:
        if self._broken:
            return
        try:
            files = {one.job.id: one.encoded() for one in made}
            self._folder.save(batch, {name: data for name, data in files.items() if data is not None}, rows)
        except BaseException:
            self._broken = True
            raise

    def _release(self, batch: int) -> None:
        if not self._broken:
            self._folder.release(batch)

    def _settle(self, most: int) -> None:
        """Waits until at most so many are under way."""
        while len(self._under_way) > most:
            self._under_way.pop(0).result()
