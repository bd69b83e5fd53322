"""Locks by key."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator


class Locks:
    """A lock for each key, made when asked for and gone when nobody holds or awaits it."""

    def __init__(self) -> None:
        self._all: dict[Hashable, tuple[threading.Lock, list[int]]] = {}
        self._guard = threading.Lock()

    @contextlib.contextmanager
    def __call__(self, key: Hashable) -> Iterator[None]:
        with self._guard:
            lock, users = self._all.setdefault(key, (threading.Lock(), [0]))
            users[0] += 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                users[0] -= 1
                if not users[0]:
                    del self._all[key]
