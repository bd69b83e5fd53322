"""How other threads reach the engine: commands wait in a queue that the step loop empties between two steps."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from rankwise.errors import OptionError
from rankwise.serve.types import Overloaded

Command = Callable[[], None]


class Inbox:
    """Commands for the engine's thread, and the ids of the requests that live.

    Attributes:
        wake: set as soon as anything has come in; the loop waits for it.
        draining, stopping: no request is taken any more; the loop is to end.
    """

    def __init__(self) -> None:
        self.commands: SimpleQueue[Command] = SimpleQueue()
        self.wake, self.stopping = threading.Event(), threading.Event()
        self.lock = threading.Lock()
        self.ids: set[str] = set()  # of all that live, so that a second one is refused at once
        self.draining = False

    def put(self, command: Command) -> None:
        """Run ``command`` on the engine's thread before its next step."""
        self.commands.put(command)
        self.wake.set()

    def submit(self, request_id: str, command: Command, most: int) -> None:
        """Put the command that takes a request in, unless there are ``most`` already.

        Raises:
            OptionError: an id that is in use.
            Overloaded: the queue is full, or the engine is going down.
        """
        with self.lock:
            if request_id in self.ids:
                raise OptionError(f"A request with the id {request_id!r} is being served; give each its own.")
            if self.draining or self.stopping.is_set():
                raise Overloaded("The server is going down; try another one.", 5.0)
            if len(self.ids) >= most:
                raise Overloaded(f"{len(self.ids)} requests are being served or waiting, as many as may; try again later.")
            self.ids.add(request_id)
            self.put(command)  # under the lock: what is let in here, stop() still finds

    def forget(self, request_id: str) -> None:
        """A request has ended; its id may be used again."""
        with self.lock:
            self.ids.discard(request_id)

    def drain(self) -> None:
        """Take no more requests."""
        with self.lock:
            self.draining = True

    def stop(self) -> None:
        """End the loop."""
        self.stopping.set()
        self.wake.set()

    def run_all(self) -> None:
        """Run what has come in, on the engine's thread."""
        self.wake.clear()  # what comes in from here on is seen by this step or wakes the next one
        with contextlib.suppress(Empty):
            while True:
                self.commands.get_nowait()()
