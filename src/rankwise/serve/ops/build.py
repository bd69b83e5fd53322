"""A C file of this package as a shared library, compiled when first asked for and kept in the user's cache.

Plain C called through ctypes: no headers of torch are read, so a build takes under two seconds.  Not
``torch.utils.cpp_extension.load``: that needs ninja when the server starts, takes a library from a folder that others can
write to, keeps one library for processors of different instructions, and links the compiler's OpenMP beside torch's own,
which would keep a second pool of threads on the same cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from rankwise.errors import OptionError

FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-fno-math-errno")
TARGETS = (("-march=native",), ("-mcpu=native",), ())


def compiler() -> str | None:
    """The C compiler: ``$CC``, or the first of cc, gcc and clang that there is."""
    names = [os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"]
    return next((found for name in names if (found := shutil.which(name))), None)


def load(source: Path) -> ctypes.CDLL:
    """The library made of ``source``, built now unless the cache holds it.

    Raises:
        OptionError: no compiler, a build that fails, or a cache that others can write to.
    """
    cc = compiler()
    if cc is None:
        raise OptionError(
            "The native operator needs a C compiler, and neither $CC nor cc, gcc or clang is one; install one, or leave `native` off."
        )
    made = _folder() / f"{source.stem}-{_digest(source, cc)}.so"
    if not made.exists():
        _build(cc, source, made)
    return ctypes.CDLL(str(made))


def _folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(base) if base else Path.home() / ".cache") / "rankwise" / "native"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    state = folder.stat()
    if hasattr(os, "getuid") and (state.st_uid != os.getuid() or state.st_mode & 0o022):
        raise OptionError(
            f"{folder} belongs to, or can be written by, other users, so no library is loaded from it; set XDG_CACHE_HOME."
        )
    return folder


def _digest(source: Path, cc: str) -> str:
    """Of all that the library depends on: one built on a processor with more instructions would crash on another."""
    version = subprocess.run([cc, "--version"], capture_output=True, text=True).stdout
    parts = [source.read_text(), version, *FLAGS, str(_openmp()), platform.machine(), _instructions()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _openmp() -> Path | None:
    return next(iter(sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))), None)


def _build(cc: str, source: Path, made: Path) -> None:
    """Compile beside the target and move it in place, so that no other process loads half a file."""
    runtime = _openmp()
    with tempfile.TemporaryDirectory(dir=made.parent) as tmp:
        obj, lib = f"{tmp}/o.o", f"{tmp}/o.so"
        # linked by hand with torch's own runtime where it brings one; the compiler's -fopenmp would name another
        link = [cc, "-shared", obj, "-o", lib, *([str(runtime)] if runtime else ["-fopenmp"])]
        errors = ""
        for target in TARGETS:
            compiled = _run([cc, *FLAGS, *target, "-fopenmp", "-c", str(source), "-o", obj])
            linked = compiled if compiled else _run(link)
            if not linked:
                os.replace(lib, made)
                return
            errors = errors or linked
    lines = errors.strip().splitlines()
    why = next((line for line in lines if "error" in line), lines[0])
    raise OptionError(f"The native operator did not compile with {cc}: {why}; leave `native` off.")


def _run(command: list[str]) -> str:
    """What a failing command printed, else nothing."""
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr or f"{command[0]} ended with {done.returncode}"
