"""Ternary bit planes: ComPEFT's signs at a flat two bits an entry, for products by counting bits."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rankwise.catalogue import register
from rankwise.codecs import stream
from rankwise.codecs.compeft import ComPEFT
from rankwise.codecs.signs import Signs, bf16_bits, bf16_value
from rankwise.errors import ArtefactError, OptionError

if TYPE_CHECKING:
    from rankwise.codecs.bits import U8
    from rankwise.codecs.sections import Sizes

_GAMMA = struct.Struct("<H")
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1).astype(np.int64)


@dataclasses.dataclass(frozen=True)
class Planes:
    """Where a vector of ``numel`` entries is +γ and where −γ, one bit an entry each: uint8 (⌈numel/8⌉,).

    Args:
        plus: bits of the entries that are +γ.
        minus: bits of those that are −γ.
        numel: entries of the vector.
        gamma: the magnitude.
    """

    plus: U8
    minus: U8
    numel: int
    gamma: float

    @classmethod
    def of(cls, part: Signs) -> Planes:
        """The planes of a sparse value."""
        planes = np.zeros((2, part.numel), bool)
        planes[part.negative.astype(int), part.positions] = True
        plus, minus = np.packbits(planes, axis=1, bitorder="little")
        return cls(plus, minus, part.numel, part.gamma)

    def signs(self) -> Signs:
        """The sparse value of the planes."""
        plus, minus = (np.unpackbits(p, bitorder="little")[: self.numel].astype(bool) for p in (self.plus, self.minus))
        positions = np.flatnonzero(plus | minus)
        return Signs(self.numel, positions, minus[positions], self.gamma)

    def dot(self, other: Planes) -> float:
        """⟨self, other⟩ = γγ′·(agreeing − opposing entries), by AND and a count of bits."""
        if self.numel != other.numel:
            raise OptionError(f"Planes of {self.numel} and {other.numel} entries have no product; give equal lengths.")
        agree = _ONES[(self.plus & other.plus) | (self.minus & other.minus)].sum()
        oppose = _ONES[(self.plus & other.minus) | (self.minus & other.plus)].sum()
        return self.gamma * other.gamma * float(agree - oppose)


@register("codec", "ternary", title="Ternary bit planes", paper="arXiv:2311.13171", reference="192")
@dataclasses.dataclass
class Ternary(ComPEFT):
    """The same τ̂ as ``compeft`` with the same options, kept as two bit planes: 2 bits an entry at every density.

    Larger than the Golomb code below k ≈ 1, but read without decoding: a product of two adapters is
    γγ′·(popcount of agreeing − popcount of opposing bits), see :class:`Planes`.
    Body, a vector: γ in 16 bits, ⌈d/8⌉ bytes of +, ⌈d/8⌉ bytes of −.  Errors as ``compeft``.
    """

    def bits(self, numel: int | None = None) -> float:
        """2, and γ's 16 bits over ``numel``."""
        return 2.0 + (16 / numel if numel else 0.0)

    def _write(self, parts: Sequence[Signs], sizes: Sizes) -> bytes:
        planes = [Planes.of(part) for part in parts]
        return b"".join(_GAMMA.pack(bf16_bits(p.gamma)) + p.plus.tobytes() + p.minus.tobytes() for p in planes)

    def _read(self, body: bytes, sizes: Sizes) -> list[Signs]:
        out, at = [], 0
        for lengths in sizes:
            part, at = _read_planes(body, at, sum(lengths))
            out.append(part)
        if at != len(body):
            raise ArtefactError(f"The {self.name} stream has {len(body) - at} bytes left over: it is damaged.")
        return out


def _read_planes(body: bytes, at: int, numel: int) -> tuple[Signs, int]:
    """The value of ``numel`` entries at byte ``at``, and the byte behind it."""
    size = -(-numel // 8)
    head, at = stream.take(body, at, _GAMMA.size)
    data, at = stream.take(body, at, 2 * size)
    plus, minus = np.frombuffer(data, np.uint8).reshape(2, size)
    fill = np.concatenate([plus[-1:], minus[-1:]]) >> (numel % 8) if numel % 8 else np.zeros(1, np.uint8)
    if (plus & minus).any() or fill.any():
        raise ArtefactError("The planes overlap or hold bits beyond the last entry: the stream is damaged.")
    return Planes(plus, minus, numel, bf16_value(_GAMMA.unpack(head)[0])).signs(), at
