"""Adapters behind a URL that fsspec reads (``s3://``, ``gs://``, ``memory://``, ``file://``): copied here by version, then read as folders are."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.errors import need
from rankwise.serve.adapters.locks import Locks
from rankwise.serve.adapters.read import refusing
from rankwise.serve.adapters.source import FolderSource, no_adapter, shown, valid
from rankwise.serve.types import AdapterRefused, UnknownAdapter
from rankwise.store.atomic import write_folder
from rankwise.store.peft.config import CONFIG

if TYPE_CHECKING:
    from rankwise.serve.adapters.adapter_loader import AdapterLoader
    from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter

#: what tells one version of a remote file from another, as file systems call it
_STAMPS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "md5Hash", "generation", "uid", "ino")


class UriSource:
    """Adapters behind URLs; a version is copied once into ``cache``, under a name made of what the store says of its files.

    Only plain files of one folder are copied, all of them together within the adapter loader's byte limit, whatever the
    store says of them.  Copies longest out of use go first, and are copied again when they are asked for.

    Args:
        roots: URLs whose sub-folders are the adapters.
        adapter_loader: reads the copies.
        cache: folder of the copies.
        refresh: seconds before a store is asked again whether an adapter is still what it was.
        keep_bytes: of the disk that all copies together take at most; one alone may be larger.
        storage_options: for fsspec, where environment variables do not say enough (credentials).
    """

    def __init__(
        self,
        roots: str | Sequence[str],
        adapter_loader: AdapterLoader,
        cache: str | os.PathLike[str],
        *,
        refresh: float = 2.0,
        keep_bytes: int = 64 << 30,
        **storage_options: Any,
    ):
        self.roots = tuple(r.rstrip("/") for r in ([roots] if isinstance(roots, str) else roots))
        self.cache = Path(cache)
        self.cache.mkdir(parents=True, exist_ok=True)
        self._local = FolderSource(self.cache, adapter_loader)
        self._adapter_loader, self._options, self.refresh, self.keep_bytes = adapter_loader, storage_options, refresh, keep_bytes
        self._locks, self._guard = Locks(), threading.Lock()
        self._asked: dict[str, tuple[float, str | None]] = {}  # url of a folder → when it was last asked for, its version here
        self._copied: dict[str, list[str]] = {}  # url of a folder → its last two versions here

    def names(self) -> list[str]:
        found: set[str] = set()
        for root in self.roots:
            fs, path = self._fs(root)
            if fs.isdir(path):
                found |= {n for e in fs.ls(path, detail=True) if e["type"] == "directory" and valid(n := _leaf(e["name"]))}
        return sorted(found)

    def resolve(self, name: str) -> AdapterMetadata:
        """The adapter of that name, its newest version copied here.

        Raises:
            UnknownAdapter, AdapterRefused: as :class:`~rankwise.serve.adapters.source.FolderSource`; the store cannot be read.
        """
        if not valid(name):
            raise UnknownAdapter(f"There is no adapter {shown(name)}: it is no valid adapter name.")
        for root in self.roots:
            found = self._version(f"{root}/{name}", name)
            if found is not None:
                return found
        raise no_adapter(name, self.names())

    def resolve_path(self, path: str, name: str) -> AdapterMetadata:
        """The adapter in a folder given by its URL, which is one name below a root."""
        root, _, leaf = path.rstrip("/").rpartition("/")
        found = self._version(f"{root}/{leaf}", name) if root in self.roots and valid(leaf) else None
        if found is None:
            raise AdapterRefused(
                f"The adapter {name!r} cannot be loaded: its URL is no folder inside the stores of adapters of this server."
            )
        return found

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        return self._local.fetch(manifest)

    def _version(self, url: str, name: str) -> AdapterMetadata | None:
        with self._locks(url), refusing(name):
            asked, version = self._asked.get(url, (-math.inf, None))
            gone = version is not None and not (self.cache / version).is_dir()  # others' copies needed its room
            if gone or time.monotonic() - asked >= self.refresh:
                version = self._newest(url, name)
                if len(self._asked) > 10_000:  # names that nobody has can be made up without end
                    self._asked.clear()
                self._asked[url] = (time.monotonic(), version)
            if version is None:
                return None
            return dataclasses.replace(self._local.resolve_path(version, name), source=url)

    def _newest(self, url: str, name: str) -> str | None:
        """The folder here of the newest version, copied if it is new; None where the store has no such folder."""
        for _ in range(3):
            fs, files = self._list(url, name)
            if not files:
                return None
            version = _version_of(url, files)
            if not (self.cache / version).is_dir():
                content = self._copy(fs, files, name)
                if _version_of(url, self._list(url, name)[1]) != version:
                    continue  # some of its files were replaced while the others were copied
                write_folder(self.cache / version, content)
                self._make_room(version)
            os.utime(self.cache / version)  # when it was last of use
            self._forget_older(url, version)
            return version
        raise AdapterRefused(f"The adapter {name!r} is being written to; ask for it again when it is whole.")

    def _list(self, url: str, name: str) -> tuple[Any, list[dict[str, Any]]]:
        try:
            fs, path = self._fs(url)
            fs.invalidate_cache()
            return fs, [e for e in fs.ls(path, detail=True) if e["type"] == "file"] if fs.isdir(path) else []
        except (OSError, ValueError) as error:
            raise AdapterRefused(f"The adapter {name!r} cannot be read from its store: {type(error).__name__}.") from error

    def _copy(self, fs: Any, files: list[dict[str, Any]], name: str) -> dict[str, bytes]:
        wanted = [e for e in files if (leaf := _leaf(e["name"])) == CONFIG or leaf.endswith((".safetensors", ".gguf"))]
        limits = self._adapter_loader.limits
        limits.check_file(name, sum(e.get("size") or 0 for e in wanted))
        out: dict[str, bytes] = {}
        for entry in wanted:
            had = sum(map(len, out.values()))
            try:
                out[_leaf(entry["name"])] = read = fs.cat_file(entry["name"], start=0, end=limits.most_in_files - had + 1)
            except OSError as error:
                raise AdapterRefused(f"The adapter {name!r} cannot be read from its store: {type(error).__name__}.") from error
            limits.check_file(name, had + len(read))
        if not out:
            raise AdapterRefused(f"The adapter {name!r} holds no .safetensors or .gguf file.")
        return out

    def _make_room(self, version: str) -> None:
        """Remove the copies longest out of use until the others fit, whatever process made them; ``version`` stays."""
        with self._guard:
            copies = [
                (p.stat().st_mtime, sum(f.stat().st_size for f in p.iterdir()), p) for p in self.cache.iterdir() if p.is_dir()
            ]
            total = sum(size for _, size, _ in copies)
            for _, size, folder in sorted(copies):
                if total > self.keep_bytes and folder.name != version:
                    shutil.rmtree(folder, ignore_errors=True)
                    total -= size

    def _forget_older(self, url: str, version: str) -> None:
        """Keep one version back, for a load that was asked for before the change; remove what is older."""
        with self._guard:
            kept = self._copied.setdefault(url, [])
            if version in kept:
                return
            kept.append(version)
            gone = kept.pop(0) if len(kept) > 2 else None
        if gone is not None:
            shutil.rmtree(self.cache / gone, ignore_errors=True)

    def _fs(self, url: str) -> tuple[Any, str]:
        try:
            import fsspec
        except ImportError as error:
            raise need("fsspec", "serve", "An adapter behind a URL") from error
        return fsspec.core.url_to_fs(url, **self._options)


def _leaf(path: str) -> str:
    return str(path).rstrip("/").rpartition("/")[2]


def _version_of(url: str, files: list[dict[str, Any]]) -> str:
    """A folder name for exactly these files as the store describes them."""
    said = [[_leaf(e["name"]), e.get("size"), *(str(e[k]) for k in _STAMPS if k in e)] for e in files]
    return "v" + hashlib.sha256(json.dumps([url, sorted(said)]).encode()).hexdigest()[:40]
