"""How answers are told: whole, or piece by piece as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Hashable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.responses import Response, StreamingResponse

from hasten._version import __version__
from hasten.app.serving.errors import Refused, unexpected
from hasten.app.serving.schemas import Text
from hasten.app.serving.texts import Answer, Desk, Question
from hasten.app.serving.visit import Visit

EVENTS = "text/event-stream"
EVENT_SCHEMA = {
    "type": "object",
    "description": "Of each event where the request says stream.",
    "required": ["data"],
    "properties": {"data": {"type": "string", "description": "A chunk as JSON, or [DONE] at the end."}},
}


class Form(Protocol):
    """How the answers of a route look.

    Attributes:
        prefix: Of ids.
        whole, piece: The kind of object that an answer and a chunk of it say that they are.
    """

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""

    def first(self, index: int) -> list[dict[str, Any]]:
        """What a stream says before anything else."""

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """More of an answer."""


class Completions:
    """Answers of /v1/completions."""

    prefix, whole, piece = "cmpl", "text_completion", "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        return self.delta(index, answer.text, answer.finish)

    def first(self, index: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """More of an answer."""
        return {"index": index, "text": text, "finish_reason": finish, "logprobs": None}


class Chat:
    """Answers of /v1/chat/completions."""

    prefix, whole, piece = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """A whole answer."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        return {"index": index, "message": message, "finish_reason": answer.finish, "logprobs": None}

    def first(self, index: int) -> list[dict[str, Any]]:
        """Whose message it is."""
        return [{"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None, "logprobs": None}]

    def delta(self, index: int, text: str, finish: str | None) -> dict[str, Any]:
        """More of an answer."""
        return {"index": index, "delta": {"content": text} if text else {}, "finish_reason": finish, "logprobs": None}


@dataclass(frozen=True)
class Reply:
    """What is sent for one request.

    Attributes:
        form: Of the route.
        desk: Where it is answered.
        request: Its body.
        questions: What it asks.
    """

    form: Form
    desk: Desk
    request: Text
    questions: Sequence[Question]
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)
    _created: int = field(default_factory=lambda: int(time.time()))

    @property
    def work(self) -> list[tuple[Hashable, Question]]:
        """For the worker."""
        return [(question.key(), question) for question in self.questions]

    async def response(self, visit: Visit[Question, Answer]) -> dict[str, Any] | Response:
        """The answer, whole, or a stream that has begun.

        Raises:
            Refused: As `Visit.answers`.
        """
        if self.request.stream:
            return _Stream(self._stream(visit), visit)
        answers = await visit.answers()
        choices = [self.form.choice(i, answer) for i, answer in enumerate(answers)]
        return {**self._head(self.form.whole), "choices": choices, "usage": self._usage(answers)}

    async def _stream(self, visit: Visit[Question, Answer]) -> AsyncIterator[str]:
        told: dict[int, str] = {}
        answers: dict[int, Answer] = {}
        try:
            async with aclosing(visit.news()) as news:
                for index in range(len(self.questions)):
                    for choice in self.form.first(index):
                        yield self._chunk([choice])
                async for index, found in news:
                    if isinstance(found, str):
                        text, finish = found, None
                    else:
                        answers[index] = found.result()
                        text, finish = answers[index].text, answers[index].finish
                    more, told[index] = text[len(told.get(index, "")) :], text
                    if more or finish:
                        yield self._chunk([self.form.delta(index, more, finish)])
        except Refused as why:
            yield _event(why.body())
            return
        except Exception as why:
            yield _event(unexpected(why).body())
            raise  # the status has been sent; the server's log gets the error
        if self._usage_wanted:
            yield self._chunk([], self._usage(list(answers.values())))
        yield "data: [DONE]\n\n"

    @property
    def _usage_wanted(self) -> bool:
        options = self.request.stream_options
        return options is not None and options.include_usage

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.form.prefix}-{self._id}", "object": kind, "created": self._created, "model": self.desk.name,
            "system_fingerprint": f"hasten-{__version__}", "seed": self.questions[0].seed,
        }  # fmt: skip

    def _usage(self, answers: Sequence[Answer]) -> dict[str, int]:
        # As OpenAI counts: a prompt once, however many answers it gets.
        prompts = sum(len(question.tokens) for question in self.questions[:: self.request.n or 1])
        written = sum(answer.tokens for answer in answers)
        return {"prompt_tokens": prompts, "completion_tokens": written, "total_tokens": prompts + written}

    def _chunk(self, choices: Sequence[Mapping[str, Any]], usage: Mapping[str, int] | None = None) -> str:
        told = {"usage": usage} if self._usage_wanted else {}
        return _event({**self._head(self.form.piece), "choices": list(choices), **told})


class _Stream(StreamingResponse):
    """Gives the visit up also where the client leaves before the first event."""

    def __init__(self, events: AsyncIterator[str], visit: Visit[Question, Answer]) -> None:
        # A proxy that collects events before it passes them on would take their point away.
        super().__init__(events, media_type=EVENTS, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._visit = visit

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Sends it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.leave()


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
