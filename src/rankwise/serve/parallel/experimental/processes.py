"""A team of processes: started, joined, watched, and ended together.

Two channels.  Pipes carry what the first device tells (they wait without a limit, and end the moment either side does);
gloo carries the collectives of a step, which have a time limit.  A watcher waits for any other process's end: the
first one is the team's, with one line that says why.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rankwise.errors import RankwiseError
from rankwise.host import keep_freed_memory
from rankwise.serve.parallel.experimental.comm import PeerLost
from rankwise.serve.parallel.experimental.follower import follow
from rankwise.serve.parallel.experimental.gloo import Gloo
from rankwise.serve.parallel.experimental.messages import Said, Stop, hear, packed, tell

STARTING = 600.0  #: seconds in which a process reads the base and builds its part
LARGE = 1 << 14  #: bytes; a pipe takes a few messages below it whether or not somebody reads


class Processes:
    """``size`` − 1 other processes, from :meth:`start` on; :meth:`join` meets them.  See :class:`.leader.Team`.

    Args:
        load: picklable, gives the plain base; called in each of the others.
        timeout: seconds that a collective may take before the team is given up.
    """

    comm: Gloo

    def __init__(self, load: Callable[[], nn.Module], size: int, timeout: float = 60.0):
        self.load, self.size, self.timeout = load, size, timeout
        self.lost = ""  #: why the team ended, once it did
        self._on_lost: Callable[[str], None] = lambda why: None
        self._running = False
        self._ending = threading.Event()
        self._known = threading.Event()
        self._lock = threading.Lock()
        self._folder = tempfile.TemporaryDirectory(prefix="rankwise-team-")
        self._file = str(Path(self._folder.name) / "meeting")
        self.threads = max(1, torch.get_num_threads() // size)
        self.pipes: dict[int, Connection] = {}
        self.processes: dict[int, Any] = {}

    def start(self) -> None:
        """Start the others, who read the base: a process each, so only once the model is known to be cut so."""
        atexit.register(self.close)  # before multiprocessing waits for them, who ignore its terminate
        spawn = multiprocessing.get_context("spawn")
        for rank in range(1, self.size):
            ours, theirs = spawn.Pipe()
            args = (self.load, rank, self.size, theirs, self._file, self.timeout, self.threads)
            process = spawn.Process(target=_serve, args=args, name=f"rankwise-device-{rank}", daemon=True)
            process.start()
            self.pipes[rank], self.processes[rank] = ours, process  # only what runs is there to be ended
            theirs.close()

    def join(self) -> None:
        """Meet the others once they have read the base; from here on their end is noticed.  Raises PeerLost."""
        torch.set_num_threads(self.threads)
        self._await("loaded")
        for rank in self.pipes:
            self.tell(rank, Said("meet"))
        self.comm = Gloo(0, self.size, self._file, self.timeout)

    def ready(self) -> None:
        self._await("ready")
        self._running = True
        threading.Thread(target=self._watch, name="rankwise-watch", daemon=True).start()

    def tell(self, rank: int, message: Any) -> None:
        if self.lost:
            raise PeerLost(self.lost)
        data = packed(message)
        try:
            with self._impatient(rank) if len(data) > LARGE else contextlib.nullcontext():
                self.pipes[rank].send_bytes(data)
        except OSError as error:
            raise self.broken(error) from error

    @contextlib.contextmanager
    def _impatient(self, rank: int) -> Iterator[None]:
        """End a process that reads nothing for so long: writing to it would wait for ever."""
        timer = threading.Timer(self.timeout, self.processes[rank].kill)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def when_lost(self, then: Callable[[str], None]) -> None:
        """Have ``then`` called with why, on some thread, once the team is lost."""
        with self._lock:
            self._on_lost, late = then, self.lost
        if late:
            then(late)

    def broken(self, error: BaseException) -> Exception:
        self._known.wait(1.0)  # the watcher, or the device's own last word, knows better than this end's symptom
        self._end(
            str(error) if isinstance(error, PeerLost) else f"A step failed on the first device ({type(error).__name__}: {error})."
        )
        return PeerLost(self.lost)

    def close(self) -> None:
        """End the others: told so, then waited for, then ended."""
        self._ending.set()
        atexit.unregister(self.close)
        for rank, process in self.processes.items():
            with contextlib.suppress(OSError):
                tell(self.pipes[rank], Stop())
            self.pipes[rank].close()
            process.join(5.0 if self._running and not self.lost else 0.1)
            if process.is_alive():
                process.kill()
                process.join()
        self._folder.cleanup()

    # --- inside -----------------------------------------------------------------------------------------------
    def _await(self, what: str) -> None:
        for rank in self.pipes:
            said = self._hear(rank, STARTING)
            if said.what != what:
                self._end(self._line(rank, said.why))
                raise PeerLost(self.lost)

    def _hear(self, rank: int, seconds: float) -> Said:
        pipe, process = self.pipes[rank], self.processes[rank]
        try:
            if not wait([pipe, process.sentinel], seconds):
                return Said("failed", f"it said nothing for {seconds:.0f} s")
            if pipe.poll():
                return hear(pipe)  # type: ignore[no-any-return]
        except (EOFError, OSError):
            pass
        process.join(5.0)
        return Said("failed", f"its process ended with status {process.exitcode}")

    def _watch(self) -> None:
        of = {}
        for rank, pipe in self.pipes.items():
            of[pipe], of[self.processes[rank].sentinel] = rank, rank
        found: Any = wait(list(of))
        if not self._ending.is_set():
            rank = of[found[0]]
            self._end(self._line(rank, self._hear(rank, 5.0).why))

    def _line(self, rank: int, why: str) -> str:
        return f"Device {rank} of {self.size} ended ({why}), so the server ends: no device can answer alone. Start it again."

    def _end(self, why: str) -> None:
        with self._lock:
            first, self.lost, then = not self.lost, self.lost or why, self._on_lost
        self._known.set()
        if first:
            then(self.lost)


def _serve(load: Callable[[], nn.Module], rank: int, size: int, pipe: Connection, file: str, timeout: float, threads: int) -> None:
    """One of the other processes; its last word, where it fails, is why."""
    for sig in (signal.SIGINT, signal.SIGTERM):  # the first device drains and then says stop; should it die, the pipe ends
        signal.signal(sig, signal.SIG_IGN)
    torch.set_num_threads(threads)
    keep_freed_memory()
    try:
        follow(_loaded(load, pipe), Gloo(rank, size, file, timeout), pipe)  # nothing here keeps the whole base alive
    except (EOFError, BrokenPipeError, PeerLost):
        os._exit(1)  # nobody is left to be told
    except RankwiseError as error:
        _fail(pipe, str(error).rstrip("."))
    except Exception as error:
        _fail(pipe, f"{type(error).__name__}: {error}")


def _loaded(load: Callable[[], nn.Module], pipe: Connection) -> nn.Module:
    """The base, once the first device has read its own.  Raises EOFError where that goes before."""
    model = load()
    tell(pipe, Said("loaded"))
    if isinstance(hear(pipe), Stop):
        raise EOFError
    return model


def _fail(pipe: Connection, why: str) -> None:
    with contextlib.suppress(OSError):
        tell(pipe, Said("failed", why))
    os._exit(1)
