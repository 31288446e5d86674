"""What stands in front of the routes: the key, the size of bodies, and counting."""

from __future__ import annotations

import hmac
from collections.abc import Collection

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hasten.app.serving.errors import Refused
from hasten.app.serving.metrics import Metrics

OPEN = ("/health", "/ready")
"""Paths that need no key: what asks whether a server lives has none."""


class Guard:
    """Refuses what has no key or too large a body, and counts what was answered.

    Args:
        app: What comes behind.
        key: What requests must show as `Authorization: Bearer KEY`; None where anybody may ask.
        body: Bytes of a body at most.
        metrics: Where answers are counted.
        paths: Of the routes. Others are counted as one, so that nobody can make the server count a million.
    """

    def __init__(self, app: ASGIApp, *, key: str | None, body: int, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._body, self._metrics, self._paths = app, body, metrics, paths
        self._key = None if key is None else b"Bearer " + key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"]

        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(path if path in self._paths else "other", message["status"])
            await send(message)

        headers = dict(scope["headers"])
        refusal = self._refusal(path, headers.get(b"authorization", b""), headers.get(b"content-length", b""))
        if refusal is not None:
            await refusal.response()(scope, receive, counting)
            return
        seen = 0

        async def measured() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                raise self._too_large()
            return message

        await self._app(scope, measured, counting)

    def _refusal(self, path: str, shown: bytes, length: bytes) -> Refused | None:
        # Compared in constant time: how long it takes must not tell how much of a key was right.
        if self._key is not None and path not in OPEN and not hmac.compare_digest(shown, self._key):
            return Refused(
                401, "this server wants its API key, as Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"}
            )  # fmt: skip
        # A body that is longer than it says, or says nothing, is measured as it comes.
        if length.isdigit() and int(length[:20]) > self._body:
            return self._too_large()
        return None

    def _too_large(self) -> Refused:
        return Refused(413, f"a request may have {self._body} bytes", headers={"Connection": "close"})
