"""The frame of an adapter stream: magic, checksum, a JSON header that names every tensor, a binary body.

A stream may come from anywhere, so all of it is checked before a byte is allocated on its word.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rankwise.errors import ArtefactError, OptionError

MAGIC = b"RWAC\x01"
_HEAD = struct.Struct("<5sII")
#: entries a stream may claim unless the reader allows more (4 GiB of fp32)
MAX_NUMEL = 2**30
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}


@dataclasses.dataclass(frozen=True)
class StreamSpec:
    """Names, shapes and dtypes of a set of tensors in sorted-name order: how it is one vector."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> StreamSpec:
        """The spec of ``tensors``; OptionError for one that is not floating, or for no entries at all."""
        names = tuple(sorted(tensors))
        for name in names:
            if str(tensors[name].dtype).removeprefix("torch.") not in DTYPES:
                raise OptionError(f"The tensor {name!r} is {tensors[name].dtype}; an adapter codec takes {', '.join(DTYPES)}.")
        spec = cls(
            names,
            tuple(tuple(tensors[n].shape) for n in names),
            tuple(str(tensors[n].dtype).removeprefix("torch.") for n in names),
        )
        if spec.numel == 0:
            raise OptionError("There is nothing to encode: the tensors have no entries.")
        return spec

    @property
    def sizes(self) -> tuple[int, ...]:
        """Entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def numel(self) -> int:
        """d, entries of all tensors."""
        return sum(self.sizes)

    def flatten(self, tensors: Mapping[str, Tensor]) -> NDArray[np.float64]:
        """fp64 (d,); OptionError names the tensor that is not finite."""
        for name in self.names:
            if not torch.isfinite(tensors[name]).all():
                raise OptionError(f"The tensor {name!r} holds nan or infinite entries; an adapter codec takes finite ones.")
        return np.concatenate([tensors[n].detach().cpu().double().reshape(-1).numpy() for n in self.names])

    def unflatten(self, vector: NDArray[Any]) -> dict[str, Tensor]:
        """The tensors of a vector (d,), each in its shape and dtype."""
        return {
            name: torch.from_numpy(vector[start:stop]).reshape(shape).to(DTYPES[dtype], copy=True)
            for name, shape, dtype, (start, stop) in zip(self.names, self.shapes, self.dtypes, self.slices())
        }

    def slices(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of each tensor in the vector."""
        at = 0
        for size in self.sizes:
            yield at, at + size
            at += size

    def to_json(self) -> list[list[Any]]:
        """Plain data for a header."""
        return [[n, d, list(s)] for n, d, s in zip(self.names, self.dtypes, self.shapes)]

    @classmethod
    def from_json(cls, rows: Any, max_numel: int) -> StreamSpec:
        """The spec of a header; ArtefactError for anything that :meth:`to_json` would not write."""
        if not isinstance(rows, list) or not all(isinstance(r, list) and len(r) == 3 for r in rows):
            raise ArtefactError("The header's list of tensors is not a list of [name, dtype, shape]: the stream is damaged.")
        for name, dtype, shape in rows:
            dims_ok = isinstance(shape, list) and len(shape) <= 64 and all(type(n) is int and 0 <= n < 2**62 for n in shape)
            if not isinstance(name, str) or not isinstance(dtype, str) or dtype not in DTYPES or not dims_ok:
                raise ArtefactError(f"The header describes a tensor as {str([name, dtype, shape])[:200]}: the stream is damaged.")
        names = tuple(r[0] for r in rows)
        if list(names) != sorted(set(names)):
            raise ArtefactError("The header's tensor names are not sorted or not unique: the stream is damaged.")
        spec = cls(names, tuple(tuple(r[2]) for r in rows), tuple(r[1] for r in rows))
        if not 0 < spec.numel <= max_numel:
            raise ArtefactError(f"The stream claims {spec.numel} entries; this reader takes 1 to {max_numel} (max_numel).")
        return spec


def frame(codec: str, header: Mapping[str, Any], body: bytes) -> bytes:
    """Magic, CRC-32 of the rest, header length, header, body."""
    text = json.dumps({"codec": codec, **header}, separators=(",", ":")).encode()
    rest = struct.pack("<I", len(text)) + text + body
    return MAGIC + struct.pack("<I", zlib.crc32(rest)) + rest


def unframe(codec: str, data: bytes) -> tuple[dict[str, Any], bytes]:
    """(header, body) of a stream that ``codec`` wrote; ArtefactError for every other input."""
    if len(data) < _HEAD.size or not data.startswith(MAGIC[:4]):
        raise ArtefactError(f"These {len(data)} bytes are not an adapter stream: they do not begin with {MAGIC[:4]!r}.")
    magic, checksum, length = _HEAD.unpack_from(data)
    if magic != MAGIC:
        raise ArtefactError(f"The adapter stream has version {magic[4]}; this reader knows version {MAGIC[4]}.")
    if zlib.crc32(data[9:]) != checksum or length > len(data) - _HEAD.size:
        raise ArtefactError("The adapter stream does not match its checksum: it is damaged or cut off.")
    try:
        header = json.loads(data[_HEAD.size : _HEAD.size + length])
    except (ValueError, RecursionError) as error:
        raise ArtefactError(f"The adapter stream's header is not JSON: {str(error)[:100]}.") from error
    if not isinstance(header, dict) or header.get("codec") != codec:
        found = header.get("codec") if isinstance(header, dict) else header
        raise ArtefactError(f"The adapter stream was written by codec {str(found)[:40]!r}; it cannot be read as {codec!r}.")
    return header, data[_HEAD.size + length :]


def take(body: bytes, at: int, length: int) -> tuple[bytes, int]:
    """``length`` bytes of ``body`` from ``at``, and the byte behind them; ArtefactError if it is too short."""
    if length > len(body) - at:
        raise ArtefactError(f"The stream's body ends {length - (len(body) - at)} bytes early: it is damaged or cut off.")
    return body[at : at + length], at + length
