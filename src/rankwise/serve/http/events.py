"""Server-sent events over a connection that may be slow or gone."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from rankwise.serve.http.stream import ClientGone

log = logging.getLogger("rankwise.serve")


class EventStream(Response):
    """Frames as they come.  Whatever ends it, the stack is closed: its sequences leave the engine.

    A write that hangs for ``stall`` seconds ends the answer; the connection is closed without the last event.

    Args:
        frames: what is sent.
        stack: closed at the end.
        headers: beside those of an event stream.
        stall: seconds.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncIterator[bytes], stack: contextlib.ExitStack, headers: Mapping[str, str], stall: float):
        super().__init__(b"", 200, {**headers, "cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.frames, self.stack, self.stall = frames, stack, stall

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self.stack:
            try:
                await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
                async for frame in self.frames:
                    await self._send(send, frame)
                await self._send(send, b"", more=False)
            except ClientGone:
                log.debug("client gone")
            except TimeoutError:
                log.info("a client read nothing for %g s; its request was cancelled", self.stall)
                scope.get("extensions", {}).get("rankwise.abort", lambda: None)()

    async def _send(self, send: Send, body: bytes, more: bool = True) -> None:
        async with asyncio.timeout(self.stall):
            await send({"type": "http.response.body", "body": body, "more_body": more})
