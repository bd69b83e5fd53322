"""Errors as OpenAI's clients read them: ``{"error": {"message", "type", "param", "code"}}`` and the right status."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rankwise.errors import RankwiseError
from rankwise.serve.memory import no_memory
from rankwise.serve.types import Overloaded, ServeError

log = logging.getLogger("rankwise.serve")

#: the word OpenAI's clients find in ``type``; every other status below 500 is a request's fault
TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(ServeError):
    """A request refused by the HTTP side.

    Args:
        status, code: of HTTP; the word that OpenAI's clients read.
        message: one sentence for the user.
        param: the field at fault, or None.
        headers: sent with the answer.
    """

    def __init__(self, status: int, code: str, message: str, *, param: str | None = None, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, dict(headers or {})


def bad(message: str, param: str | None = None, code: str = "invalid_request") -> Refusal:
    """A 400 about one field."""
    return Refusal(400, code, message, param=param)


class EngineFault(ServeError):
    """The engine failed; what happened is in the server's log and not in the answer."""

    status = 500
    code = "internal_error"


def status_of(error: BaseException) -> int:
    """The HTTP status of an error: its own, 400 for a user's mistake, 500 otherwise."""
    return error.status if isinstance(error, ServeError) else 400 if isinstance(error, RankwiseError) else 500


def body_of(error: BaseException) -> dict[str, Any]:
    """The JSON of an error.  Nothing of an unforeseen one but that it happened: its text may hold paths or weights."""
    status = status_of(error)
    known = isinstance(error, RankwiseError)
    return {
        "error": {
            "message": str(error) if known else "The server failed on this request; its log has the reason.",
            "type": TYPES.get(status, "invalid_request_error" if status < 500 else "server_error"),
            "param": getattr(error, "param", None),
            "code": getattr(error, "code", None) or ("invalid_request" if status < 500 else "internal_error"),
        }
    }


def response_of(error: BaseException) -> Response:
    """The whole answer to an error, with ``Retry-After`` (whole seconds, rounded up) where the server is full."""
    headers = dict(getattr(error, "headers", {}))
    if isinstance(error, Overloaded):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if status_of(error) == 401:
        headers.setdefault("WWW-Authenticate", "Bearer")
    content = json.dumps(body_of(error), ensure_ascii=False).encode("utf-8", "replace")
    kind = DrainResponse if status_of(error) in (408, 413) else Response
    return kind(content, status_of(error), headers, "application/json")


class DrainResponse(Response):
    """An answer to a request whose body is not wanted: it goes out at once, and the connection closes.

    What the client has already sent is read and thrown away for a moment, a few megabytes at most, since closing on
    unread bytes would reset the connection, and the client might never see the answer.
    """

    SECONDS, BYTES = 1.0, 4 << 20

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.SECONDS):
                read = 0
                while read < self.BYTES and (message := await receive())["type"] == "http.request" and message.get("more_body"):
                    read += len(message.get("body", b""))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def on_known(request: Request, error: Exception) -> Response:
    """Starlette's handler for the family of user-facing errors."""
    return response_of(error)


async def on_http(request: Request, error: Exception) -> Response:
    """No such route, or not by this method."""
    assert isinstance(error, HTTPException)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    message = f"{request.method} {request.url.path} is not served here; see the serving page of the documentation for the routes."
    return response_of(Refusal(error.status_code, code, message, headers=error.headers))


async def on_unforeseen(request: Request, error: Exception) -> Response:
    """A defect: logged with its trace, answered without.  Want of memory is none: the client is to come back."""
    if no_memory(error):
        return response_of(Overloaded("The server has no memory left for this request; try again later.", 5.0))
    return response_of(error)
