"""Adapters that training hands over without a file: published under a name, each time as a new version."""

from __future__ import annotations

import dataclasses
import json
import threading
from typing import TYPE_CHECKING

from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.kinds import Limits, Options, prepare
from rankwise.serve.adapters.source import no_adapter, shown, valid
from rankwise.serve.adapters.values import values_of
from rankwise.serve.types import AdapterRefused
from rankwise.store import tensorfile

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.serve.adapters.layout import Layout


class MemorySource:
    """The last published version of each name; an older one is known no more (who still uses it has it pinned).

    ``publish`` copies, so call it between two optimiser steps.
    """

    def __init__(self, layout: Layout, *, options: Options | None = None, limits: Limits | None = None):
        self.layout, self.options, self.limits = layout, options or Options(), limits or Limits()
        self._by_name: dict[str, LoadedAdapter] = {}
        self._lock = threading.Lock()

    def publish(self, name: str, adapter: Adapter) -> AdapterMetadata:
        """Take over what ``adapter`` is now, from whichever model of the base's shapes it is attached to.

        Raises:
            AdapterRefused: no valid name, numbers that are not finite, a kind or size that cannot be served.
        """
        if not valid(name):
            raise AdapterRefused(f"An adapter cannot be called {shown(name)}; use letters, digits, spaces and ._-.")
        manifest = AdapterMetadata(
            _digest(adapter, self.options), name, "memory", _kind(adapter), 0, 0, 0, meta={"format": "memory"}
        )
        served = prepare(self.layout, values_of(adapter), manifest, self.options)
        self.limits.check(served.manifest)
        with self._lock:
            self._by_name[name] = served
        return served.manifest

    def withdraw(self, name: str) -> None:
        """Forget a name."""
        with self._lock:
            if self._by_name.pop(name, None) is None:
                raise no_adapter(name, self._by_name)

    def names(self) -> list[str]:
        with self._lock:
            return sorted(self._by_name)

    def resolve(self, name: str) -> AdapterMetadata:
        with self._lock:
            if name not in self._by_name:
                raise no_adapter(name, self._by_name)
            return self._by_name[name].manifest

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        with self._lock:
            for served in self._by_name.values():
                if served.manifest.digest == manifest.digest:
                    return dataclasses.replace(served, manifest=dataclasses.replace(served.manifest, name=manifest.name))
        raise AdapterRefused(f"The adapter {manifest.name!r} was published anew since it was resolved; ask for it again.")


def _kind(adapter: Adapter) -> str:
    return "+".join(sorted({p.form.info.name for p in adapter._record.parts}))


def _digest(adapter: Adapter, options: Options) -> str:
    parts = [
        {"ranks": p.plan.ranks, "scales": p.plan.scales, "part": p.part.model_dump(mode="json")} for p in adapter._record.parts
    ]
    states = {n: d.file_state() for n, d in adapter.sites.items()}
    salt = json.dumps(["memory", options.salt(), parts, states], sort_keys=True)
    return tensorfile.digest(adapter.tensors(), salt)
