"""A writer and a reader of bit streams whose unit is a whole array, so ten million codes take no Python loop.

Bits are least significant first, in the byte and in the number; sections follow each other without gaps.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from rankwise.errors import ArtefactError

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]


class BitWriter:
    """Collects sections of bits; :meth:`getvalue` pads the last byte with zeros."""

    def __init__(self) -> None:
        self._parts: list[U8] = []

    def uints(self, values: I64, width: int) -> None:
        """Each of ``values`` (in [0, 2^width)) in ``width`` bits; width 0 writes nothing."""
        values = np.asarray(values, np.int64)
        if values.size and (values.min() < 0 or int(values.max()) >> width):
            raise ValueError(f"values from {values.min()} to {values.max()} do not fit {width} bits")
        section = np.empty((values.size, width), np.uint8)
        for bit in range(width):
            section[:, bit] = (values >> bit) & 1
        self._parts.append(section.reshape(-1))

    def flags(self, flags: NDArray[np.bool_]) -> None:
        """One bit each."""
        self._parts.append(np.asarray(flags, bool).view(np.uint8).reshape(-1))

    def unary(self, values: I64) -> None:
        """Each of ``values`` (≥ 0) as that many zeros and a one."""
        ends = np.cumsum(np.asarray(values, np.int64) + 1)
        section = np.zeros(int(ends[-1]) if ends.size else 0, np.uint8)
        section[ends - 1] = 1
        self._parts.append(section)

    def __len__(self) -> int:
        """Bits written so far."""
        return sum(part.size for part in self._parts)

    def getvalue(self) -> bytes:
        """All sections as bytes."""
        return np.packbits(np.concatenate([np.zeros(0, np.uint8), *self._parts]), bitorder="little").tobytes()


class BitReader:
    """Reads sections in the order written; every shortage or excess is an ArtefactError."""

    def __init__(self, data: bytes) -> None:
        self._bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
        self._at = 0

    def uints(self, count: int, width: int) -> I64:
        """``count`` numbers of ``width`` bits, int64."""
        section = self._take(count * width).reshape(count, width)
        out = np.zeros(count, np.int64)
        for bit in range(width):
            out |= section[:, bit].astype(np.int64) << bit
        return out

    def flags(self, count: int) -> NDArray[np.bool_]:
        """``count`` bits."""
        return self._take(count).astype(bool)

    def unary(self, count: int) -> I64:
        """``count`` unary numbers, int64."""
        if count == 0:
            return np.zeros(0, np.int64)
        ends = np.flatnonzero(self._bits[self._at :])[:count]
        if ends.size < count:
            raise ArtefactError(f"The bit stream ends after {ends.size} of {count} unary codes: it is damaged or cut off.")
        self._at += int(ends[-1]) + 1
        return np.diff(ends, prepend=-1) - 1

    def end(self) -> None:
        """ArtefactError unless only the zero bits that fill the last byte are left."""
        rest = self._bits[self._at :]
        if rest.size >= 8 or rest.any():
            raise ArtefactError(f"The bit stream has {rest.size} bits left over: it is damaged.")

    def _take(self, bits: int) -> U8:
        if bits > self._bits.size - self._at:
            raise ArtefactError(f"The bit stream has {self._bits.size - self._at} bits where {bits} were expected: it is damaged.")
        self._at += bits
        return self._bits[self._at - bits : self._at]
