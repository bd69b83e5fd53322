"""From the engine's thread to the event loop: one bounded mailbox per HTTP request, closed as soon as the client is gone."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.types import Receive

from rankwise.serve.http.errors import EngineFault
from rankwise.serve.types import Event, Finished, Request, ServeError

if TYPE_CHECKING:
    from rankwise.serve.engine.engine import Engine


class ClientGone(Exception):
    """The client closed its connection: there is nobody to answer."""


class SlowReader(ServeError):
    """The client takes its tokens more slowly than they are made, beyond what is kept for it."""

    status = 408
    code = "slow_reader"


class EventQueue:
    """Events from another thread, in order, at most ``limit`` of them unread; further ones close it.

    ``post`` never waits, so a slow reader cannot slow a step.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int):
        self.loop, self.limit = loop, limit
        self._events: deque[Event] = deque()
        self._lock = threading.Lock()
        self._wake = asyncio.Event()
        self._awake = False  # a wake-up is on its way to the loop
        self._closed: BaseException | None = None

    def post(self, event: Event) -> bool:
        """Any thread.  False: it was not kept, the mailbox is closed or overflowed just now."""
        with self._lock:
            if self._closed is not None:
                return False
            if len(self._events) >= self.limit:
                self._closed = SlowReader(
                    f"More than {self.limit} tokens wait unread; read faster, or ask for fewer tokens or no stream."
                )
                self._events.clear()
            else:
                self._events.append(event)
            kept = self._closed is None
            awake, self._awake = self._awake, True
        if not awake:
            self._notify()
        return kept

    def close(self, reason: BaseException) -> None:
        """Any thread: whoever takes next gets ``reason``, what is unread is dropped."""
        with self._lock:
            if self._closed is None:
                self._closed = reason
            self._events.clear()
            awake, self._awake = self._awake, True
        if not awake:
            self._notify()

    def _notify(self) -> None:
        try:
            self.loop.call_soon_threadsafe(self._wake.set)
        except RuntimeError:  # the loop has ended, and with it whoever would have read
            self._closed = self._closed or ClientGone()

    async def take(self) -> list[Event]:
        """All unread events, at least one.  Raises what the mailbox was closed with."""
        while True:
            with self._lock:
                if self._closed is not None:
                    raise self._closed
                if self._events:
                    events = list(self._events)
                    self._events.clear()
                    return events
                self._wake.clear()
                self._awake = False
            await self._wake.wait()


class Generation:
    """The sequences of one HTTP request: submitted together, cancelled together.

    Use as a context manager: whatever ends it, nothing of it stays in the engine.

    Args:
        engine: what serves.
        requests: its sequences.
        buffer: events kept unread.
        quiet: seconds without an event, after which the engine is asked whether it lives.
    """

    def __init__(self, engine: Engine, requests: Sequence[Request], *, buffer: int, quiet: float):
        self.engine, self.requests, self.quiet = engine, requests, quiet
        self.mailbox = EventQueue(asyncio.get_running_loop(), max(buffer, 2 * len(requests)))
        self.open: set[str] = set()
        self._watch: asyncio.Task[None] | None = None

    def __enter__(self) -> Generation:
        """Submit all, or none.  Raises what the engine refuses with."""
        try:
            for request in self.requests:
                self.open.add(request.id)
                self.engine.submit(request, self._on_event)
        except BaseException:
            self.open.discard(request.id)
            self.close()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _on_event(self, event: Event) -> None:
        if not self.mailbox.post(event) and not isinstance(event, Finished):
            self.engine.cancel(event.request)

    def end(self, request_id: str) -> None:
        """One sequence has all it needs (a stop string)."""
        if request_id in self.open:
            self.open.discard(request_id)
            self.engine.cancel(request_id)

    def close(self) -> None:
        """Cancel what still runs; idempotent."""
        if self._watch is not None:
            self._watch.cancel()
        for request_id in list(self.open):
            self.end(request_id)
        self.mailbox.close(ClientGone())

    def watch(self, receive: Receive) -> None:
        """From now on a client that goes away closes the mailbox and cancels at once, whatever the reader waits for."""
        self._watch = asyncio.get_running_loop().create_task(self._until_gone(receive))

    async def _until_gone(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        for request_id in list(self.open):
            self.engine.cancel(request_id)
        self.mailbox.close(ClientGone())

    async def events(self) -> AsyncIterator[Event]:
        """Events of all sequences until each is finished or was ended.

        Raises:
            ClientGone, SlowReader: see there.
            EngineFault: the engine has stopped without a word.
        """
        while self.open:
            try:
                async with asyncio.timeout(self.quiet):
                    batch = await self.mailbox.take()
            except TimeoutError:
                stats = self.engine.stats()
                if not stats.healthy:
                    raise EngineFault(
                        "The engine has stopped; its log has the reason, and /health says when it works again."
                    ) from None
                continue
            for event in batch:
                if event.request in self.open:
                    if isinstance(event, Finished):
                        self.open.discard(event.request)
                    yield event
