"""Settings of the C library and of OpenMP for a process that trains or serves."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST = 1 << 30  # bytes; mallopt takes an int
SOFT = 1  # omp_pause_soft, <omp.h>: what the thread was told (its number of threads) stays
_BORN = os.getpid()


def keep_freed_memory() -> bool:
    """Have the C library keep freed memory instead of returning it to the system, for the rest of the process.

    A step allocates the same few hundred kilobytes again and again.  By default glibc maps pieces above 128 KiB afresh
    and trims the heap's end, so each of them is paid for with a page fault per 4 KiB: with busy neighbours more
    than the arithmetic, and a seventh of a small training step.  The price: a peak of memory stays with the process.

    Returns:
        False where the C library has no such setting (then nothing is changed), or the environment already sets it.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))


def release_workers() -> bool:
    """End the calling thread's own OpenMP workers; its next parallel operation starts them again.

    GNU's OpenMP keeps a pool for every thread that ever ran a parallel product.  As soon as the pools together hold more
    threads than there are processors, no worker waits awake any longer, and every product of every thread pays for waking
    one: training steps of the engine's thread took twice the time because the main thread had once read a model.  So a
    thread that hands its work to the engine's, or runs beside it now and then, calls this when it is done.

    Returns:
        False where another OpenMP runs, one that knows no such call, or a process that was forked (then nothing is done).
    """
    pause = _pause()
    if pause is None or os.getpid() != _BORN or not _foreign_threads():
        return False
    return pause(SOFT) == 0


def _foreign_threads() -> bool:
    """Whether there are threads that Python did not start.  A fork leaves them behind, but not what libgomp knows of them:
    it would wait for them for ever."""
    return len(os.listdir("/proc/self/task")) > threading.active_count()


@functools.cache
def _pause() -> Callable[[int], int] | None:
    """torch's ``omp_pause_resource_all``, where its OpenMP is GNU's (others hold one pool for all threads)."""
    try:
        files = {
            line.rpartition("/")[2] for line in Path("/proc/self/maps").read_text(errors="replace").splitlines() if "/" in line
        }
    except OSError:
        return None
    loaded = {name for name in ("libgomp", "libomp", "libiomp5") if any(f.startswith(name) for f in files)}
    return getattr(ctypes.CDLL(None), "omp_pause_resource_all", None) if loaded == {"libgomp"} else None


class Helpers(ThreadPoolExecutor):
    """A thread pool beside the engine's thread; each worker calls :func:`release_workers` after a task."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_released, fn, *args, **kwargs)


def _released(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return fn(*args, **kwargs)
    finally:
        release_workers()
