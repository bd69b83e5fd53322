"""Folders to manifests and prepared numbers, for one base: everything is checked once, and what was checked is known by digest."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections import OrderedDict
from pathlib import Path

from torch import nn

from rankwise.errors import ArtefactError
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.kinds import Limits, Options, prepare
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.adapters.locks import Locks
from rankwise.serve.adapters.read import AdapterFile, Key, is_plain, kind_of, plain_served, read_adapter, refusing, state_key
from rankwise.serve.adapters.values import ValueReader
from rankwise.serve.types import AdapterRefused
from rankwise.store.fingerprint import compare, fingerprint


class AdapterLoader:
    """Reads adapters for one base; make it before the base's modules are wrapped or their weights repacked.

    Args:
        model: the plain base, no adapter attached.
        layout, options, limits: where changes go, how they are prepared, what one adapter may take.
        check_base: refuse a native adapter whose base had other values, not only other shapes.
        keep: bytes of adapters that were resolved and are kept for the fetch that follows.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        layout: Layout | None = None,
        options: Options | None = None,
        limits: Limits | None = None,
        check_base: bool = True,
        keep: int = 64 << 20,
    ):
        self.layout = layout or Layout(model)
        self.options, self.limits = options or Options(), limits or Limits()
        self.reader = ValueReader(model)
        self.config = getattr(model, "config", None)
        self.base = fingerprint(model, content=check_base)
        self.check_base = check_base
        self._seen: dict[Path, tuple[Key, AdapterMetadata]] = {}
        self._where: dict[str, dict[Path, None]] = {}
        self._fresh: OrderedDict[str, LoadedAdapter] = OrderedDict()
        self._keep = keep
        self._locks, self._guard = Locks(), threading.Lock()

    def resolve(self, folder: Path, at: int, name: str, source: str) -> AdapterMetadata:
        """The manifest of the adapter in an open folder; a version that was seen before costs a look at its files' dates.

        Identity needs every byte once: a first look reads the files, checks all there is to check, and keeps what it
        made for a :meth:`fetch` that follows soon.

        Args:
            folder, at: its path, and a descriptor of it, through which all is read.
            name, source: how it was asked for, and where it comes from, for the manifest and messages.

        Raises:
            AdapterRefused: what :func:`~rankwise.serve.adapters.read.read_adapter` and ``prepare`` refuse, another base, too large.
        """
        with self._locks(folder), refusing(name, folder):
            for _ in range(5):
                key = state_key(at)
                seen = self._seen.get(folder)
                if seen is not None and seen[0] == key:
                    return dataclasses.replace(seen[1], name=name, source=source)
                self.limits.check_file(name, sum(size for _, size, *_ in key))
                served = self._prepare(self._read(folder, at, name), name, source)
                if state_key(at) == key:
                    return self._remember(folder, key, served)
            raise AdapterRefused(f"The adapter {name!r} is being written to; ask for it again when it is whole.")

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        """The numbers of a resolved adapter; one load of a digest at a time.

        Raises:
            AdapterRefused: its files changed or went since it was resolved.
        """
        with self._locks(manifest.digest):
            with self._guard:
                served = self._fresh.pop(manifest.digest, None)
                folders = list(self._where.get(manifest.digest, ()))
            if served is not None:
                return dataclasses.replace(served, manifest=dataclasses.replace(served.manifest, name=manifest.name))
            for folder in folders:
                found = self._again(folder, manifest)
                if found is not None:
                    return found
        raise AdapterRefused(f"The adapter {manifest.name!r} changed on disk since it was resolved, or is gone; ask for it again.")

    def _again(self, folder: Path, manifest: AdapterMetadata) -> LoadedAdapter | None:
        """The adapter in a folder where its digest was found before, or None where that is no longer so."""
        try:
            at = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            read = self._read(folder, at, manifest.name, trusted=True)
        finally:
            os.close(at)
        return self._prepare(read, manifest.name, manifest.source) if read.digest == manifest.digest else None

    def _read(self, folder: Path, at: int, name: str, trusted: bool = False) -> AdapterFile:
        return read_adapter(at, folder, name, self.layout, self.config, self.options, trusted=trusted)

    def _prepare(self, read: AdapterFile, name: str, source: str) -> LoadedAdapter:
        with refusing(name):
            self._check(read)
            kind = kind_of(read.head)
            manifest = AdapterMetadata(read.digest, name, source, kind, 0, 0, 0, meta={"format": read.format})
            if is_plain(kind, read.head, self.layout):
                served = plain_served(read, self.layout, manifest, self.options)
            else:
                values = self.reader.values(read.head, read.tensors, name)
                served = prepare(self.layout, values, manifest, self.options)
            self.limits.check(served.manifest)
            return served

    def _check(self, read: AdapterFile) -> None:
        """Native adapters say which base they are of; the others' names and shapes were checked as they were read."""
        if read.format != "native":
            return
        differences = compare(read.head["fingerprint"], self.base)
        shapes = [d for d in differences if not d.startswith("content")]
        if shapes or (differences and self.check_base):
            raise ArtefactError(f"it was made for another base: {'; '.join(differences[:4])}.")

    def _remember(self, folder: Path, key: Key, served: LoadedAdapter) -> AdapterMetadata:
        manifest = served.manifest
        with self._guard:
            self._seen[folder] = (key, manifest)
            self._where.setdefault(manifest.digest, {})[folder] = None
            self._fresh[manifest.digest] = served
            while self._fresh and sum(s.manifest.nbytes for s in self._fresh.values()) > self._keep:
                self._fresh.popitem(last=False)
        return manifest
