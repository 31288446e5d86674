"""One request while it is being served: its tickets, its client's patience, and the server's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Hashable, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from functools import partial
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from hasten.app.serving.errors import CLIENT_GONE, Refused
from hasten.app.serving.worker import Closed, QueueFull, Ticket, Worker

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class Visit(Generic[Item, Answer]):
    """Hands the work in, and follows it. What is not finished when the client leaves or time is over, is given up.

    Args:
        worker: Of the model.
        work: Keys and items.
        request: Whose client is waited for to leave; its body has been read.
        timeout: Seconds for everything; None for as long as it takes.

    Raises:
        Refused: The queue is full, or the server is going down.
    """

    def __init__(
        self, worker: Worker[Item, Answer], work: Sequence[tuple[Hashable, Item]], request: Request, timeout: float | None
    ) -> None:
        self._worker, self._request, self._timeout = worker, request, timeout
        self._began = time.monotonic()
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Queue[tuple[int, str | Future[Answer]]] = asyncio.Queue()
        self._tickets: list[Ticket[Item, Answer]] = [Ticket(item, key, tell=partial(self._post, i)) for i, (key, item) in enumerate(work)]
        for i, ticket in enumerate(self._tickets):
            ticket.future.add_done_callback(partial(self._post, i))
        try:
            worker.submit(self._tickets)
        except QueueFull as why:
            raise Refused(429, str(why), headers={"Retry-After": str(why.seconds)}) from None
        except Closed as why:
            raise going_down(str(why)) from None

    async def answers(self) -> list[Answer]:
        """All answers, in order.

        Raises:
            Refused: It takes too long, the client has left, or the work was refused.
        """
        found: dict[int, Answer] = {}
        async with aclosing(self.news()) as news:
            async for index, answer in news:
                if not isinstance(answer, str):
                    found[index] = answer.result()
        return [found[index] for index in range(len(self._tickets))]

    async def news(self) -> AsyncGenerator[tuple[int, str | Future[Answer]], None]:
        """Which item there is news of, and its text so far or, at last, its finished future.

        Raises:
            Refused: As `answers`.
        """
        gone = asyncio.ensure_future(self._client_gone())
        try:
            left = len(self._tickets)
            while left:
                index, news = await self._next(gone)
                if isinstance(news, Future):
                    left -= 1
                    _raise(news)
                yield index, news
        finally:
            gone.cancel()
            self.leave()

    def leave(self) -> None:
        """Gives up what is not finished."""
        self._worker.leave(self._tickets)

    async def _next(self, gone: asyncio.Future[None]) -> tuple[int, str | Future[Answer]]:
        patience = None if self._timeout is None else max(0.0, self._began + self._timeout - time.monotonic())
        coming = asyncio.ensure_future(self._news.get())
        try:
            either: set[asyncio.Future[Any]] = {coming, gone}
            await asyncio.wait(either, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                return coming.result()
        finally:
            coming.cancel()
        if gone.done():
            raise Refused(CLIENT_GONE, "the client has left")
        raise Refused(504, f"this took longer than {self._timeout:g} s and was given up")

    async def _client_gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    def _post(self, index: int, news: str | Future[Answer]) -> None:
        self._loop.call_soon_threadsafe(self._news.put_nowait, (index, news))


def going_down(message: str = "the server is going down") -> Refused:
    """The answer to whom comes while the server drains."""
    return Refused(503, message, headers={"Retry-After": "5"})


def _raise(future: Future[Answer]) -> None:
    """Raises what the future failed with, as an answer where it is one."""
    error = future.exception()
    if isinstance(error, Closed):
        raise going_down(str(error))
    if error is not None:
        raise error
