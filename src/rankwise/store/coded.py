"""A native file whose matrices are one stream of an adapter codec: smaller, and loaded like any other.

Tensors: ``stream`` (uint8, the codec's bytes), ``head`` (uint8, the adapter's own header, deflated), and under their names
those that are kept as they are.  Lossy codecs take the matrices that training moves, less their start where the file holds
it (A0, B0 of a residual init); vectors, frozen tensors, indices and replaced weights are kept.  ``lossless`` and ``delta``
take every floating tensor.  Rename, digest and checks are the native file's.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pydantic
import torch
from torch import Tensor

from rankwise.codecs.stream import DTYPES
from rankwise.codecs.weights import adapter_codec
from rankwise.errors import ArtefactError, Option, OptionError
from rankwise.store.native import Header, save_native
from rankwise.store.tensorfile import MAX_HEADER, strict_json

if TYPE_CHECKING:
    from rankwise.codecs.base import AdapterCodec

KIND = "coded"
_FLOATS = set(DTYPES.values())


def save_coded(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    codec: AdapterCodec,
    trained: Collection[str],
) -> Path:
    """Write a native adapter's ``tensors`` and ``header`` to folder ``path`` with its matrices coded; returns the file's path.

    Args:
        codec: of :func:`rankwise.codecs.weights.adapter_codec`; a ``delta`` is bound to its reference.
        trained: names of the tensors that training moves.

    Raises:
        OptionError: nothing in the adapter is coded by this codec, or the codec refuses a tensor.
    """
    names = [n for n, t in tensors.items() if _taken(codec, n, t, trained)]
    if not names:
        raise OptionError(
            f"The codec {codec.name!r} takes matrices that training moves, and this adapter has none; use lossless, or save it as it is."
        )
    coded = {n: _from_start(n, tensors) for n in names} if _by_value(codec) else {n: tensors[n] for n in names}
    head = zlib.compress(json.dumps(dict(header), sort_keys=True, separators=(",", ":")).encode(), 9)
    kept = {n: t for n, t in tensors.items() if n not in coded}
    if kept.keys() & {"stream", "head"}:
        raise ArtefactError("A tensor of the adapter is called 'stream' or 'head', as the file's own are; it cannot be coded.")
    files = kept | {"stream": _blob(codec.encode_tensors(coded)), "head": _blob(head)}
    return save_native(path, files, {"kind": KIND, "name": header.get("name", ""), "meta": {"codec": codec.name}})


def decode_file(
    tensors: Mapping[str, Tensor], head: Mapping[str, Any], where: str, reference: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of the adapter in a coded file, as ``load_native`` gives them of a plain one.

    Args:
        tensors: of the file.
        head: its header.
        where: what to call the file in messages.
        reference: the other adapter's tensors, where the file is a difference from one; None: none is given.

    Raises:
        ArtefactError: the stream or the header is damaged, the codec unknown, or the reference missing, wrong or not needed.
    """
    named = head["meta"].get("codec")
    if not isinstance(named, str) or not {"stream", "head"} <= tensors.keys():
        raise ArtefactError(f"{where} says that it is coded, but lacks its codec, its stream or its header: it is damaged.")
    try:
        codec = adapter_codec(named)
    except Exception as error:
        raise ArtefactError(f"{where} is coded by {named[:40]!r}, which this rankwise cannot read: {error}") from error
    if codec.relative:
        if reference is None:
            raise ArtefactError(
                f"{where} is stored as a difference from another adapter; give that one: ", Option("reference", ...), "."
            )
        codec = codec.bind(reference)
    elif reference is not None:
        raise ArtefactError(f"{where} is coded by {named}, which needs no other adapter; leave the reference out.")
    kept = {n: t for n, t in tensors.items() if n not in ("stream", "head")}
    found = codec.decode_tensors(_bytes(tensors["stream"], where))
    if found.keys() & kept.keys():
        raise ArtefactError(f"{where} holds {min(found.keys() & kept.keys())!r} twice: it is damaged.")
    if _by_value(codec):
        found = {n: _to_start(n, t, kept) for n, t in found.items()}
    return {**kept, **found}, _header(_bytes(tensors["head"], where), where)


def _by_value(codec: AdapterCodec) -> bool:
    """Whether what is coded is a value with a neutral start, not bits and not already a difference."""
    return not (codec.exact or codec.relative)


def _taken(codec: AdapterCodec, name: str, t: Tensor, trained: Collection[str]) -> bool:
    if t.dtype not in _FLOATS or not t.numel() or name.endswith("::replaced"):
        return False
    return not _by_value(codec) or (name in trained and t.dim() >= 2)


def _start(name: str, tensors: Mapping[str, Tensor], shape: torch.Size) -> Tensor | None:
    """A0 of A, where the file holds it: what an init took off W, so that A − A0 is what training did."""
    site, _, key = name.rpartition("::")
    start = tensors.get(f"{site}::{key}0")
    return start if start is not None and start.shape == shape else None


def _from_start(name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    t = tensors[name].detach().cpu()
    start = _start(name, tensors, t.shape)
    return t if start is None else t - start.detach().cpu().to(t.dtype)


def _to_start(name: str, t: Tensor, kept: Mapping[str, Tensor]) -> Tensor:
    start = _start(name, kept, t.shape)
    return t if start is None else t + start.to(t.dtype)


def _blob(data: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(data, np.uint8).copy())


def _bytes(t: Tensor, where: str) -> bytes:
    if t.dtype != torch.uint8 or t.dim() != 1:
        raise ArtefactError(f"{where} holds a coded part as {t.dtype} with {t.dim()} axes, not as bytes: it is damaged.")
    return t.numpy().tobytes()


def _header(data: bytes, where: str) -> dict[str, Any]:
    inflater = zlib.decompressobj()
    try:
        text = inflater.decompress(data, MAX_HEADER)
        if not inflater.eof or inflater.unused_data:
            raise ValueError(f"it does not end where its bytes do, or is longer than {MAX_HEADER} bytes")
        head = Header.model_validate(strict_json(text, where)).model_dump()
    except (zlib.error, ValueError, RecursionError, pydantic.ValidationError) as error:
        raise ArtefactError(f"{where}: the coded header is not valid: {str(error).splitlines()[0]}.") from error
    if head["kind"] == KIND:
        raise ArtefactError(f"{where}: the coded header is that of a coded file again: it is damaged.")
    return head
