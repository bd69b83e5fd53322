"""What a serving process asks of the computer it runs on."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
LARGEST = 1 << 30  # bytes; mallopt takes an int


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed instead of giving it back to the system, for the rest of the process.

    A step allocates the same few hundred kilobytes again and again.  By default glibc maps pieces above 128 KiB afresh
    and trims the heap's end, so each of them is paid for with a page fault per 4 KiB: with busy neighbours more
    than the arithmetic.  The price: a peak of memory stays with the process.

    Returns:
        False where the C library has no such setting (then nothing is changed), or the environment already sets it.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST)) and bool(mallopt(M_TRIM_THRESHOLD, LARGEST))
