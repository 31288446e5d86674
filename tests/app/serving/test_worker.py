"""The queue: who is done with whom, in which order, and what becomes of those who leave."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hasten.app.serving.metrics import Metrics
from hasten.app.serving.worker import Closed, Left, QueueFull, Ticket, Worker
from tests.app.serving.stand_ins import until

Tickets = Sequence[Ticket[int, int]]
REFUSED = -1


class Doing:
    """Squares numbers, once its gate is open; one number is refused, and a batch with more than `room` members is too much."""

    def __init__(self, room: int = 100) -> None:
        self.gate, self.batches, self.room = threading.Event(), list[list[int]](), room
        self.stopped = 0

    def __call__(self, tickets: Tickets, cancelled: Callable[[], bool]) -> None:
        self.batches.append([ticket.item for ticket in tickets])
        while not self.gate.wait(0.002):
            if cancelled():
                self.stopped += 1
                raise Left
        if len(tickets) > self.room:
            raise MemoryError("too much")
        for ticket in tickets:
            if ticket.item == REFUSED:
                raise ValueError("this one is refused")
        for ticket in tickets:
            ticket.settle(ticket.item**2)


def worker(doing: Doing, *, queue: int = 100, batch: int = 4, wait: float = 0.0) -> Worker[int, int]:
    return Worker("numbers", doing, Metrics(), queue=queue, batch=batch, wait=wait)


def tickets(*items: int, key: str = "") -> list[Ticket[int, int]]:
    return [Ticket(item, key) for item in items]


@given(st.text("abc", min_size=1, max_size=30), st.integers(1, 5))
@settings(max_examples=50)
def test_batches_are_of_one_key_and_nobody_is_overtaken_by_his_like(work: str, batch: int) -> None:
    doing = Doing()
    first = Ticket[int, int](99, "first")
    found = worker(doing, batch=batch)
    found.submit([first])
    until(lambda: bool(doing.batches))
    waiting = [Ticket[int, int](i, key) for i, key in enumerate(work)]
    found.submit(waiting)
    doing.gate.set()
    assert [ticket.future.result(10) for ticket in waiting] == [i**2 for i in range(len(work))]
    batches = doing.batches[1:]
    assert sorted(i for members in batches for i in members) == list(range(len(work)))
    for members in batches:
        (key,) = {work[i] for i in members}
        assert len(members) <= batch and members == sorted(members)
        # It began with the oldest that waited, and it is full, or nothing else of its key was left.
        later = [i for other in batches[batches.index(members) + 1 :] for i in other]
        assert all(members[0] < i for i in later)
        assert len(members) == batch or not any(work[i] == key for i in later)
    found.close(10)


def test_a_ticket_waits_for_others_but_a_full_batch_does_not() -> None:
    doing = Doing()
    doing.gate.set()
    found = worker(doing, batch=3, wait=0.5)
    for ticket in (waiting := tickets(1, 2)):
        found.submit([ticket])
    assert [ticket.future.result(10) for ticket in waiting] == [1, 4] and doing.batches == [[1, 2]]
    began = waiting[0].entered
    full = tickets(3, 4, 5)
    found.submit(full)
    assert [ticket.future.result(0.4) for ticket in full] == [9, 16, 25] and full[0].entered > began
    found.close(10)


def test_a_full_queue_says_when_to_come_again() -> None:
    doing = Doing()
    found = worker(doing, queue=2, batch=1)
    found.submit(tickets(1))
    until(lambda: found.waiting == 0)
    found.submit(tickets(2, 3))
    with pytest.raises(QueueFull, match="try again in") as refused:
        found.submit(tickets(4))
    assert refused.value.seconds >= 1 and found.waiting == 2
    doing.gate.set()
    until(lambda: found.idle)
    found.submit(tickets(4))
    until(lambda: found.idle)
    assert doing.batches == [[1], [2], [3], [4]]
    found.close(10)


def test_who_leaves_frees_his_place_and_stops_the_work_only_where_he_is_alone() -> None:
    doing = Doing()
    found = worker(doing, queue=2)
    together = tickets(1, 2)
    found.submit(together)
    until(lambda: doing.batches == [[1, 2]])
    waiting = tickets(3, 4)
    found.submit(waiting)
    found.leave(waiting[:1])
    assert found.waiting == 1
    found.leave(together[:1])
    assert not doing.stopped
    found.leave(together[1:])
    until(lambda: doing.batches[1:] == [[4]])
    assert doing.stopped == 1
    doing.gate.set()
    assert waiting[1].future.result(10) == 16
    with pytest.raises(Left):
        together[0].future.result(0)
    found.close(10)


def test_what_is_wrong_with_one_is_not_blamed_on_the_others() -> None:
    doing = Doing(room=2)
    doing.gate.set()
    found = worker(doing, wait=0.2)
    work = tickets(1, REFUSED, 2, 3)
    found.submit(work)
    assert [work[i].future.result(10) for i in (0, 2, 3)] == [1, 4, 9]
    with pytest.raises(ValueError, match="this one is refused"):
        work[1].future.result(10)
    assert doing.batches == [[1, REFUSED, 2, 3], [1], [REFUSED], [2], [3]]
    found.close(10)


def test_a_worker_that_forgets_a_ticket_leaves_nobody_waiting() -> None:
    found: Worker[int, int] = Worker("idle", lambda batch, cancelled: None, Metrics(), queue=1, batch=1, wait=0)
    (ticket,) = tickets(1)
    found.submit([ticket])
    with pytest.raises(RuntimeError, match="the work on idle ended without an answer"):
        ticket.future.result(10)
    found.close(10)


def test_closing_gives_up_what_is_there_and_takes_no_more() -> None:
    doing = Doing()
    found = worker(doing)
    running, waiting = tickets(1), tickets(2, key="other")
    found.submit(running)
    until(lambda: bool(doing.batches))
    found.submit(waiting)
    found.close(10)
    for ticket in (*running, *waiting):
        with pytest.raises(Closed):
            ticket.future.result(0)
    assert doing.stopped == 1 and doing.batches == [[1]] and found.idle
    with pytest.raises(Closed):
        found.submit(tickets(3))
