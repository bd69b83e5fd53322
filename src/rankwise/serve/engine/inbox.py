"""The engine's face to other threads: requests and commands go into a queue that the step loop empties."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import Counter
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from rankwise.errors import OptionError
from rankwise.serve.engine.options import EngineOptions, EngineStats
from rankwise.serve.types import Event, Overloaded, Request

if TYPE_CHECKING:
    from rankwise.serve.engine.interfaces import Residency
    from rankwise.serve.engine.scheduler import Scheduler
    from rankwise.serve.model.runner import Runner

log = logging.getLogger("rankwise.serve")


class Inbox:
    """What may be called from any thread; the engine proper takes what comes in (:meth:`_take`, :meth:`_cancel`)."""

    runner: Runner
    adapters: Residency
    options: EngineOptions
    queue: Scheduler
    counters: Counter[str]
    steps: int
    error: str

    def __init__(self) -> None:
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._wake = threading.Event()
        self._lock = threading.Lock()
        self._ids: set[str] = set()  # of all that live, so that a second one is refused at once
        self._stopping = threading.Event()
        self._draining = False

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Queue a request; its events come on the engine's thread, :class:`~rankwise.serve.types.Finished` last.

        Raises:
            OptionError: longer than a request may be; an id that is in use.
            Overloaded: the queue is full, or the engine is going down.
        """
        self.queue.check_length(request)
        with self._lock:
            if request.id in self._ids:
                raise OptionError(f"A request with the id {request.id!r} is being served; give each its own.")
            if self._draining or self._stopping.is_set():
                raise Overloaded("The server is going down; try another one.", 5.0)
            if len(self._ids) >= self.options.max_waiting + self.options.max_running:
                raise Overloaded(f"{len(self._ids)} requests are being served or waiting, as many as may; try again later.")
            self._ids.add(request.id)
            self._do(lambda: self._take(request, on_event))  # under the lock: what is let in here, stop() still finds

    def cancel(self, request_id: str) -> None:
        """End a request within a step; nothing happens where it has ended already."""
        self._do(lambda: self._cancel(request_id))

    def call(self, fn: Callable[[], object]) -> None:
        """Run ``fn`` on the engine's thread between two steps; what it raises is logged and concerns no request."""

        def run() -> None:
            try:
                fn()
            except Exception as error:
                self.counters["faults"] += 1
                log.error("a command between two steps failed", exc_info=error)

        self._do(run)

    def _do(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._wake.set()

    def wanted(self) -> bool:
        """Whether anything has come in since this step began."""
        return self._wake.is_set()

    def stats(self) -> EngineStats:
        """A look from any thread; what was submitted and not yet seen by a step is waiting too."""
        used = self.queue.total_blocks - self.queue.index.available()
        running = len(self.queue.running)
        return EngineStats(
            running, max(len(self._ids) - running, 0), used, self.queue.total_blocks, self.steps, self.queue.step_seconds,
            not self.error, self.error, dict(self.counters), *self.adapters.lora_pages_held(),
            0 if self.queue.copies is None else self.queue.copies.nbytes,
        )  # fmt: skip

    def idle(self) -> bool:
        """Nothing runs, nothing waits, nothing has come in."""
        return not self.queue.running and not self.queue.waiting and self._commands.empty()

    def _drain_commands(self) -> None:
        self._wake.clear()  # what comes in from here on is seen by this step or wakes the next one
        with contextlib.suppress(Empty):
            while True:
                self._commands.get_nowait()()

    def _take(self, request: Request, emit: Callable[[Event], None]) -> None:
        raise NotImplementedError

    def _cancel(self, request_id: str) -> None:
        raise NotImplementedError
