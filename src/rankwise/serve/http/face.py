"""Where the HTTP side and the engine's side meet: what the routes ask of an engine and of an adapter cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterMetadata
    from rankwise.serve.types import Event, Request

#: name, value, labels: the engine reports a timing, a size or a count
Observer = Callable[[str, float, Mapping[str, str]], None]


class EngineStats(Protocol):
    """The engine at this moment.  ``kv_*`` are cache blocks, ``lora_pages_*`` pages of adapters, ``step_seconds`` the last step's."""

    @property
    def running(self) -> int: ...
    @property
    def waiting(self) -> int: ...
    @property
    def kv_used(self) -> int: ...
    @property
    def kv_total(self) -> int: ...
    @property
    def lora_pages_used(self) -> int: ...
    @property
    def lora_pages_total(self) -> int: ...
    @property
    def copies_bytes(self) -> int: ...
    @property
    def steps(self) -> int: ...
    @property
    def step_seconds(self) -> float: ...
    @property
    def healthy(self) -> bool: ...
    @property
    def error(self) -> str | None: ...
    @property
    def counters(self) -> Mapping[str, float]: ...


class Engine(Protocol):
    """A step loop on a thread of its own.

    ``observer`` is called on that thread, so it is quick and never raises.
    """

    observer: Observer | None

    def start(self) -> None:
        """Begin to step; returns when requests are taken."""
        ...

    def stop(self, *, drain: bool = True, timeout: float = 30.0) -> None:
        """End the loop; with ``drain`` what runs is finished first, for at most ``timeout`` seconds."""
        ...

    def submit(self, request: Request, on_event: Callable[[Event], None]) -> None:
        """Queue a request; returns at once.  Events come on the engine's thread, the last one is a ``Finished``.

        Raises:
            Overloaded: the queue is full.
            OptionError: prompt and ``max_tokens`` can never fit.
        """
        ...

    def cancel(self, request_id: str) -> None:
        """Stop a request within a step and free what it holds; of an unknown or finished id, nothing."""
        ...

    def stats(self) -> EngineStats: ...


class Listed(Protocol):
    """One known name: its manifest (None before it was first asked for), tier, and how many requests hold it."""

    @property
    def name(self) -> str: ...
    @property
    def manifest(self) -> AdapterMetadata | None: ...
    @property
    def tier(self) -> str: ...
    @property
    def pins(self) -> int: ...


class Tally(Protocol):
    """What the cache counts."""

    @property
    def evictions(self) -> Mapping[str, int]:
        """By tier."""
        ...


class AdapterCache(Protocol):
    """Adapters by name.  Every method may read files, so the routes call them on worker threads.

    ``on_load`` is told (format, outcome, seconds) of each load, on the thread that loaded.
    """

    on_load: Callable[[str, str, float], None] | None

    @property
    def tally(self) -> Tally: ...

    def resolve(self, name: str) -> AdapterMetadata:
        """Raises UnknownAdapter, AdapterRefused."""
        ...

    def mix(self, parts: Sequence[tuple[str, float]]) -> AdapterMetadata:
        """The exact linear mix of (name, weight) pairs.  Raises UnknownAdapter, AdapterRefused."""
        ...

    def load(self, name: str, path: str) -> AdapterMetadata:
        """Make the folder ``path`` known as ``name``, in the place of an earlier one.

        Raises:
            AdapterRefused: a path outside the folders of adapters; an adapter that cannot be served.
        """
        ...

    def unload(self, name: str, wait: float = 0.0) -> int:
        """Forget ``name``; how many requests still run on it after ``wait`` seconds.  Raises UnknownAdapter."""
        ...

    def list(self) -> Sequence[Listed]:
        """Every known name."""
        ...
