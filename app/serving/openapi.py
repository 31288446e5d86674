"""The OpenAPI document, with what FastAPI cannot know: which models there are, which errors, and whether a key is needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from hasten.app.serving.schemas import ErrorResponse

MEANINGS = {
    400: "The request is not what it should be; the message says why.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The body is too large.",
    429: "The queue is full; Retry-After says when to try again.",
    500: "An error of the server.",
    503: "The server is going down.",
    504: "It took longer than the server allows.",
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": meaning} for status, meaning in MEANINGS.items()
}
KINDS = {"ImageRequest": "images", "CompletionRequest": "texts", "ChatRequest": "texts"}


def described(app: FastAPI, names: Mapping[str, Sequence[str]], locked: bool) -> Callable[[], dict[str, Any]]:
    """What makes the document, once.

    Args:
        names: Models by what they are for.
        locked: Whether an API key is needed.
    """

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app, names, locked)
        return app.openapi_schema

    return document


def _document(app: FastAPI, names: Mapping[str, Sequence[str]], locked: bool) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    parts = found["components"]["schemas"]
    for path, methods in found["paths"].items():
        for method, operation in methods.items():
            operation["responses"].pop("422", None)  # bodies that are wrong get 400
            if method == "get":
                ready = {"503"} if path == "/ready" else set()
                kept = {"200", "500"} | ready | ({"401"} if locked and path not in ("/health", "/ready") else set())
                operation["responses"] = {status: what for status, what in operation["responses"].items() if status in kept}
            if locked and path in ("/health", "/ready"):
                operation["security"] = []
    for name in ("HTTPValidationError", "ValidationError"):
        parts.pop(name, None)
    for name, kind in KINDS.items():
        model = parts[name]["properties"]["model"]
        branch = next((branch for branch in model.get("anyOf", ()) if branch.get("type") == "string"), model)
        branch["enum"] = list(names.get(kind, ()))
    if locked:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
    return found
