"""A weight codec over a set of tensors: each tensor's state, key by key, in one self-describing stream.

Matrices are laid with their longer axis last: groups of a codec run along rows, and a row of B (out×r) is only r long.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rankwise import catalogue
from rankwise.codecs import stream
from rankwise.codecs.base import AdapterCodec, Codec
from rankwise.codecs.stream import DTYPES, StreamSpec
from rankwise.errors import ArtefactError, OptionError, RankwiseError


def adapter_codec(named: str | Mapping[str, Any]) -> AdapterCodec:
    """The adapter codec of ``"name"`` or ``{"name": …, options…}``; a weight codec is applied to each tensor.

    Raises:
        UnknownName, OptionError: no such codec or option; the message has the nearest names.
    """
    if isinstance(named, str):
        named = {"name": named}
    if not isinstance(named, Mapping) or not isinstance(named.get("name"), str):
        raise OptionError(f"A codec is a name or a mapping with 'name'; it is {named!r}.")
    made = catalogue.make("codec", named["name"], **{k: v for k, v in named.items() if k != "name"})
    return Weights(made) if isinstance(made, Codec) else made


class Weights(AdapterCodec):
    """``codec`` on every tensor alone (an empty one has no state, one without axes is one entry).

    Raises OptionError, with the tensor's name, for what the codec refuses; decoding raises ArtefactError.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.info = codec.info  # type: ignore[misc]

    def encode_tensors(self, tensors: Mapping[str, Tensor]) -> bytes:
        """The states' bytes one after the other; their shapes follow from the options and the tensors' shapes."""
        spec, body = StreamSpec.of(tensors), []
        for name in spec.names:
            t = tensors[name]
            if not t.numel():
                continue
            try:
                state = self.codec.encode(_laid(t.detach().cpu()))
            except OptionError as error:
                raise OptionError(f"The tensor {name!r}: {error}") from error
            body += [_bytes(state[k]) for k in _keys(state)]
        return stream.frame(self.name, {"options": dataclasses.asdict(self.codec), "tensors": spec.to_json()}, b"".join(body))  # type: ignore[call-overload]

    def decode_tensors(self, data: bytes, max_numel: int = stream.MAX_NUMEL) -> dict[str, Tensor]:
        """The tensors in their shapes and dtypes, by the options in the stream."""
        header, body = stream.unframe(self.name, data)
        if set(header) != {"codec", "options", "tensors"} or not isinstance(header["options"], dict):
            raise ArtefactError(f"The {self.name} header's keys {sorted(header)[:8]} are wrong: the stream is damaged.")
        try:
            codec: Codec = catalogue.make("codec", self.name, **header["options"])
        except (RankwiseError, TypeError) as error:
            raise ArtefactError(f"The {self.name} stream's options are not valid: {error}") from error
        spec, out, at = StreamSpec.from_json(header["tensors"], max_numel), {}, 0
        for name, shape, dtype in zip(spec.names, spec.shapes, spec.dtypes):
            value, numel = torch.zeros(0), math.prod(shape)
            if numel:
                laid = _shape(shape)
                piece, at = stream.take(body, at, round(codec.bits(laid) * numel / 8))
                value = codec.decode(_state(codec, laid, piece))
                value = value if laid == (shape or (1,)) else value.mT
            if not torch.isfinite(value).all():
                raise ArtefactError(f"The tensor {name!r} decodes to nan or infinite entries: the stream is damaged.")
            kind = torch.finfo(DTYPES[dtype])
            out[name] = value.double().clamp(kind.min, kind.max).to(DTYPES[dtype]).reshape(shape)
        if at != len(body):
            raise ArtefactError(f"The {self.name} stream has {len(body) - at} bytes left over: it is damaged.")
        return out

    def bits(self, numel: int | None = None) -> float:
        """Bits per parameter of one row of ``numel`` entries (default: so many that constants are shared fully)."""
        return self.codec.bits((numel or 2**20,))


def _shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape a tensor is laid in: at least one axis, and the longer one of a matrix last."""
    tall = len(shape) > 1 and shape[-2] > shape[-1]
    return (*shape[:-2], shape[-1], shape[-2]) if tall else shape or (1,)


def _laid(t: Tensor) -> Tensor:
    return t.mT.contiguous() if t.dim() > 1 and t.shape[-2] > t.shape[-1] else t.reshape(_shape(tuple(t.shape)))


def _keys(state: Mapping[str, Any]) -> list[str]:
    return sorted(k for k, v in state.items() if isinstance(v, Tensor))


def _bytes(t: Tensor) -> bytes:
    return t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _state(codec: Codec, shape: tuple[int, ...], piece: bytes) -> dict[str, Any]:
    """The state in ``piece``, laid out as that of a weight of zeros is."""
    like, state, at = codec.encode(torch.zeros(shape)), {"shape": shape}, 0
    for key in _keys(like):
        count = math.prod(like[key].shape) * like[key].element_size()
        raw = torch.from_numpy(np.frombuffer(piece, np.uint8, count, at).copy()) if count else torch.zeros(0, dtype=torch.uint8)
        state[key], at = raw.view(like[key].dtype).reshape(like[key].shape), at + count  # type: ignore[assignment]
    if at != len(piece):
        raise ArtefactError(f"A state takes {at} bytes where {len(piece)} were counted: the stream is damaged.")
    return state
