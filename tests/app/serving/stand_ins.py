"""A painter whose work ends when a test says so, and servers that listen."""

from __future__ import annotations

import io
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from PIL import Image

from hasten.app.batch.jobs import Job
from hasten.app.batch.painter import Cancelled, Painted
from hasten.app.serving.application import Room, Service
from hasten.app.serving.images import Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.server import DrainingServer


def colour(job: Job) -> tuple[int, int, int]:
    """What a stand-in paints: it tells prompts and seeds apart."""
    return (len(job.prompt) % 256, job.seed % 256, (job.seed // 256) % 256)


class GatedPainter:
    """Paints each job in one colour, as soon as its gate is open, and looks every few milliseconds whether it is wanted still."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.began: list[list[Job]] = []
        self.cancelled = 0

    def paint(self, jobs: Sequence[Job], *, cancelled: Callable[[], bool] | None = None) -> list[Painted]:
        self.began.append(list(jobs))
        for job in jobs:
            if "broken" in job.prompt:
                raise RuntimeError("this one cannot be painted")
        while not self.gate.wait(0.005):
            if cancelled is not None and cancelled():
                self.cancelled += 1
                raise Cancelled
        return [Painted(Image.new("RGB", (8, 8), colour(job)), 0.0, None, None, None) for job in jobs]

    def settings(self, job: Job) -> dict[str, Any]:
        return {**job.to_row(), "model": "/a/secret/folder"}


def gated(room: Room | None = None, key: str | None = None, **studio: Any) -> tuple[GatedPainter, Service]:
    """A service that draws with a `GatedPainter`."""
    painter, metrics = GatedPainter(), Metrics()
    return painter, Service(Studio("gated", painter, metrics, **studio), None, metrics, room or Room(), key)


@contextmanager
def listening(service: Service, drain_seconds: float = 5.0) -> Iterator[tuple[str, DrainingServer]]:
    """Serves on a free port in a thread, and yields the URL and the server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = DrainingServer(service, drain_seconds)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [free]}, daemon=True)
        thread.start()
        until(lambda: server.started)
        try:
            yield f"http://127.0.0.1:{free.getsockname()[1]}/v1", server
        finally:
            server.should_exit = server.force_exit = True
            service.close()
            thread.join(10)
            assert not thread.is_alive()


def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Waits for something to become true."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)


def opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
