"""Bytes to disk so that a reader sees the old state or the new one, whatever is killed, full or unplugged.

The recipe: a temporary in the *same* folder → write → sync → rename over → sync the folder.  A folder of files is
prepared whole beside the old one and the two are exchanged in one step.  Every call to the system goes through a
:class:`Files` object, so that a test can make the k-th one fail or model a power cut.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from rankwise.errors import ArtefactError

Chunks = bytes | bytearray | memoryview | Iterable[bytes | bytearray | memoryview]

_PREFIX = ".rankwise-"
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_live: set[str] = set()  # temporaries of this process that are in use
_live_lock = threading.Lock()


class Files:
    """The file layer: one method a system call."""

    def create(self, path: Path) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)  # the umask decides the mode

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def sync(self, fd: int) -> None:
        if sys.platform == "darwin":
            import fcntl

            fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # an ordinary sync stops at the drive's cache there
        else:
            os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        os.rename(source, target)

    def exchange(self, a: Path, b: Path) -> None:
        """Swap two names in one step; OSError(ENOSYS) where the system cannot."""
        call = _renameat2()
        if call is None:
            raise OSError(errno.ENOSYS, "no atomic exchange", os.fspath(b))
        if call(-100, os.fsencode(a), -100, os.fsencode(b), 2) != 0:  # AT_FDCWD, RENAME_EXCHANGE
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), os.fspath(b))

    def sync_folder(self, path: Path) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def mkdir(self, path: Path) -> None:
        os.mkdir(path)

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target, follow_symlinks=False)

    def unlink(self, path: Path) -> None:
        os.unlink(path)

    def rmdir(self, path: Path) -> None:
        os.rmdir(path)

    def listdir(self, path: Path) -> list[str]:
        return os.listdir(path)

    def kind(self, path: Path) -> str:
        """``"file"``, ``"folder"``, ``"link"`` or ``""`` where there is nothing."""
        try:
            mode = os.lstat(path).st_mode
        except (FileNotFoundError, NotADirectoryError):
            return ""
        return "folder" if stat.S_ISDIR(mode) else "link" if stat.S_ISLNK(mode) else "file"


def _renameat2() -> ctypes._CFuncPtr | None:  # type: ignore[name-defined]
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)


FILES = Files()


def is_temporary(name: str) -> bool:
    """Whether a directory entry is one of ours that must never be listed."""
    return name.startswith(_PREFIX)


def replace_file(path: str | os.PathLike[str], data: Chunks, *, files: Files = FILES) -> None:
    """Write ``data`` to ``path``: afterwards it is whole and durable, before that the old file stands.

    Raises:
        ArtefactError: the system refused; names the path.  The old file is unharmed.
    """
    target = Path(path)
    try:
        make_folder(target.parent, files=files)
        sweep(target.parent, files=files)
        with _temporary(target.parent, "tmp") as temp:
            try:
                _write_synced(temp, data, files)
                files.rename(temp, target)
            except BaseException:
                _quietly(files.unlink, temp)
                raise
        files.sync_folder(target.parent)
    except OSError as e:
        raise _refused(target, e) from e


write_bytes = replace_file


def write_folder(path: str | os.PathLike[str], contents: Mapping[str, Chunks], *, files: Files = FILES) -> None:
    """Make ``path`` a folder that holds ``contents`` (name → bytes), replacing an older version in one step.

    Files of the old folder that ``contents`` does not name are carried over (hard links).

    Raises:
        ArtefactError: the system refused; names the path.  The old folder is unharmed.
    """
    target = Path(os.path.realpath(path))
    try:
        if files.kind(target) == "file":
            raise OSError(errno.ENOTDIR, "a file stands where the folder should be", os.fspath(target))
        make_folder(target.parent, files=files)
        with locked(target.parent) if files is FILES else contextlib.nullcontext():
            sweep(target.parent, files=files)
            with _temporary(target.parent, "tmp") as temp:
                try:
                    _fill(temp, target, contents, files)
                    _swap(temp, target, files)
                except BaseException:
                    _quietly(_remove_tree, temp, files)
                    raise
                files.sync_folder(target.parent)
                _quietly(_remove_tree, temp, files)  # now the old version, if there was one
    except OSError as e:
        raise _refused(target, e) from e


def make_folder(path: Path, *, files: Files = FILES) -> None:
    """``mkdir -p``, each new level synced into its parent."""
    kind = files.kind(path)
    if kind in {"folder", "link"}:
        return
    if kind == "file":
        raise OSError(errno.ENOTDIR, "a file stands where the folder should be", os.fspath(path))
    make_folder(path.parent, files=files)
    with contextlib.suppress(FileExistsError):
        files.mkdir(path)
    files.sync_folder(path.parent)


def sweep(folder: str | os.PathLike[str], *, files: Files = FILES) -> None:
    """Remove temporaries that dead writers left in ``folder``; put back a folder lost between two renames."""
    folder = Path(folder)
    for name in files.listdir(folder):
        if not is_temporary(name) or not _abandoned(folder / name, name):
            continue
        what, _, rest = name[len(_PREFIX) :].partition(".")
        original = rest.split(".", 3)[-1] if what == "old" else ""
        if original and not files.kind(folder / original):
            files.rename(folder / name, folder / original)
        elif files.kind(folder / name) == "folder":
            _quietly(_remove_tree, folder / name, files)
        else:
            _quietly(files.unlink, folder / name)


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Hold the advisory lock of ``folder`` (between processes and threads); it goes with the process."""
    try:
        import fcntl
    except ImportError:  # no advisory locks on this system: each write is still atomic by itself
        yield
        return
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def _temporary(folder: Path, what: str, original: str = "") -> Iterator[Path]:
    """A fresh hidden name in ``folder`` that tells whose it is, kept from :func:`sweep` while in use."""
    tail = f".{original}" if original else ""
    name = f"{_PREFIX}{what}.{_HOST}.{os.getpid()}.{secrets.token_hex(6)}{tail}"
    with _live_lock:
        _live.add(name)
    try:
        yield folder / name
    finally:
        with _live_lock:
            _live.discard(name)


