"""Adapters in folders of folders: a name is a sub-folder of a configured root, and nothing outside the roots is ever opened."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.errors import OptionError, nearest
from rankwise.serve.adapters.read import holds_adapter, refusing
from rankwise.serve.types import AdapterRefused, UnknownAdapter
from rankwise.store.names import check_name

if TYPE_CHECKING:
    from rankwise.serve.adapters.adapter_loader import AdapterLoader
    from rankwise.serve.adapters.base import AdapterMetadata, AdapterSource, LoadedAdapter


class FolderSource:
    """Sub-folders of ``roots`` that hold an adapter: native (coded too), PEFT, diffusers, kohya or GGUF; never a pickle.

    Where two roots have one name, the first root's is meant.  A link may stand inside a root as long as it leads to
    somewhere inside the roots.
    """

    def __init__(self, roots: str | os.PathLike[str] | Sequence[str | os.PathLike[str]], adapter_loader: AdapterLoader):
        given = [roots] if isinstance(roots, (str, os.PathLike)) else list(roots)
        self.adapter_loader = adapter_loader
        self.roots = tuple(Path(os.path.realpath(r)) for r in given)
        self._lately = Lately(self.names)
        missing = next((r for r in given if not os.path.isdir(r)), None)
        if missing is not None or not given:
            raise OptionError(f"The folder of adapters {os.fspath(missing or '')!r} is no folder; give one that exists.")

    def names(self) -> list[str]:
        """Every sub-folder with a usable name that looks like an adapter."""
        found: set[str] = set()
        for root in self.roots:
            with os.scandir(root) as entries:
                found |= {e.name for e in entries if e.is_dir() and valid(e.name) and self._mine(e) and holds_adapter(e.path)}
        return sorted(found)

    def _mine(self, entry: os.DirEntry[str]) -> bool:
        return not entry.is_symlink() or self._inside(Path(entry.path)) is not None

    def resolve(self, name: str) -> AdapterMetadata:
        """See :meth:`~rankwise.serve.adapters.adapter_loader.AdapterLoader.resolve`.

        Raises:
            UnknownAdapter: no such sub-folder; the message lists the nearest names.
            AdapterRefused: what the adapter loader refuses; a link out of the roots.
        """
        if not valid(name):
            raise UnknownAdapter(f"There is no adapter {shown(name)}: it is no valid adapter name.")
        for root in self.roots:
            if os.path.lexists(root / name):
                return self._open(root / name, name)
        raise no_adapter(name, self._lately())

    def resolve_path(self, path: str | os.PathLike[str], name: str) -> AdapterMetadata:
        """The adapter in a folder, given by its path (absolute, or below a root), under a name of the caller's choice.

        Raises:
            AdapterRefused: outside the roots, no folder, or what the adapter loader refuses.
        """
        for root in self.roots:
            candidate = root / path
            if os.path.isdir(candidate) and self._inside(candidate) is not None:
                return self._open(candidate, name)
        raise AdapterRefused(
            f"The adapter {name!r} cannot be loaded: its path is no folder inside the folders of adapters of this server."
        )

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        return self.adapter_loader.fetch(manifest)

    def _open(self, folder: Path, name: str) -> AdapterMetadata:
        real = self._inside(folder)
        if real is None:
            raise AdapterRefused(f"The adapter {name!r} lies outside the folders of adapters of this server.")
        root = next(r for r in self.roots if real.is_relative_to(r))
        with refusing(name, real), beneath(root, real) as at:
            return self.adapter_loader.resolve(real, at, name, os.fspath(real.relative_to(root)))

    def _inside(self, folder: Path) -> Path | None:
        """Where a folder really is, if that is below a root."""
        real = Path(os.path.realpath(folder))
        return real if any(real != r and real.is_relative_to(r) for r in self.roots) else None


class Sources:
    """Several sources as one; the first that knows a name answers."""

    def __init__(self, *sources: AdapterSource):
        self.sources = sources
        self._lately = Lately(self.names)
        self._of: dict[str, AdapterSource] = {}

    def names(self) -> list[str]:
        return sorted({n for s in self.sources for n in s.names()})

    def resolve(self, name: str) -> AdapterMetadata:
        for source in self.sources:
            with contextlib.suppress(UnknownAdapter):
                return self._noted(source, source.resolve(name))
        raise (
            no_adapter(name, self.names())
            if valid(name)
            else UnknownAdapter(f"There is no adapter {shown(name)}: it is no valid adapter name.")
        )

    def resolve_path(self, path: str, name: str) -> AdapterMetadata:
        """By the first source that takes the path; the last refusal where none does."""
        refused: AdapterRefused | None = None
        for source in self.sources:
            if hasattr(source, "resolve_path"):
                try:
                    return self._noted(source, source.resolve_path(path, name))
                except AdapterRefused as error:
                    refused = error
        raise refused or AdapterRefused(f"The adapter {name!r} cannot be loaded: no source of this server takes paths.")

    def fetch(self, manifest: AdapterMetadata) -> LoadedAdapter:
        if manifest.digest not in self._of:
            raise AdapterRefused(f"The adapter {manifest.name!r} was not resolved here; resolve it first.")
        return self._of[manifest.digest].fetch(manifest)

    def _noted(self, source: AdapterSource, manifest: AdapterMetadata) -> AdapterMetadata:
        self._of[manifest.digest] = source
        return manifest


class Lately:
    """What ``fn`` gave at most ``seconds`` ago: names for a message, so that a flood of wrong ones lists no folders."""

    def __init__(self, fn: Callable[[], list[str]], seconds: float = 2.0):
        self._fn, self._seconds = fn, seconds
        self._last: tuple[float, list[str]] | None = None

    def __call__(self) -> list[str]:
        now, last = time.monotonic(), self._last
        if last is None or now - last[0] > self._seconds:
            self._last = last = (now, self._fn())
        return last[1]


@contextlib.contextmanager
def beneath(root: Path, folder: Path) -> Iterator[int]:
    """A descriptor of ``folder``, reached from ``root`` without following a link: what was checked is what is read."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    at = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in folder.relative_to(root).parts:
            deeper = os.open(part, flags, dir_fd=at)
            os.close(at)
            at = deeper
        yield at
    finally:
        os.close(at)


def valid(name: object) -> bool:
    """Whether an adapter may be called so (never a path)."""
    try:
        check_name(name)
    except OptionError:
        return False
    return True


def shown(name: object) -> str:
    """A name as a message may hold it, whatever it is."""
    return repr(name if len(str(name)) <= 128 else str(name)[:128] + "…")


def no_adapter(name: str, known: Iterable[str]) -> UnknownAdapter:
    return UnknownAdapter(f"There is no adapter {shown(name)}; {nearest(name, known)}")
