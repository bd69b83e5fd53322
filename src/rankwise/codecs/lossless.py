"""Tensors bit for bit: patterns in the order of their values, split into byte planes, deflated."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.codecs import stream
from rankwise.codecs.base import AdapterCodec
from rankwise.codecs.stream import DTYPES, StreamSpec
from rankwise.errors import ArtefactError

if TYPE_CHECKING:
    from rankwise.codecs.bits import U8

_UINTS: dict[int, np.dtype[Any]] = {2: np.dtype("<u2"), 4: np.dtype("<u4"), 8: np.dtype("<u8")}


@register("codec", "lossless", title="Byte planes, deflated: bit for bit")
@dataclasses.dataclass
class Lossless(AdapterCodec):
    """Every float's bits, by a map of sign and magnitude to unsigned integers that keeps the order of values.

    Of n entries of s bytes the s planes of equal significance are stored one after the other (exponents side by side deflate,
    mantissas do not), and deflated together.  As the inner codec of ``delta`` the integers are differences modulo 2^(8s).
    NaN and −0 survive.  Raises OptionError for what is not floating; decoding raises ArtefactError.
    """

    exact = True

    def encode_tensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """One stream of all tensors."""
        spec = StreamSpec.of(tensors)
        return stream.frame(self.name, {"tensors": spec.to_json()}, pack(tensors, spec))

    def decode_tensors(self, data: bytes, max_numel: int = stream.MAX_NUMEL) -> dict[str, Tensor]:
        """The very bits that were encoded."""
        header, body = stream.unframe(self.name, data)
        if set(header) != {"codec", "tensors"}:
            raise ArtefactError(f"The {self.name} header has the keys {sorted(header)[:8]}: the stream is damaged.")
        return unpack(body, StreamSpec.from_json(header["tensors"], max_numel))

    def bits(self, numel: int | None = None) -> float:
        """An upper bound for fp32: 32, and what deflate adds to bytes that it cannot shrink."""
        return 32 * (1 + 2**-10) + (8 * 64 / numel if numel else 0.0)


def pack(tensors: Mapping[str, Tensor], spec: StreamSpec, reference: Mapping[str, Tensor] | None = None) -> bytes:
    """Deflated byte planes of ``tensors``, or of their integers less those of ``reference`` (same shapes and dtypes)."""
    planes = []
    for name in spec.names:
        keys = _ordered(tensors[name])
        if reference is not None:
            keys = _zigzag(keys - _ordered(reference[name]))
        planes.append(np.ascontiguousarray(keys.view(np.uint8).reshape(keys.size, keys.itemsize).T).reshape(-1))
    return zlib.compress(np.concatenate(planes).tobytes(), 9)


def unpack(body: bytes, spec: StreamSpec, reference: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The inverse of :func:`pack`; ArtefactError unless ``body`` inflates to exactly what ``spec`` needs."""
    widths = [DTYPES[d].itemsize for d in spec.dtypes]
    raw = np.frombuffer(inflate(body, sum(w * n for w, n in zip(widths, spec.sizes))), np.uint8)
    out, at = {}, 0
    for name, shape, dtype, width, size in zip(spec.names, spec.shapes, spec.dtypes, widths, spec.sizes):
        planes: U8 = raw[at : at + width * size].reshape(width, size).T
        keys = np.ascontiguousarray(planes).reshape(-1).view(_UINTS[width])
        at += width * size
        if reference is not None:
            keys = _unzigzag(keys) + _ordered(reference[name])
        flat = torch.empty(size, dtype=DTYPES[dtype])
        flat.view(torch.uint8).numpy()[:] = _disordered(keys).view(np.uint8)
        out[name] = flat.reshape(shape)
    return out


def inflate(body: bytes, size: int) -> bytes:
    """``size`` bytes; a stream of more, fewer or damaged ones is an ArtefactError, found before more are held."""
    inflater = zlib.decompressobj()
    try:
        out = inflater.decompress(body, size + 1)
    except zlib.error as error:
        raise ArtefactError(f"A deflated part cannot be read ({error}): the stream is damaged.") from error
    if len(out) != size or not inflater.eof or inflater.unused_data:
        raise ArtefactError(f"A deflated part does not hold the {size} bytes that its header tells of: the stream is damaged.")
    return out


def _ordered(t: Tensor) -> np.ndarray:
    """Unsigned keys (n,) whose order is that of the values: sign bit set for the positive, all bits turned for the negative."""
    flat = t.detach().cpu().contiguous().reshape(-1)
    bits = flat.view(torch.uint8).numpy().view(_UINTS[flat.element_size()])
    top = bits.dtype.type(1 << (8 * bits.itemsize - 1))
    return np.where(bits & top, ~bits, bits | top)


def _disordered(keys: np.ndarray) -> np.ndarray:
    top = keys.dtype.type(1 << (8 * keys.itemsize - 1))
    return np.where(keys & top, keys ^ top, ~keys)


def _zigzag(d: np.ndarray) -> np.ndarray:
    """Differences modulo 2^n → 0, −1, 1, −2 … as 0, 1, 2, 3 …: small ones of either sign have zero high bytes."""
    one, last = d.dtype.type(1), d.dtype.type(8 * d.itemsize - 1)
    return (d << one) ^ (d.dtype.type(0) - (d >> last))


def _unzigzag(z: np.ndarray) -> np.ndarray:
    one = z.dtype.type(1)
    return (z >> one) ^ (z.dtype.type(0) - (z & one))