def _abandoned(path: Path, name: str) -> bool:
    """Whether the writer of a temporary is gone."""
    parts = name[len(_PREFIX) :].split(".", 4)
    if len(parts) < 4 or not parts[2].isdigit():
        return False
    host, pid = parts[1], int(parts[2])
    if host != _HOST:  # another machine's: nobody can ask it, so wait a day
        try:
            return time.time() - os.lstat(path).st_mtime > 86_400
        except OSError:
            return False
    if pid == os.getpid():
        with _live_lock:
            return name not in _live
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _write_synced(path: Path, data: Chunks, files: Files) -> None:
    fd = files.create(path)
    try:
        for chunk in [data] if isinstance(data, (bytes, bytearray, memoryview)) else data:
            view = memoryview(chunk).cast("B")
            while len(view):
                done = files.write(fd, view)
                if done <= 0:
                    raise OSError(errno.EIO, "nothing was written", os.fspath(path))
                view = view[done:]
        files.sync(fd)
    finally:
        files.close(fd)


def _fill(temp: Path, old: Path, contents: Mapping[str, Chunks], files: Files) -> None:
    """The new folder under its temporary name: ``contents``, and what else the old one holds."""
    files.mkdir(temp)
    for name, data in contents.items():
        _write_synced(temp / name, data, files)
    if files.kind(old) == "folder":
        _carry(old, temp, set(contents), files)
    files.sync_folder(temp)


def _carry(source: Path, target: Path, skip: set[str], files: Files) -> None:
    for name in sorted(files.listdir(source)):
        if name in skip or is_temporary(name):
            continue
        if files.kind(source / name) == "folder":
            files.mkdir(target / name)
            _carry(source / name, target / name, set(), files)
            files.sync_folder(target / name)
        else:
            files.link(source / name, target / name)


def _swap(new: Path, target: Path, files: Files) -> None:
    """Give ``new`` the name ``target``; what stood there ends under the name ``new``."""
    if not files.kind(target):
        files.rename(new, target)
        return
    try:
        files.exchange(new, target)
        return
    except OSError as e:
        if e.errno not in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
            raise
    # without an exchange there is a moment with neither; `sweep` puts the old one back if we die in it
    with _temporary(target.parent, "old", target.name) as aside:
        files.rename(target, aside)
        try:
            files.rename(new, target)
        except OSError:
            files.rename(aside, target)
            raise
        files.rename(aside, new)


def _remove_tree(path: Path, files: Files) -> None:
    kind = files.kind(path)
    if kind == "folder":
        for name in files.listdir(path):
            _remove_tree(path / name, files)
        files.rmdir(path)
    elif kind:
        files.unlink(path)


def _quietly(call: object, *args: object) -> None:
    """Tidying up must not hide the error that made it necessary; `sweep` finishes it later."""
    with contextlib.suppress(OSError):
        call(*args)  # type: ignore[operator]


def _refused(path: Path, e: OSError) -> ArtefactError:
    return ArtefactError(f"{os.fspath(path)} could not be written: {e.strerror or e}; nothing half-written stands there.")
