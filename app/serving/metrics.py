"""What Prometheus reads: a registry of the server's own, so that two servers in one process do not mix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """Counts requests, batches, seconds, pictures and tokens."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        registry, model = self._registry, ["model"]
        self._requests = Counter("hasten_requests", "Requests by route and HTTP status.", ["route", "code"], registry=registry)
        self._waiting = Gauge("hasten_queue_length", "Pictures and answers that wait.", model, registry=registry)
        self._sizes = Histogram("hasten_batch_size", "Done together.", model, buckets=SIZES, registry=registry)
        self._queued = Histogram(
            "hasten_queue_seconds", "From entering to the work's beginning.", model, buckets=SECONDS, registry=registry
        )
        self._worked = Histogram("hasten_work_seconds", "Of a batch.", model, buckets=SECONDS, registry=registry)
        self._pictures = Counter("hasten_pictures", "Drawn and handed over.", model, registry=registry)
        self._tokens = Counter("hasten_tokens", "Of answers, end-of-text included.", model, registry=registry)
        self._saved = Counter("hasten_forwards_saved", "Tokens of answers beyond one for each step.", model, registry=registry)

    def answered(self, route: str, status: int) -> None:
        """A request has been answered."""
        self._requests.labels(route, str(status)).inc()

    def watch(self, model: str, waiting: Callable[[], int]) -> None:
        """Asks `waiting` for the length of the queue whenever it is read."""
        self._waiting.labels(model).set_function(waiting)

    def begun(self, model: str, waited: Sequence[float]) -> None:
        """A batch begins; each of its members waited so many seconds."""
        self._sizes.labels(model).observe(len(waited))
        for seconds in waited:
            self._queued.labels(model).observe(seconds)

    def ended(self, model: str, seconds: float) -> None:
        """A batch has ended."""
        self._worked.labels(model).observe(seconds)

    def drawn(self, model: str, pictures: int) -> None:
        """Pictures are ready."""
        self._pictures.labels(model).inc(pictures)

    def written(self, model: str, tokens: int, steps: int) -> None:
        """An answer of so many tokens took so many steps."""
        self._tokens.labels(model).inc(tokens)
        self._saved.labels(model).inc(max(0, tokens - steps))

    def page(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
