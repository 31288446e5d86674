"""A thread that does a model's work, and the queue in front of it: requests that fit together are done together.

Every picture and every answer is a ticket of its own. The oldest ticket goes next, and takes along what waits and has the same key.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from hasten.app.serving.metrics import Metrics

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class QueueFull(RuntimeError):
    """So many wait already that no more are taken.

    Args:
        seconds: After which it may be worth another try.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closed(RuntimeError):
    """The server is going down."""


class Left(RuntimeError):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class Ticket(Generic[Item, Answer]):
    """One piece of work, and somebody who waits for it.

    Attributes:
        item: What is to be done.
        key: Only tickets of equal keys are done in one batch.
        tell: Called, from the worker's thread, with the text so far where there is one.
        entered: When it was handed in, by `time.monotonic`.
        future: Gets the answer or the error.
    """

    item: Item
    key: Hashable
    tell: Callable[[str], None] = lambda text: None
    entered: float = field(default_factory=time.monotonic)
    future: Future[Answer] = field(default_factory=Future)
    _settling: threading.Lock = field(default_factory=threading.Lock)

    @property
    def wanted(self) -> bool:
        """Whether somebody still waits for it."""
        return not self.future.done()

    def settle(self, answer: Answer) -> None:
        """Hands the answer over, unless nobody waits for it."""
        with self._settling:
            if not self.future.done():
                self.future.set_result(answer)

    def fail(self, error: Exception) -> None:
        """Hands an error over, unless nobody waits for it."""
        with self._settling:
            if not self.future.done():
                self.future.set_exception(error)


Work = Callable[[Sequence[Ticket[Item, Answer]], Callable[[], bool]], None]
"""Settles tickets of one key. Asks, between two steps, whether all have been settled or given up, and raises `Left` then or returns."""


class Worker(Generic[Item, Answer]):
    """Does tickets in batches, one batch at a time, in a thread of its own.

    Args:
        name: The model's, for metrics.
        work: Does a batch.
        metrics: Where it is counted.
        queue: Tickets that may wait. The one request that finds room is taken whole.
        batch: The most tickets done together.
        wait: Seconds that a ticket waits for others to come along while its batch is not full.
    """

    def __init__(self, name: str, work: Work[Item, Answer], metrics: Metrics, *, queue: int, batch: int, wait: float) -> None:
        self.name = name
        self._work, self._metrics = work, metrics
        self._queue, self._batch, self._wait = queue, batch, wait
        self._waiting: deque[Ticket[Item, Answer]] = deque()
        self._running: list[Ticket[Item, Answer]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._pace = 1.0
        metrics.watch(name, lambda: self.waiting)
        self._thread = threading.Thread(target=self._run, name=f"hasten-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Tickets in the queue."""
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being done."""
        with self._changed:
            return not self._waiting and not self._running

    def submit(self, tickets: Sequence[Ticket[Item, Answer]]) -> None:
        """Puts tickets in the queue.

        Raises:
            QueueFull: There is no room.
            Closed: No more are taken.
        """
        with self._changed:
            if self._closed:
                raise Closed("the server is going down")
            if len(self._waiting) >= self._queue:
                raise QueueFull(max(1, math.ceil(self._pace * len(self._waiting) / self._batch)))
            self._waiting.extend(tickets)
            self._changed.notify_all()

    def leave(self, tickets: Sequence[Ticket[Item, Answer]]) -> None:
        """Gives tickets up: those that wait leave the queue, and what is being done for nobody else stops at the next step."""
        for ticket in tickets:
            ticket.fail(Left("nobody waits for it"))
        with self._changed:
            self._forget()

    def close(self, seconds: float) -> None:
        """Takes no more, gives up what is there, and waits for the thread to end.

        Args:
            seconds: At most.
        """
        with self._changed:
            self._closed = True
            for ticket in (*self._waiting, *self._running):
                ticket.fail(Closed("the server is going down"))
            self._forget()
        self._thread.join(seconds)

    def _forget(self) -> None:
        self._waiting = deque(ticket for ticket in self._waiting if ticket.wanted)
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._running = []
                while not (batch := self._next()):
                    if self._closed:
                        return
                self._running = batch
            self._do(batch)
            del batch  # or pictures would live on until the next request

    def _next(self) -> list[Ticket[Item, Answer]]:
        """Takes a batch from the queue; without one waits for something to change, and returns nothing."""
        if not self._waiting:
            if not self._closed:
                self._changed.wait()
            return []
        head = self._waiting[0]
        batch = [ticket for ticket in self._waiting if ticket.key == head.key][: self._batch]
        patience = head.entered + self._wait - time.monotonic()
        if len(batch) < self._batch and patience > 0:
            self._changed.wait(patience)
            return []
        taken = set(map(id, batch))
        self._waiting = deque(ticket for ticket in self._waiting if id(ticket) not in taken)
        return batch

    def _do(self, batch: Sequence[Ticket[Item, Answer]]) -> None:
        began = time.monotonic()
        self._metrics.begun(self.name, [began - ticket.entered for ticket in batch])
        try:
            self._work(batch, lambda: not any(ticket.wanted for ticket in batch))
        except Left:
            pass
        except Exception as error:
            self._alone(batch, error)
        for ticket in batch:
            ticket.fail(RuntimeError(f"the work on {self.name} ended without an answer"))
        seconds = time.monotonic() - began
        self._pace += 0.3 * (seconds - self._pace)
        self._metrics.ended(self.name, seconds)

    def _alone(self, batch: Sequence[Ticket[Item, Answer]], error: Exception) -> None:
        """Does each by itself, so that what is wrong with one, or too much for the memory together, is not blamed on the others."""
        if len(batch) == 1:
            batch[0].fail(error)
            return
        for ticket in batch:
            if ticket.wanted:
                try:
                    self._work([ticket], lambda ticket=ticket: not ticket.wanted)  # type: ignore[misc]
                except Left:
                    pass
                except Exception as own:
                    ticket.fail(own)
