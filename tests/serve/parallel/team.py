"""A team whose other devices are threads of this process, joined by the ring and by real pipes: the engine's own code, no process started."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rankwise.serve.parallel.experimental.comm import Whose
from rankwise.serve.parallel.experimental.follower import follow
from rankwise.serve.parallel.experimental.messages import Stop, hear, tell
from rankwise.serve.simulate.ring import Ring, RingDevice


class Threads:
    """See :class:`rankwise.serve.parallel.experimental.leader.Team`; ``failures`` are what the others' programs raised."""

    def __init__(self, model: Callable[[], Any], size: int):
        self.ring, self.size = Ring(size), size
        self.comm: RingDevice = self.ring.devices[0]
        self.pipes: dict[int, Connection] = {}
        self.failures: list[BaseException] = []
        self.threads = []
        for rank in range(1, size):
            self.pipes[rank], theirs = Pipe()
            self.threads.append(threading.Thread(target=self._serve, args=(model(), rank, theirs), daemon=True))
            self.threads[-1].start()

    def _serve(self, model: Any, rank: int, pipe: Connection) -> None:
        try:
            follow(model, self.ring.devices[rank], pipe)
        except BaseException as error:
            self.failures.append(error)
            self.ring.broken.set()
            pipe.close()

    def start(self) -> None:
        """They run from the start."""

    def join(self) -> None:
        """The ring is there from the start."""

    def tell(self, rank: int, message: Any) -> None:
        tell(self.pipes[rank], message)

    def ready(self) -> None:
        for rank in self.pipes:
            assert hear(self.pipes[rank]).what == "ready"

    def broken(self, error: BaseException) -> Exception:
        self.ring.broken.set()
        return self.failures[0] if self.failures else error  # type: ignore[return-value]

    def sent(self, whose: Whose) -> list[int]:
        """Numbers each device sent, once the others have done what they were told."""
        before: list[int] = []
        while (now := self.ring.sent("base") + self.ring.sent("adapter")) != before:
            before = now
            time.sleep(0.1)
        return self.ring.sent(whose)

    def close(self) -> None:
        for rank in self.pipes:
            self.tell(rank, Stop())
        for t in self.threads:
            t.join(10)
        assert not self.failures and not any(t.is_alive() for t in self.threads), self.failures
