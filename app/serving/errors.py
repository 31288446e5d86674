"""What a request is refused with: an HTTP status, and a body in the form of OpenAI's errors."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from hasten.app.rewards import closest

CLIENT_GONE = 499
"""Not sent to anybody: what the request is counted as when its client has left."""
KINDS = {
    401: ("authentication_error", "invalid_api_key"),
    404: ("invalid_request_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    413: ("invalid_request_error", "body_too_large"),
    429: ("rate_limit_error", "queue_full"),
    CLIENT_GONE: ("invalid_request_error", "client_gone"),
    500: ("server_error", "internal_error"),
    503: ("server_error", "draining"),
    504: ("server_error", "timeout"),
}
"""Type and code of an error by its status; all others are invalid requests."""


class Refused(HTTPException):
    """A request cannot be served.

    Args:
        status: Of HTTP.
        message: One line: what is wrong, and what is allowed.
        param: The key of the request that it is about.
        code: For programs; that of the status unless told.
        headers: Of the answer.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The answer's body."""
        kind, code = KINDS.get(self.status_code, ("invalid_request_error", "invalid_value"))
        return {"error": {"message": self.detail, "type": kind, "param": self.param, "code": self.code or code}}

    def response(self) -> Response:
        """The answer."""
        # ASCII, since the message may hold half of a surrogate pair that the request held.
        return Response(json.dumps(self.body()), self.status_code, dict(self.headers or {}), "application/json")


async def refused(request: Request, error: Exception) -> Response:
    """Answers with any HTTP error in OpenAI's form."""
    if isinstance(error, Refused):
        return error.response()
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        message = f"there is no {request.url.path}; /openapi.json lists what there is"
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}"
    elif error.status_code == 400:
        message = "the body cannot be read as JSON"
    else:
        message = str(error.detail)
    return Refused(error.status_code, message, headers=error.headers).response()


def invalid(keys: Mapping[str, Sequence[str]]) -> Callable[[Request, Exception], Awaitable[Response]]:
    """What answers with status 400 to a body that is not what it should be.

    Args:
        keys: By path, what its body may have.
    """

    async def answer(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        places: dict[str, list[Mapping[str, Any]]] = {}
        for found in error.errors():
            places.setdefault(_place(found["loc"]), []).append(found)
        known = keys.get(request.url.path, ())
        message = "; ".join(_reason(place, _telling(errors), known) for place, errors in list(places.items())[:3])
        return Refused(400, " ".join(message.split())[:1000], param=next(iter(places)) or None).response()

    return answer


async def failed(request: Request, error: Exception) -> Response:
    """Answers with status 500."""
    return unexpected(error).response()


def unexpected(error: Exception) -> Refused:
    """What a client is told of an error of the server: its kind; the server's log has the rest."""
    return Refused(500, f"{type(error).__name__}; the server's log says where")


def _place(loc: Sequence[Any]) -> str:
    """The key that an error is about: 'messages', 'prompt'. Which branch of a union was tried says nothing to a client."""
    return str(loc[1])[:100] if len(loc) > 1 and isinstance(loc[1], str) else ""


def _telling(errors: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of the errors about one key the one that says most: where a text or a list may stand, a list that is too long is no text either."""
    return max(errors, key=lambda found: (not str(found["type"]).endswith("_type"), len(found["loc"])))


def _reason(place: str, found: Mapping[str, Any], known: Sequence[str]) -> str:
    kind, loc = found["type"], found["loc"]
    if kind == "json_invalid":
        return f"the body must be JSON: {found['ctx']['error']}"
    if not place:
        return "the body must be a JSON object, sent with Content-Type: application/json"
    if kind == "extra_forbidden":
        name = str(loc[-1])[:100]
        return f"unknown key {name!r}{closest(name, known)}" if len(loc) == 2 else f"unknown key {name!r} in {place}"
    if kind == "missing":
        return f"{place} is missing" if len(loc) == 2 else f"{loc[-1]} is missing in {place}"
    return f"{place}: {str(found['msg']).removeprefix('Value error, ')}"
