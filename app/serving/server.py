"""`hasten serve`: models are loaded, then served until a signal; what was taken on by then is finished."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from hasten.app.batch.jobs import CACHING, method_of
from hasten.app.drawing import check_number
from hasten.app.errors import BadInput
from hasten.app.models import choose_model
from hasten.app.serving.application import Room, Service, create_app
from hasten.app.serving.images import Frame, Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.texts import Desk

if TYPE_CHECKING:
    from hasten.accelerators.decoding.schedule import Schedule

LOCAL = ("127.0.0.1", "::1", "localhost")
GRACE = 5
"""Seconds for the last bytes of answers to be sent when all work is done."""
NONE = "none"
"""The model's name where none is to be served."""


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says; None where it says nothing.

    Attributes:
        model, text_model: As `--model` of `hasten generate` and `hasten text` name them, or "none".
        host, port: Where to listen; port 0 takes a free one.
        api_key: What clients must show; that of HASTEN_API_KEY where it is None.
        queue: Pictures or answers that may wait, for each model.
        max_batch: Of them, done together.
        max_wait_ms: How long one waits for others to come along.
        timeout: Seconds for a request.
        max_body: Bytes of a request.
        drain_seconds: For what is running and waiting when the server is told to stop.
        caching: Options of `hasten generate` under Caching, by name.
        steps, guidance: Where a request says nothing.
        max_steps, max_pixels: Of a picture.
        schedule, settings: Of the text model.
        block_length: Of the text model.
        dtype, device: Of both models.
        trust_remote_code: Whether code beside the text model's weights may be run.
    """

    model: str = "shapes"
    text_model: str = "puzzles"
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    queue: int = 64
    max_batch: int = 8
    max_wait_ms: float = 20.0
    timeout: float | None = None
    max_body: int = 1 << 20
    drain_seconds: float = 30.0
    caching: dict[str, Any] | None = None
    steps: int | None = None
    guidance: float | None = None
    max_steps: int = 250
    max_pixels: int | None = None
    schedule: str = "credit"
    settings: Sequence[str] = ()
    block_length: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    trust_remote_code: bool = False


def serve(options: ServeOptions) -> int:
    """Serves until a signal, and returns the exit code.

    Raises:
        BadInput: An option is not allowed, a model cannot be loaded, or the port cannot be listened on; nothing was served.
    """
    schedule = check(options)
    key = _key(options.api_key)
    listening = _listen(options.host, options.port)
    with listening:
        service = _service(options, schedule, key)
        if key is None and options.host not in LOCAL:
            print(f"warning: whoever reaches {options.host} may use this server; --api-key asks for a key", file=sys.stderr)
        server = DrainingServer(service, options.drain_seconds)
        address = f"[{options.host}]" if ":" in options.host else options.host
        names = " and ".join(name for kind in service.names.values() for name in kind)
        print(f"serving {names} at http://{address}:{listening.getsockname()[1]}/v1", file=sys.stderr, flush=True)
        server.run(sockets=[listening])
    service.close()
    return 0


def check(options: ServeOptions) -> Schedule | None:
    """Checks the options without loading a model, and returns the text model's schedule.

    Raises:
        BadInput: One of them is not allowed.
        PlanError: The plan file is none.
    """
    from hasten.accelerators.decoding.freedave import FreeDave
    from hasten.app.text import schedule_of

    for option, value, least in (
        ("--queue", options.queue, 1), ("--max-batch", options.max_batch, 1), ("--steps", options.steps, 1),
        ("--max-steps", options.max_steps, 1), ("--max-pixels", options.max_pixels, 1), ("--max-body", options.max_body, 1),
    ):  # fmt: skip
        check_number(option, value, least, whole=True)
    for option, seconds in (
        ("--max-wait-ms", options.max_wait_ms), ("--timeout", options.timeout), ("--drain-seconds", options.drain_seconds),
        ("--guidance", options.guidance),
    ):  # fmt: skip
        check_number(option, seconds, 0)
    if not 0 <= options.port < 2**16:
        raise BadInput(f"--port must be a number from 0 to 65535, not {options.port}")
    if options.steps is not None and options.steps > options.max_steps:
        raise BadInput(f"--steps must be at most --max-steps, {options.max_steps}, not {options.steps}")
    if options.model == options.text_model == NONE:
        raise BadInput("--model and --text-model must not both be none: there would be nothing to serve")
    if options.model != NONE:
        choose_model(options.model)
        method_of(options.caching or {}, default="auto")
    if options.text_model == NONE:
        return None
    schedule = schedule_of(options.schedule, options.settings)
    if isinstance(schedule, FreeDave):
        raise BadInput("--schedule must not be freedave here: it takes several steps at once, and answers could not be streamed")
    return schedule


def _key(given: str | None) -> str | None:
    key = given if given is not None else os.environ.get("HASTEN_API_KEY") or None
    if key is not None and not (0 < len(key) <= 500 and key.isascii() and key.isprintable() and " " not in key):
        raise BadInput("--api-key must be 1 to 500 printable ASCII characters without spaces")
    return key


def _listen(host: str, port: int) -> socket.socket:
    """A socket that is bound before models are loaded: minutes later is late to hear that the port is taken."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except OSError:
            listening.close()
            raise
    except OSError as why:
        raise BadInput(f"--host {host} --port {port} cannot be listened on: {why.strerror or why}") from None
    return listening


