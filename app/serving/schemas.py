"""Bodies of requests and answers: OpenAI's, with a few keys of our own, and nothing that is not known."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from hasten.accelerators.caching.delta_dit import PRESETS
from hasten.app.batch.jobs import PROMPT_LIMIT, SEED_LIMIT
from hasten.app.methods import METHODS

MOST_PICTURES, MOST_PROMPTS, MOST_MESSAGES, MOST_STOPS = 10, 16, 64, 4
"""Of a request; the first and the last are OpenAI's limits."""
MOST_TOKENS, MOST_STEPS = 32_768, 1_000
"""The most that can be asked for; the server or the model may allow less."""

Prompt = Annotated[str, Field(min_length=1, max_length=PROMPT_LIMIT)]
Seed = Annotated[
    int, Field(ge=0, lt=SEED_LIMIT, description="Picture or answer i of the request has seed + i. Default: drawn, and returned.")
]
Model = Annotated[str, Field(min_length=1, max_length=500, description="As GET /v1/models lists it.")]
Several = Annotated[int, Field(ge=1, le=MOST_PICTURES)]
Stop = Annotated[str, Field(min_length=1, max_length=100)]
Amount = Annotated[int, Field(ge=0, le=10_000)] | Annotated[float, Field(ge=0, le=1)] | Annotated[str, Field(max_length=20)]
User = Annotated[str, Field(max_length=512, description="Checked and ignored.")]
NoPenalty = Annotated[float, Field(ge=0, le=0, description="Only 0: these models have no such penalty.")]


class Body(BaseModel):
    """A request's: no unknown keys, no conversions ("3" is no number), no NaN."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ImageRequest(Body):
    """What to draw."""

    prompt: Annotated[Prompt, Field(examples=["a small red circle left of a large blue square"])]
    model: Model | None = None
    n: Annotated[Several, Field(description="Pictures.")] | None = None
    size: (
        Annotated[str, Field(pattern=r"^(auto|[1-9][0-9]{1,3}x[1-9][0-9]{1,3})$", description='Such as "1024x768". Default: the model\'s.')]
        | None
    ) = None
    seed: Seed | None = None
    response_format: Annotated[Literal["b64_json"], Field(description="PNG in base64; the server keeps no files for a URL.")] | None = None
    quality: (
        Annotated[Literal["auto", "standard", "hd", "low", "medium", "high"], Field(description="Checked and ignored: see steps.")] | None
    ) = None
    user: User | None = None
    steps: Annotated[int, Field(ge=1, le=MOST_STEPS, description="Denoising steps. Default: the server's, else the model's.")] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    negative_prompt: Annotated[str, Field(max_length=PROMPT_LIMIT)] | None = None
    method: (
        Annotated[
            str,
            Field(
                max_length=50,
                description="Caching, as `hasten generate --method`. Default: the server's.",
                json_schema_extra={"enum": list(METHODS)},
            ),
        ]
        | None
    ) = None
    interval: Annotated[int, Field(ge=1, le=MOST_STEPS, description="Every so many steps everything is computed.")] | None = None
    threshold: Annotated[float, Field(ge=0, le=1_000, description="Of first-block and teacache.")] | None = None
    skip_guidance: Annotated[int, Field(ge=2, le=MOST_STEPS)] | None = None
    cached: Annotated[Amount, Field(description="Of delta-dit: a fraction or a count of blocks.")] | None = None
    boundary: Annotated[Amount, Field(description="Of delta-dit: a fraction or a count of steps.")] | None = None
    preset: Annotated[str, Field(max_length=50, description="Of delta-dit.", json_schema_extra={"enum": list(PRESETS)})] | None = None

    @field_validator("response_format", mode="before")
    @classmethod
    def _no_links(cls, value: Any) -> Any:
        if value == "url":
            raise ValueError('must be "b64_json", not "url": this server keeps no files that a link could lead to')
        return value


class StreamOptions(Body):
    """How an answer is streamed."""

    include_usage: Annotated[bool, Field(description="Whether a last chunk tells the usage.")] = False


class Text(Body):
    """What text requests share."""

    model: Model
    n: Annotated[Several, Field(description="Answers to each prompt.")] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, description="0, the default, takes the most probable tokens.")] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(min_length=1, max_length=MOST_STOPS)] | None = None
    stream: Annotated[bool, Field(description="Whether the text comes as it is committed, as server-sent events.")] | None = None
    stream_options: StreamOptions | None = None
    user: User | None = None
    top_p: Annotated[float, Field(ge=1, le=1, description="Only 1.")] | None = None
    presence_penalty: NoPenalty | None = None
    frequency_penalty: NoPenalty | None = None


class CompletionRequest(Text):
    """What to continue."""

    prompt: Annotated[Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_PROMPTS)], Field(examples=["3? + ? = 91"])]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS, description="Default: the model's.")] | None = None


class ContentPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: Annotated[str, Field(max_length=PROMPT_LIMIT)]


class Message(Body):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, Field(max_length=PROMPT_LIMIT)] | Annotated[list[ContentPart], Field(min_length=1, max_length=MOST_MESSAGES)]
    name: Annotated[str, Field(max_length=64, description="Checked and ignored.")] | None = None

    @property
    def said(self) -> str:
        """The text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Text):
    """What to answer."""

    messages: Annotated[
        list[Message], Field(min_length=1, max_length=MOST_MESSAGES, examples=[[{"role": "user", "content": "3? + ? = 91"}]])
    ]
    max_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS, description="Default: the model's.")] | None = None


class Picture(BaseModel):
    """A PNG in base64, and the seed that draws it again."""

    b64_json: str
    seed: int
    revised_prompt: None = None


class ImageResponse(BaseModel):
    """Pictures, in the order of their seeds."""

    created: int
    data: list[Picture]


class Usage(BaseModel):
    """Tokens; those of an answer with its end-of-text."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    """One answer."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class CompletionResponse(BaseModel):
    """Answers: n for the first prompt, n for the next."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[Completion]
    usage: Usage


class ChatAnswer(BaseModel):
    """The message of an answer."""

    role: Literal["assistant"]
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: ChatAnswer
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatResponse(BaseModel):
    """Answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    seed: int
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hasten"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Status(BaseModel):
    """Whether the server is alive, or ready for requests."""

    status: Literal["ok", "draining"]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: Error
