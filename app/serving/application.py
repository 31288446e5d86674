"""The routes: OpenAI's for pictures and text, and those that keep a server running."""

from __future__ import annotations

import base64
import time
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from hasten._version import __version__
from hasten.app.batch.jobs import Job
from hasten.app.drawing import check_number
from hasten.app.serving import errors, schemas
from hasten.app.serving.answering import EVENT_SCHEMA, EVENTS, Chat, Completions, Reply
from hasten.app.serving.guard import Guard
from hasten.app.serving.images import Studio
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.openapi import REFUSALS, described
from hasten.app.serving.schemas import ChatRequest, CompletionRequest, ImageRequest
from hasten.app.serving.texts import Answer, Desk, Question
from hasten.app.serving.visit import Visit, going_down
from hasten.app.serving.worker import Worker


@dataclass(frozen=True)
class Room:
    """How much a server takes.

    Attributes:
        queue: Pictures or answers that may wait, for each model.
        batch: Done together at most.
        wait: Seconds that one waits for others to come along.
        timeout: Seconds for a request; None for as long as it takes.
        body: Bytes of a request.

    Raises:
        BadInput: One of them is too small.
    """

    queue: int = 64
    batch: int = 8
    wait: float = 0.02
    timeout: float | None = None
    body: int = 1 << 20

    def __post_init__(self) -> None:
        for name, least in (("queue", 1), ("batch", 1), ("body", 1), ("wait", 0), ("timeout", 0)):
            check_number(name, getattr(self, name), least, whole=least == 1)


@dataclass
class Service:
    """Models with their workers, and whether the server is going down.

    Attributes:
        studio: For pictures; None where none are drawn.
        desk: For text; None where none is written.
        metrics: Of both.
        room: How much is taken.
        key: The API key; None where anybody may ask.
        draining: Whether new work is refused.
    """

    studio: Studio | None
    desk: Desk | None
    metrics: Metrics
    room: Room = field(default_factory=Room)
    key: str | None = None
    draining: bool = False
    images: Worker[Job, bytes] | None = field(init=False, default=None)
    texts: Worker[Question, Answer] | None = field(init=False, default=None)
    began: int = field(init=False, default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        room: dict[str, Any] = {"queue": self.room.queue, "batch": self.room.batch, "wait": self.room.wait}
        if self.studio is not None:
            self.images = Worker(self.studio.name, self.studio.work, self.metrics, **room)
        if self.desk is not None:
            self.texts = Worker(self.desk.name, self.desk.work, self.metrics, **room)

    @property
    def workers(self) -> list[Worker[Any, Any]]:
        """Those that there are."""
        return [worker for worker in (self.images, self.texts) if worker is not None]

    @property
    def names(self) -> dict[str, list[str]]:
        """Models by what they are for."""
        return {kind: [part.name] for kind, part in (("images", self.studio), ("texts", self.desk)) if part is not None}

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is being done."""
        return all(worker.idle for worker in self.workers)

    def close(self, seconds: float = 5.0) -> None:
        """Gives up what is left.

        Args:
            seconds: That each worker's thread may take to end.
        """
        for worker in self.workers:
            worker.close(seconds)

    def check(self, kind: str, model: str | None) -> None:
        """Refuses work while the server is going down, and models that are not here.

        Raises:
            Refused: So it is.
        """
        if self.draining:
            raise going_down()
        names = self.names.get(kind, [])
        if not names or (model is not None and model not in names):
            what = {"images": "pictures", "texts": "text"}[kind]
            here = f"for {what} there is {', '.join(names)}" if names else f"this server has none for {what}"
            missing = f"there is no model {model!r}: " if model is not None else ""
            raise errors.Refused(404, missing + here, param="model", code="model_not_found")


def create_app(service: Service) -> FastAPI:
    """The application over a service, for any ASGI server."""
    app = FastAPI(
        title="hasten",
        version=__version__,
        summary="Pictures and text from diffusion models, in the form of OpenAI's API.",
        docs_url=None,  # these pages would load scripts from a CDN
        redoc_url=None,
        responses=REFUSALS,
    )
    _add_operations(app, service)
    _add_images(app, service)
    _add_texts(app, service)
    paths = {getattr(route, "path", "") for route in app.routes}
    app.add_middleware(Guard, key=service.key, body=service.room.body, metrics=service.metrics, paths=paths)
    keys = {
        "/v1/images/generations": list(ImageRequest.model_fields),
        "/v1/completions": list(CompletionRequest.model_fields),
        "/v1/chat/completions": list(ChatRequest.model_fields),
    }
    app.add_exception_handler(HTTPException, errors.refused)
    app.add_exception_handler(RequestValidationError, errors.invalid(keys))
    app.add_exception_handler(Exception, errors.failed)
    app.openapi = described(app, service.names, service.key is not None)  # type: ignore[method-assign]
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_model=schemas.Status, summary="Whether the server lives")
    async def health() -> Any:
        return {"status": "ok"}

    @app.get("/ready", response_model=schemas.Status, summary="Whether it takes work")
    async def ready() -> Any:
        if service.draining:
            raise going_down()
        return {"status": "ok"}

    @app.get("/metrics", response_class=PlainTextResponse, summary="For Prometheus", responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Any:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models", response_model=schemas.ModelList, summary="Models that are served")
    async def models() -> Any:
        names = [name for kind in service.names.values() for name in kind]
        return schemas.ModelList(data=[schemas.ModelCard(id=name, created=service.began) for name in names])


def _add_images(app: FastAPI, service: Service) -> None:
    @app.post("/v1/images/generations", response_model=schemas.ImageResponse, summary="Draw pictures")
    async def draw(body: ImageRequest, request: Request) -> Any:
        service.check("images", body.model)
        assert service.studio is not None and service.images is not None
        jobs = service.studio.jobs(body)
        visit = Visit(service.images, [(job.key(), job) for job in jobs], request, service.room.timeout)
        pictures = await visit.answers()
        data = [{"b64_json": base64.b64encode(png).decode(), "seed": job.seed} for png, job in zip(pictures, jobs, strict=True)]
        return {"created": int(time.time()), "data": data}


def _add_texts(app: FastAPI, service: Service) -> None:
    streamed: dict[int | str, dict[str, Any]] = {200: {"content": {EVENTS: {"schema": EVENT_SCHEMA}}}}

    @app.post("/v1/completions", response_model=schemas.CompletionResponse, responses=streamed, summary="Continue prompts")
    async def complete(body: CompletionRequest, request: Request) -> Any:
        service.check("texts", body.model)
        assert service.desk is not None and service.texts is not None
        reply = Reply(Completions(), service.desk, body, service.desk.asked(body))
        return await reply.response(Visit(service.texts, reply.work, request, service.room.timeout))

    @app.post("/v1/chat/completions", response_model=schemas.ChatResponse, responses=streamed, summary="Answer a chat")
    async def chat(body: ChatRequest, request: Request) -> Any:
        service.check("texts", body.model)
        assert service.desk is not None and service.texts is not None
        reply = Reply(Chat(), service.desk, body, service.desk.chatted(body))
        return await reply.response(Visit(service.texts, reply.work, request, service.room.timeout))
