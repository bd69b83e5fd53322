"""uvicorn with the patience and the bounds that a public port needs, and a terminate signal that drains."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from types import FrameType
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from rankwise.serve.http.auth import is_loopback
from rankwise.serve.http.service import Phase, Service
from rankwise.serve.http.settings import HEADER_BYTES

#: connections of one address, other than this machine's own (a proxy here speaks for many)
CONNECTIONS_PER_CLIENT = 64
#: seconds in which a new connection sends its first request's headers
HEADER_SECONDS = 30.0


class Protocol(H11Protocol):
    """HTTP/1.1 with a clock on each request's headers, a count of connections per address, and a way to drop a connection."""

    _per_client: collections.Counter[str] = collections.Counter()
    _counted: str | None = None
    _clock: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        host = self.client[0] if self.client else ""
        if host and not is_loopback(host):
            if self._per_client[host] >= CONNECTIONS_PER_CLIENT:
                transport.abort()
                return
            self._per_client[host] += 1
            self._counted = host
        self._clock = self.loop.call_later(HEADER_SECONDS, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._clock is not None:
            self._clock.cancel()
        if self._counted is not None:
            self._per_client[self._counted] -= 1
            if not self._per_client[self._counted]:
                del self._per_client[self._counted]

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        idle = self.cycle is None or self.cycle.response_complete
        if idle and self._clock is None:
            self._clock = self.loop.call_later(HEADER_SECONDS, self._too_slow)
        elif not idle and self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def handle_events(self) -> None:
        super().handle_events()
        if self.scope is not None:
            extensions: dict[Any, Any] = self.scope.setdefault("extensions", {})  # type: ignore[assignment]
            extensions["rankwise.abort"] = self.transport.abort

    def _too_slow(self) -> None:
        self.transport.abort()


class HttpServer(uvicorn.Server):
    """Serves one application until a signal; then no new requests, what runs is finished or told within the drain time.

    Args:
        app: of :func:`~rankwise.serve.http.app.make_app`.
        host, port: to listen on.
        opened: called once the port takes connections.
    """

    def __init__(self, app: Starlette, host: str, port: int, opened: Callable[[], None] = lambda: None):
        self.service: Service = app.state.service
        self.opened = opened
        quiet: dict[str, Any] = {"access_log": False, "log_level": "warning", "server_header": False}
        bounds: dict[str, Any] = {"h11_max_incomplete_event_size": HEADER_BYTES, "timeout_keep_alive": 30, "backlog": 2048}
        bounds["timeout_graceful_shutdown"] = int(self.service.settings.drain_seconds) + 5
        super().__init__(uvicorn.Config(app, host, port, http=Protocol, ws="none", lifespan="on", **quiet, **bounds))

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.phase = Phase.DRAINING
        super().handle_exit(sig, frame)
        self._captured_signals.clear()  # a drained end is a good one: the signal is not raised again

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        self.opened()

    async def shutdown(self, sockets: Any = None) -> None:
        self.service.phase = Phase.DRAINING
        late = asyncio.get_running_loop().call_later(self.service.settings.drain_seconds, self.service.cut)
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()
