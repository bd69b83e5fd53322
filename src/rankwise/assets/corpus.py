"""The text that ships with every Python: its standard library's own source, cut into what may be seen and what not.

``pretraining_files`` is what the shipped base has read; ``HELD_OUT`` names the packages it has never seen, each a
domain of its own flavour (event loops, mail headers, markup parsers, test machinery, character tables, English
prose), and ``CONTROL`` single modules kept back as unseen text of the same flavour as the training text.  Tests are
left out on both sides: they quote the packages that are held out.
"""

from __future__ import annotations

import ast
import hashlib
import sysconfig
import tokenize
from pathlib import Path

from rankwise.errors import DataError, OptionError

HELD_OUT: dict[str, str] = {
    "asyncio": "asyncio",
    "email": "email",
    "xml": "xml",
    "unittest": "unittest",
    "tables": "encodings",
    "prose": "pydoc_data",
}
"""Domain name -> the package held out for it."""

CONTROL: tuple[str, ...] = ("argparse.py", "fractions.py", "heapq.py", "shelve.py", "tarfile.py", "textwrap.py")
"""Top-level modules held out as unseen text of the training text's own flavour."""

_SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_LEAST_BYTES = 256  # shorter files are licence headers and empty __init__ files
_TEST_SHARE = 0.2


def stdlib_root() -> Path:
    """The folder of the running Python's standard library; `DataError` where it holds no source."""
    root = Path(sysconfig.get_paths()["stdlib"])
    if not (root / "ast.py").is_file():
        raise DataError(
            f"The standard library at {root} holds no .py source (a zipped or compiled-only Python); the shipped "
            "tasks are made from that source, so run them with a Python that has it."
        )
    return root


def _sources(root: Path, folder: Path) -> list[str]:
    """Paths of the .py files under ``folder``, relative to ``root`` with forward slashes, sorted."""
    names = []
    for path in folder.rglob("*.py"):
        rel = path.relative_to(root)
        if not _SKIPPED_FOLDERS.intersection(rel.parts[:-1]) and path.stat().st_size >= _LEAST_BYTES:
            names.append(rel.as_posix())
    return sorted(names)


def is_held_out(name: str) -> bool:
    """Whether a path relative to the standard library belongs to a domain or to the control files."""
    return name in CONTROL or name.split("/", 1)[0] in HELD_OUT.values()


def pretraining_files() -> list[str]:
    """What the base may read: every other source file, relative to `stdlib_root`, in a fixed order."""
    root = stdlib_root()
    return [name for name in _sources(root, root) if not is_held_out(name)]


def read(name: str) -> str:
    """The text of one file of the standard library, decoded by its own coding line, newlines as ``\\n``."""
    with tokenize.open(stdlib_root() / name) as file:
        return file.read()


def control_texts() -> list[str]:
    """The control files that this Python has (modules come and go between versions)."""
    root = stdlib_root()
    return [read(name) for name in CONTROL if (root / name).is_file()]


def domain_documents(domain: str) -> dict[str, str]:
    """Name -> text of one held-out domain: its source files, or for ``prose`` the topics of Python's own help."""
    if domain not in HELD_OUT:
        raise OptionError(f"No domain is called {domain!r}; known: {', '.join(HELD_OUT)}.")
    root = stdlib_root()
    folder = root / HELD_OUT[domain]
    if not folder.is_dir():
        raise DataError(f"This Python has no {folder.name!r} package at {root}; domain {domain!r} is made from it.")
    if domain == "prose":
        return _topics(folder / "topics.py")
    return {name: read(name) for name in _sources(root, folder)}


def _topics(path: Path) -> dict[str, str]:
    """Python's help topics, a dict literal in the source; read by parsing, never by running."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            topics = ast.literal_eval(node.value)
            return {key: text for key, text in sorted(topics.items()) if len(text.encode()) >= _LEAST_BYTES}
    raise DataError(f"{path} holds no dict of topics; it is not a file this version of rankwise knows.")


def split(documents: dict[str, str], test_share: float = _TEST_SHARE) -> tuple[list[str], list[str]]:
    """Whole documents into (train names, test names), by the hash of the name until ``test_share`` of the bytes.

    The order depends on names only, so a document keeps its side between Python versions but for the few at the cut.
    """
    order = sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
    wanted = test_share * sum(len(text.encode()) for text in documents.values())
    test: list[str] = []
    taken = 0
    while taken < wanted:
        test.append(order[len(test)])
        taken += len(documents[test[-1]].encode())
    return sorted(order[len(test) :]), sorted(test)