def _service(options: ServeOptions, schedule: Schedule | None, key: str | None) -> Service:
    metrics = Metrics()
    studio = _studio(options, metrics) if options.model != NONE else None
    desk = _desk(options, schedule, metrics) if schedule is not None else None
    if studio is not None and desk is not None and studio.name == desk.name:
        raise BadInput(f"--model and --text-model must have different names, not both {studio.name}")
    room = Room(options.queue, options.max_batch, options.max_wait_ms / 1000, options.timeout, options.max_body)
    return Service(studio, desk, metrics, room, key)


def _studio(options: ServeOptions, metrics: Metrics) -> Studio:
    from hasten.app.batch.painter import Painter

    painter = Painter(options.model, options.dtype, options.device, score=None)
    caching = options.caching or {}
    assert set(caching) <= set(CACHING)
    defaults = {"steps": options.steps, "guidance": options.guidance, **caching}
    frame = Frame.of(painter, options.max_pixels, options.max_steps)
    return Studio(painter.model.choice.title, painter, metrics, defaults, frame)


def _desk(options: ServeOptions, schedule: Schedule, metrics: Metrics) -> Desk:
    from hasten.app.text import TextOptions, loaded

    model = options.text_model
    pipe = loaded(
        TextOptions(
            model, options.schedule, options.settings, block_length=options.block_length, dtype=options.dtype, device=options.device,
            trust_remote_code=options.trust_remote_code,
        ),
        schedule,
    )  # fmt: skip
    length = 128
    if model == "puzzles":
        from hasten.pipelines.zoo.puzzles import GEN_LENGTH

        length = GEN_LENGTH
    name = Path(model).resolve().name if model != "puzzles" and Path(model).exists() else model
    return Desk(name, pipe, metrics, length)


class DrainingServer(uvicorn.Server):
    """Stops in two steps: refuses new work until what was taken on is done, then closes.

    While it drains it still listens, so that a load balancer reads at /ready that it should go elsewhere. A second signal gives up what is
    left, a third does not even say so to the clients.

    Args:
        service: What is served.
        seconds: For draining, at most.
    """

    def __init__(self, service: Service, seconds: float) -> None:
        app = create_app(service)
        # Without the lifespan protocol nothing of FastAPI's telemetry is ever configured from the environment.
        super().__init__(
            uvicorn.Config(
                app, lifespan="off", log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=GRACE
            )
        )  # fmt: skip
        self._service, self._seconds = service, seconds
        self._told: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain at the first signal; uvicorn would re-raise it at the end, and the exit code would not be 0."""
        if self._told is None:
            self._told = time.monotonic()
            self._service.draining = True
        elif self._seconds > 0 and not self.should_exit:
            self._seconds = 0.0
        else:
            self.should_exit = self.force_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Looks, ten times a second, whether it is time to go."""
        if self._told is not None and not self.should_exit:
            over = time.monotonic() - self._told >= self._seconds
            if over:
                self._service.close(0)
            self.should_exit = over or self._service.idle
        return await super().on_tick(counter)
