"""A name is a label, never a path: what may be called what, and how a file inside a folder is opened."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from pathlib import Path

from rankwise.errors import ArtefactError, OptionError

#: longest adapter name, in bytes of UTF-8
MAX_NAME = 128

_DEVICES = re.compile(r"(con|prn|aux|nul|conin\$|conout\$|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)
_RESERVED = frozenset({"__base__", "rankwise"})  # the base in a mixed batch; the child that an adapted model gains
_FORBIDDEN = frozenset('/\\:*?"<>|\u2044\u2215\u2216\u29f5\u29f8\u29f9\u2571\u2572')
_ENCODED = re.compile(r"%[0-9a-fA-F]{2}")


def check_name(name: object) -> str:
    """The adapter name itself, or an OptionError that says why it cannot be one.

    Free text is allowed (``"Müller's tone v2.1"``); anything that a file system, a URL or a terminal could take for
    a path, a command or a device is not.
    """
    if not isinstance(name, str):
        raise OptionError(f"An adapter name is a string, not {type(name).__name__}.")
    reason = _fault(name)
    if reason:
        raise OptionError(f"Invalid adapter name: {reason}; use letters, digits, spaces and ._- (at most {MAX_NAME} bytes).")
    return name


def _fault(name: str) -> str:
    """What is wrong with ``name``, or the empty string."""
    if not name:
        return "it is empty"
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if size > MAX_NAME:
        return f"it takes {size} bytes"
    for char in name:
        category = unicodedata.category(char)
        if category[0] == "C" or category in {"Zl", "Zp"} or (category == "Zs" and char != " "):
            return f"it has the invisible character U+{ord(char):04X}"
    # full-width and ligature look-alikes are judged by what they would become
    for form in (name, unicodedata.normalize("NFKC", name)):
        bad = sorted(set(form) & _FORBIDDEN)
        if bad:
            return f"{bad[0]!r} could be read as part of a path"
        if _ENCODED.search(form):
            return "it has a per-cent code"
        if form[0] in ".~- " or form[-1] in ". ":
            return "it begins or ends with a dot, a space, a dash or a tilde"
        if ".." in form:
            return "two dots in a row could be read as part of a path"
        if _DEVICES.fullmatch(form) or form in _RESERVED:
            return f"{form!r} is reserved"
    return ""


def open_inside(root: str | os.PathLike[str], name: str) -> int:
    """A read-only descriptor of the regular file ``name`` in folder ``root``; the caller closes it.

    The folder is opened once and the file relative to it, without following links: what was checked is what is
    read.  A link is accepted only where it stays under the root (for a Hugging Face snapshot: under its cache entry).

    Raises:
        FileNotFoundError: no such file.
        ArtefactError: the name has path parts, or leads outside the root, or is not a regular file.
    """
    folder = open_folder(root)
    try:
        return open_at(folder, root, name)
    finally:
        os.close(folder)


def open_folder(root: str | os.PathLike[str]) -> int:
    """A descriptor of folder ``root``: what is opened through it is one version of the folder, even if it is swapped."""
    try:
        return os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise
    except NotADirectoryError as e:
        raise ArtefactError(f"{os.fspath(root)!r} is not a folder.") from e
    except (ValueError, OSError) as e:
        raise ArtefactError(f"The folder {os.fspath(root)!r} cannot be opened: {e}.") from e


def open_at(folder: int, root: str | os.PathLike[str], name: str) -> int:
    """As :func:`open_inside`, in a folder that :func:`open_folder` opened from ``root``."""
    if not name or name in {".", ".."} or "/" in name or "\\" in name or "\0" in name:
        raise ArtefactError(f"{name!r} is not the name of a file in a folder.")
    fd = _open_at(folder, name)
    if fd is None:
        fd = _follow(Path(root), name)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ArtefactError(f"{name!r} is not a regular file.")
    return fd


def _open_at(folder: int, name: str) -> int | None:
    """Open without following a link; None where the entry is one."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a pipe must not hang the reader
    try:
        return os.open(name, flags, dir_fd=folder)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        if isinstance(e, OSError) and e.errno in {errno.ELOOP, errno.EMLINK}:
            return None
        raise ArtefactError(f"{name!r} cannot be opened: {e}.") from e


def _follow(root: Path, name: str) -> int:
    """Open a link's target step by step from the real root, refusing to leave it."""
    real_root = Path(os.path.realpath(root))
    if real_root.parent.name == "snapshots" and (real_root.parent.parent / "blobs").is_dir():
        real_root = real_root.parent.parent  # a hub snapshot links to the blobs beside it
    target = Path(os.path.realpath(root / name))
    if not target.is_relative_to(real_root):
        raise ArtefactError(f"{name!r} is a link that leads outside its folder; copy the file itself into it.")
    folder = os.open(real_root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        *parts, last = target.relative_to(real_root).parts
        for part in parts:
            deeper = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            os.close(folder)
            folder = deeper
        fd = _open_at(folder, last)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as e:
        raise ArtefactError(f"{name!r} cannot be opened: {e}.") from e
    finally:
        os.close(folder)
    if fd is None:
        raise ArtefactError(f"{name!r} is a link that changed while it was followed.")
    return fd
