"""Adapters by digest in host memory, and the names that lead to them.

A name is an alias: a reload under it changes where it leads and nothing else, so requests that run finish on the
numbers they began with.  Numbers are read in worker threads; whoever asks gets a future and never waits.
"""

from __future__ import annotations

import dataclasses
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import OptionError
from rankwise.host import Helpers
from rankwise.serve.adapters.base import Listed
from rankwise.serve.adapters.host_tier import HostTier
from rankwise.serve.adapters.kinds import Limits
from rankwise.serve.adapters.mix import mix_manifest, mix_served
from rankwise.serve.adapters.registry import Registry
from rankwise.serve.adapters.source import Lately, no_adapter, shown, valid
from rankwise.serve.adapters.usage import Tally
from rankwise.serve.memory import no_memory
from rankwise.serve.types import AdapterRefused, Overloaded, UnknownAdapter

if TYPE_CHECKING:
    from rankwise.serve.adapters.base import AdapterMetadata, AdapterSource, LoadedAdapter
    from rankwise.serve.adapters.layout import Layout

log = logging.getLogger("rankwise.serve")


#: manifests of mixes and older versions that are remembered although nothing uses them
MANIFESTS = 10_000
Names = list[str]
Listing = list[Listed]


class AdapterCache:
    """See the module.  All methods may be called from any thread; none but ``load`` and ``resolve`` touches a disk.

    Args:
        source: where names come from; runtime loading needs one with ``resolve_path(path, name)``.
        nbytes: budget of the host tier; what is pinned stays, so a load that does not fit beside it is turned away.
        registry: file that keeps runtime-loaded names over restarts.
        workers: threads that read.
        clock: seconds.
        on_load: told (format, outcome, seconds) of each load.
    """

    def __init__(
        self,
        source: AdapterSource,
        layout: Layout,
        *,
        nbytes: int = 4 << 30,
        limits: Limits | None = None,
        registry: str | Path | None = None,
        workers: int = 2,
        clock: Callable[[], float] = time.monotonic,
        on_load: Callable[[str, str, float], None] | None = None,
    ):
        self.source, self.layout, self.limits = source, layout, limits or Limits()
        self.tally = Tally()
        self._registry = Registry(registry)
        self._lately = Lately(self.names)
        self._clock, self.on_load = clock, on_load
        #: told every adapter that was read; raises AdapterRefused where the engine cannot serve that sort
        self.accept: Callable[[LoadedAdapter], object] = lambda served: None
        self._threads = Helpers(workers, thread_name_prefix="adapter-load")
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._writing = threading.Lock()  # names change one at a time; the disk is written under this one alone
        self._known: dict[str, AdapterMetadata] = {}  # by digest
        self._led: dict[str, str] = {}  # name → the digest it last led to
        self._host = HostTier(nbytes, clock, self.tally)
        self._pins: Counter[str] = Counter()
        self._loading: dict[str, Future[LoadedAdapter]] = {}
        self._leaving: set[str] = set()  # digests whose name was unloaded: they go with their last pin

    # --- names ------------------------------------------------------------------------------------------------
    def resolve(self, name: str) -> AdapterMetadata:
        """Where ``name`` leads now.

        Raises:
            UnknownAdapter, AdapterRefused: as the source says; a name that was unloaded is unknown.
        """
        paths, hidden = self._registry.state
        if name in paths:
            return self._note(name, self._resolve_path(paths[name], name))
        if name in hidden:
            raise self._unknown(name)
        try:
            return self._note(name, self.source.resolve(name))
        except UnknownAdapter:
            raise self._unknown(name) from None

    def names(self) -> Names:
        paths, hidden = self._registry.state
        return sorted(set(paths) | (set(self.source.names()) - hidden))

    def list(self) -> Listing:
        """Every name with what is known of it, without reading anything of it."""
        names = self.names()
        with self._lock:
            return [self._listed(n) for n in names]

    def load(self, name: str, path: str) -> AdapterMetadata:
        """Give the adapter at ``path`` the name ``name``, after reading and checking all of it; an older one of that name is let go.

        Raises:
            AdapterRefused: the path or the adapter is refused; the name leads where it led.
        """
        if not valid(name):
            raise AdapterRefused(f"An adapter cannot be called {shown(name)}; use letters, digits, spaces and ._-.")
        manifest = self._resolve_path(path, name)
        with self._lock:
            self._known[manifest.digest] = manifest
            self._leaving.discard(manifest.digest)
        self.fetch(manifest.digest).result()
        with self._writing:
            self._registry.set({**self._registry.names, name: path}, self._registry.hidden - {name})
            with self._lock:
                before, manifest = self._led.get(name), self._note(name, manifest)
                if before is not None and before != manifest.digest:
                    self._part(before)
        return manifest

    def unload(self, name: str, wait: float = 0.0) -> int:
        """Take a name away; its numbers go with the last request that uses them.

        Args:
            wait: seconds to wait for that.

        Returns: how many requests still use them.

        Raises:
            UnknownAdapter: no such name.
        """
        with self._writing:
            if name not in self.names():
                raise self._unknown(name)
            hidden = self._registry.hidden | ({name} if name in self.source.names() else set())
            self._registry.set({n: p for n, p in self._registry.names.items() if n != name}, hidden)
            with self._lock:
                digest = self._led.pop(name, None)
        with self._idle:
            if digest is None:
                return 0
            self._part(digest)
            self._idle.wait_for(lambda: not self._pins[digest], timeout=wait)
            return self._pins[digest]

    def mix(self, parts: Sequence[tuple[str, float]]) -> AdapterMetadata:
        """The manifest of Σ weight·adapter; its numbers are made by :meth:`fetch`.

        Raises:
            UnknownAdapter, AdapterRefused: an adapter of it; see :func:`~rankwise.serve.adapters.mix.mix_manifest`; too large.
        """
        manifest = mix_manifest([(self.resolve(name), weight) for name, weight in parts])
        self.limits.check(manifest)
        with self._lock:
            self._forget()
            return self._known.setdefault(manifest.digest, manifest)

    # --- numbers ----------------------------------------------------------------------------------------------
    def fetch(self, digest: str) -> Future[LoadedAdapter]:
        """The numbers of a resolved adapter or mix, now or later; one load of a digest at a time.

        Pin the digest first (:meth:`acquire`), or they may be gone again before they are used.
        """
        with self._lock:
            manifest = self._manifest(digest)
            if (served := self._host.get(digest)) is not None:
                done: Future[LoadedAdapter] = Future()
                done.set_result(served)
                return done
            if digest not in self._loading:
                future = self._loading[digest] = Future()
                try:
                    self._threads.submit(self._load, manifest, future)
                except BaseException:  # no thread to be had: nobody may wait for it
                    self._loading.pop(digest, None)
                    raise
                return future
            return self._loading[digest]

    def known(self, digest: str) -> AdapterMetadata:
        """The manifest of a digest that was resolved.

        Raises:
            UnknownAdapter: it was not.
        """
        with self._lock:
            return self._manifest(digest)

    def get(self, digest: str) -> LoadedAdapter | None:
        """The numbers, where they are in memory."""
        with self._lock:
            return self._host.get(digest)

    def acquire(self, digest: str) -> None:
        """Hold a digest: while held it stays in memory once it is there."""
        with self._lock:
            self._manifest(digest)
            self._pin(digest, 1)

    def release(self, digest: str) -> None:
        """Let go what :meth:`acquire` held.

        Raises:
            OptionError: it is not held.
        """
        with self._idle:
            if self._pins[digest] < 1:
                raise OptionError(f"The adapter {digest[:12]} is released more often than it was acquired.")
            self._pin(digest, -1)
            if not self._pins[digest]:
                del self._pins[digest]
                self._part(digest) if digest in self._leaving else None
                self._idle.notify_all()

    def relieve(self) -> None:
        """Let go of all numbers in memory that nobody holds."""
        with self._lock:
            self._host.relieve()

    @property
    def nbytes(self) -> int:
        """Bytes of the host tier."""
        with self._lock:
            return self._host.nbytes

    def close(self) -> None:
        """Stop the threads, after the loads that run."""
        self._threads.shutdown(wait=True)

    # --- inside -----------------------------------------------------------------------------------------------
    def _load(self, manifest: AdapterMetadata, future: Future[LoadedAdapter]) -> None:
        start, what = self._clock(), manifest.meta.get("format", manifest.source)
        try:
            served = self._read(manifest)
            self._keep(served, self._clock() - start)
            outcome: tuple[str, LoadedAdapter | BaseException] = ("ok", served)
        except BaseException as error:
            outcome = ("refused" if isinstance(error, AdapterRefused) else "error", error)
        with self._lock:
            self._loading.pop(manifest.digest, None)
            self.tally.loads[what, outcome[0]] += 1
        seconds = self._clock() - start
        if isinstance(outcome[1], BaseException):
            future.set_exception(outcome[1])
        else:
            future.set_result(outcome[1])
        if self.on_load is not None:
            try:
                self.on_load(what, outcome[0], seconds)
            except Exception as error:  # who listens may not keep anybody from an adapter
                log.error("the listener of adapter loads failed", exc_info=error)

    def _read(self, manifest: AdapterMetadata) -> LoadedAdapter:
        """The numbers; where memory runs out once more after every idle adapter has gone, whoever asked is to come back.

        Raises:
            Overloaded: there is no memory for it now.
        """
        for _ in range(2):
            try:
                return self._made(manifest)
            except (MemoryError, RuntimeError) as error:
                if not no_memory(error):
                    raise
                self.relieve()
        raise Overloaded(f"There is no memory left to read the adapter {manifest.name!r}; try again later.", 5.0)

    def _made(self, manifest: AdapterMetadata) -> LoadedAdapter:
        if not manifest.parts:
            served = self.source.fetch(manifest)
        else:
            parts = [(self.get(d) or self.source.fetch(self._manifest(d)), w) for d, w in manifest.parts]
            served = mix_served(manifest, parts, self.layout)
            self.limits.check(served.manifest)
        self.accept(served)
        return served

    def _keep(self, served: LoadedAdapter, seconds: float) -> None:
        """Into the host tier; see :meth:`.host_tier.HostTier.put` for what it raises."""
        digest = served.manifest.digest
        with self._lock:
            self._host.put(served, seconds, self._pins[digest])
            self._known[digest] = served.manifest

    def _note(self, name: str, manifest: AdapterMetadata) -> AdapterMetadata:
        """Remember where a name leads; what was measured of the same digest before is kept."""
        with self._lock:
            self._known.setdefault(manifest.digest, manifest)
            self._led[name] = manifest.digest
            self._leaving.discard(manifest.digest)
            return dataclasses.replace(self._known[manifest.digest], name=name, source=manifest.source)

    def _forget(self) -> None:
        """Forget the oldest manifests that nothing leads to or uses: callers can make up mixes without end."""
        if len(self._known) >= 2 * MANIFESTS:
            used = {*self._led.values(), *self._host.kept, *self._pins, *self._loading}
            parts = {d for k in used if k in self._known for d, _ in self._known[k].parts}
            idle = [d for d in self._known if d not in used and d not in parts]
            for digest in idle[:-MANIFESTS]:
                del self._known[digest]

    def _part(self, digest: str) -> None:
        """Let the numbers of a digest go that no name leads to: now, or with the last pin."""
        if digest in self._led.values():
            return
        if self._pins[digest]:
            self._leaving.add(digest)
        else:
            self._leaving.discard(digest)
            self._host.kept.pop(digest, None)

    def _pin(self, digest: str, n: int) -> None:
        self._pins[digest] += n
        if digest in self._host.kept:
            self._host.kept[digest].use.pins = self._pins[digest]

    def _manifest(self, digest: str) -> AdapterMetadata:
        if digest not in self._known:
            raise UnknownAdapter(f"No adapter with the digest {digest[:12]!r} was resolved.")
        return self._known[digest]

    def _listed(self, name: str) -> Listed:
        digest = self._led.get(name, "")
        known = self._known.get(digest)
        manifest = None if known is None else dataclasses.replace(known, name=name)
        tier = "host" if digest in self._host.kept else "disk"
        return Listed(name, manifest, tier, self._pins[digest] if digest else 0, name in self._registry.names)

    def _resolve_path(self, path: str, name: str) -> AdapterMetadata:
        if not hasattr(self.source, "resolve_path"):
            raise AdapterRefused(f"The adapter {name!r} cannot be loaded: this server's source of adapters takes no paths.")
        return self.source.resolve_path(path, name)

    def _unknown(self, name: str) -> UnknownAdapter:
        if not valid(name):
            return UnknownAdapter(f"There is no adapter {shown(name)}: it is no valid adapter name.")
        return no_adapter(name, self._lately())
