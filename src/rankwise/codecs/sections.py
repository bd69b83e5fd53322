"""Sparse signs of several tensors as one bit stream, each tensor's places by the Golomb code of its own density.

Kept entries are not spread evenly over tensors (of a LoRA pair, A holds three in four): one split for all of them costs
5 % over the entropy that per-tensor splits come within 2 % of.  Order of the bits: for each vector γ (16); for each tensor
the count of kept entries (as many bits as its size has) and b (5); all signs; all remainders; all unary quotients.  A tensor
that keeps more than half of its entries lists those it drops.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rankwise.codecs import golomb
from rankwise.codecs.bits import I64, BitReader, BitWriter
from rankwise.codecs.signs import Signs, bf16_bits, bf16_value
from rankwise.errors import ArtefactError

_B = 5  # bits of b
Sizes = Sequence[Sequence[int]]


def write(parts: Sequence[Signs], sizes: Sizes) -> bytes:
    """The bits of ``parts``; ``sizes`` has, for each of them, the entries of its tensors in order."""
    out, lows, highs = BitWriter(), [], []
    for part in parts:
        out.uints(np.array([bf16_bits(part.gamma)]), 16)
    for part, lengths in zip(parts, sizes):
        for positions, size in _split(part.positions, lengths):
            listed = _listed(positions, size)
            gaps = golomb.gaps_of(listed)
            b = golomb.best(gaps, listed.size / size) if listed.size else 0
            out.uints(np.array([positions.size]), size.bit_length())
            out.uints(np.array([b]), _B)
            lows.append((gaps & ((1 << b) - 1), b))
            highs.append(gaps >> b)
    for part in parts:
        out.flags(part.negative)
    for low, b in lows:
        out.uints(low, b)
    out.unary(np.concatenate([np.zeros(0, np.int64), *highs]))
    return out.getvalue()


def read(data: bytes, sizes: Sizes) -> list[Signs]:
    """The inverse of :func:`write`; ArtefactError for bits that it would not write."""
    bits = BitReader(data)
    gammas = [bf16_value(int(bits.uints(1, 16)[0])) for _ in sizes]
    table = [[_entry(bits, size) for size in lengths] for lengths in sizes]
    negative = [bits.flags(sum(count for count, _ in rows)) for rows in table]
    numbers = [[_fewer(count, size) for (count, _), size in zip(rows, lengths)] for rows, lengths in zip(table, sizes)]
    lows = [[bits.uints(n, b) for n, (_, b) in zip(counts, rows)] for counts, rows in zip(numbers, table)]
    high, at, out = bits.unary(sum(map(sum, numbers))), 0, []
    bits.end()
    for lengths, rows, low, gamma, signs in zip(sizes, table, lows, gammas, negative):
        found, start = [np.zeros(0, np.int64)], 0
        for size, (count, b), rest in zip(lengths, rows, low):
            listed = golomb.positions_of(rest, high[at : at + rest.size], b, size)
            found.append(start + (_others(listed, size) if 2 * count > size else listed))
            at, start = at + rest.size, start + size
        out.append(Signs(start, np.concatenate(found), signs, gamma))
    return out


def _entry(bits: BitReader, size: int) -> tuple[int, int]:
    """(kept entries, b) of a tensor of ``size`` entries."""
    count, b = int(bits.uints(1, size.bit_length())[0]), int(bits.uints(1, _B)[0])
    if count > size or b > size.bit_length() + 2:  # no longer gap exists, and a wide sum of remainders could wrap round
        raise ArtefactError(f"A tensor of {size} entries claims {count} kept ones and b* = {b}: the stream is damaged.")
    return count, b


def _split(positions: I64, lengths: Sequence[int]) -> list[tuple[I64, int]]:
    """(positions within the tensor, its size) of each tensor of a vector."""
    ends = np.cumsum(np.asarray(lengths, np.int64))
    cuts = np.searchsorted(positions, ends)
    return [
        (positions[start:stop] - (end - size), size)
        for start, stop, end, size in zip([0, *cuts[:-1].tolist()], cuts.tolist(), ends.tolist(), lengths)
    ]


def _fewer(count: int, size: int) -> int:
    return size - count if 2 * count > size else count


def _listed(positions: I64, size: int) -> I64:
    return _others(positions, size) if 2 * positions.size > size else positions


def _others(positions: I64, size: int) -> I64:
    rest = np.ones(size, bool)
    rest[positions] = False
    return np.flatnonzero(rest)
