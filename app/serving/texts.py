"""Answers for the endpoint: what is final is told from the left, whatever the order in which tokens are committed."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hasten.accelerators.decoding.engine import FINAL
from hasten.accelerators.decoding.geometry import FixedBlocks
from hasten.app.serving.errors import Refused
from hasten.app.serving.images import SEEDS
from hasten.app.serving.metrics import Metrics
from hasten.app.serving.worker import Left, Ticket

if TYPE_CHECKING:
    from hasten.app.serving.schemas import ChatRequest, CompletionRequest, Text
    from hasten.pipelines.text import TextOutput, TextPipeline, TextUpdate


@dataclass(frozen=True)
class Question:
    """One answer that is wanted.

    Attributes:
        tokens: Of the prompt.
        most: Tokens of the answer at most.
        length: The same, rounded up to whole blocks.
        temperature, seed: Of the noise.
        stop: Texts in front of which the answer ends.
    """

    tokens: tuple[int, ...]
    most: int
    length: int
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()

    def key(self) -> Hashable:
        """What must be equal for questions to be answered in one batch."""
        return self.length, self.temperature


@dataclass(frozen=True)
class Answer:
    """What came of a question.

    Attributes:
        text: Without special tokens.
        tokens: How many there are, end-of-text included.
        finish: "stop" at an end-of-text or a stop text, "length" where there was no room for more.
    """

    text: str
    tokens: int
    finish: str


@dataclass(frozen=True)
class Desk:
    """Turns requests into questions, and answers them.

    Attributes:
        name: The model's.
        pipe: Answers; used by the worker's thread alone, but for its tokenizer.
        metrics: Where tokens are counted.
        length: Tokens of an answer where a request names no number.
    """

    name: str
    pipe: TextPipeline
    metrics: Metrics
    length: int = 128

    def asked(self, request: CompletionRequest) -> list[Question]:
        """The questions of a request: n for its first prompt, n for the next.

        Raises:
            Refused: Something in it is not allowed.
        """
        prompts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        return self._questions(request, [self._encoded(prompt) for prompt in prompts], request.max_tokens, "max_tokens")

    def chatted(self, request: ChatRequest) -> list[Question]:
        """The questions of a request about a chat.

        Raises:
            Refused: Something in it is not allowed.
        """
        if request.max_tokens is not None and request.max_completion_tokens is not None:
            raise Refused(400, "max_completion_tokens says what max_tokens says: give one of them", param="max_tokens")
        named = "max_tokens" if request.max_tokens is not None else "max_completion_tokens"
        return self._questions(request, [self._chat(request)], request.max_tokens or request.max_completion_tokens, named)

    def work(self, tickets: Sequence[Ticket[Question, Answer]], cancelled: Callable[[], bool]) -> None:
        """Answers a batch, telling each ticket its text as it grows.

        Raises:
            Left: Nobody waits for it any more.
        """
        questions = [ticket.item for ticket in tickets]
        updates: Generator[TextUpdate, None, TextOutput] = self.pipe.stream(
            [list(question.tokens) for question in questions],
            gen_length=questions[0].length,
            temperature=questions[0].temperature,
            seeds=[question.seed for question in questions],
        )
        with closing(updates):
            for update in updates:
                if cancelled():
                    raise Left("nobody waits for the answers")
                ticket = tickets[update.row]
                if not ticket.wanted:
                    continue
                answer = self._so_far(ticket.item, update)
                if answer.finish:
                    self.metrics.written(self.name, answer.tokens, update.step)
                    ticket.settle(answer)
                else:
                    ticket.tell(answer.text)

    def _so_far(self, question: Question, update: TextUpdate) -> Answer:
        """What is final from the left; `finish` is empty where more may come."""
        final = next((place for place, mark in enumerate(update.marks) if mark != FINAL), len(update.marks))
        tokens = update.tokens[: min(final, question.most)]
        end = self.pipe.eos_id
        ended = end is not None and end in tokens
        if end is not None and ended:
            tokens = tokens[: tokens.index(end) + 1]
        text = str(self.pipe.tokenizer.decode(tokens[: len(tokens) - ended], skip_special_tokens=True))
        stops = [place for stop in question.stop if (place := text.find(stop)) >= 0]
        if stops:
            return Answer(text[: min(stops)], len(tokens), "stop")
        if ended:
            return Answer(text, len(tokens), "stop")
        if update.done or len(tokens) == question.most:
            return Answer(text, len(tokens), "length")
        text = text.rstrip("\ufffd")  # a character of several tokens that is not whole yet
        return Answer(text[: len(text) - _begun(text, question.stop)], len(tokens), "")

    # ------------------------------------------------------------------------------------------------------------ requests

    def _questions(self, request: Text, prompts: Sequence[Sequence[int]], most: int | None, named: str) -> list[Question]:
        geometry = self.pipe.engine.geometry
        assert isinstance(geometry, FixedBlocks) and isinstance(geometry.block_length, int)
        block, context = geometry.block_length, self.pipe.model.context
        most = most if most is not None else self.length
        length = -(-most // block) * block
        longest = max(map(len, prompts))
        if context is not None and longest + length > context:
            raise Refused(
                400,
                f"the prompt's {longest} tokens and an answer of {length} (whole blocks of {block}) take more than the model's context of "
                f"{context}: pass a shorter prompt or a smaller {named}",
                param=named if longest + block <= context else "messages" if named == "max_completion_tokens" else "prompt",
                code="context_length_exceeded",
            )
        seed = request.seed if request.seed is not None else secrets.randbelow(SEEDS)
        stop = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop or ())
        rows = [prompt for prompt in prompts for _ in range(request.n or 1)]
        return [Question(tuple(row), most, length, request.temperature or 0.0, seed + i, stop) for i, row in enumerate(rows)]

    def _encoded(self, prompt: str) -> list[int]:
        tokens = list(self.pipe.tokenizer(prompt).input_ids) if prompt.strip() else []
        if not tokens:
            raise Refused(400, "prompt must not be blank", param="prompt")
        return tokens

    def _chat(self, request: ChatRequest) -> list[int]:
        messages: list[dict[str, Any]] = [{"role": message.role, "content": message.said} for message in request.messages]
        if getattr(self.pipe.tokenizer, "chat_template", None) is None:
            if len(messages) > 1 or messages[0]["role"] != "user":
                raise Refused(
                    400, f"messages must be one message of the user: {self.name} was not trained on chats (it has no chat template)",
                    param="messages",
                )  # fmt: skip
            tokens = list(self.pipe.tokenizer(messages[0]["content"]).input_ids) if messages[0]["content"].strip() else []
        else:
            try:
                tokens = list(
                    self.pipe.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
                )
            except Exception as why:  # what a template raises on roles in an order that it does not know is its own affair
                raise Refused(400, f"messages do not fit the model's chat template: {why}", param="messages") from why
        if not tokens:
            raise Refused(400, "messages must not be blank", param="messages")
        return tokens


def _begun(text: str, stops: Sequence[str]) -> int:
    """How many of the text's last characters may be the beginning of a stop text."""
    return max((size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0)


__all__ = ["Answer", "Desk", "Question"]
