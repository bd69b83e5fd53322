"""The native adapter file: one ``rankwise.safetensors`` in a folder, tensors and a validated JSON header, one rename.

Equal tensors and headers give equal bytes in every process; a digest over both makes any flipped bit an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pydantic
from torch import Tensor

from rankwise.delta.base import Delta, rebuild
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError
from rankwise.store import tensorfile
from rankwise.store.atomic import FILES, Files, replace_file

FILE = "rankwise.safetensors"
VERSION = 1


class SiteEntry(pydantic.BaseModel):
    """How one site's delta is put together again."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    kind: str
    meta: dict[str, Any] = {}
    tensors: list[str] = []


class Header(pydantic.BaseModel):
    """The JSON part of a native file; every field but the version has a default, none other is known.

    ``recipe``, ``parts``, ``states``, ``fingerprint``, ``provenance``, ``banks``, ``journal`` and ``meta`` are plain
    data of their owners; ``specs`` maps a site's name to :meth:`SiteSpec.to_json`; ``full`` lists the whole tensors by parameter name.
    """

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    version: Literal[1] = 1
    kind: str = "adapter"
    name: str = ""
    parts: list[dict[str, Any]] = []
    states: dict[str, Any] = {}
    recipe: dict[str, Any] | None = None
    specs: dict[str, dict[str, Any]] = {}
    sites: dict[str, SiteEntry] = {}
    banks: dict[str, Any] = {}
    full: list[str] = []
    journal: dict[str, Any] = {}
    fingerprint: dict[str, Any] = {}
    provenance: dict[str, Any] = {}
    meta: dict[str, Any] = {}


def save_native(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], header: Mapping[str, Any], *, files: Files = FILES
) -> Path:
    """Write ``tensors`` and ``header`` to folder ``path`` in one atomic rename; returns the file's path.

    Args:
        path: the folder.
        tensors: by the names they get.
        header: of the adapter or state.
        files: how files are written; a test gives one that fails.

    Raises:
        ArtefactError: a tensor without plain bytes, a header outside the schema, or the system refused.
    """
    checked = _validate(dict(header), str(path))
    try:
        text = json.dumps(checked, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (ValueError, TypeError) as e:
        raise ArtefactError(f"{path}: the header is not plain finite data: {e}.") from e
    pieces = tensorfile.pack(tensors, {"format": "rankwise", "rankwise": text, "sha256": tensorfile.digest(tensors, text)})
    target = Path(path) / FILE
    replace_file(target, pieces, files=files)
    return target


def load_native(
    path: str | os.PathLike[str], *, allow_nonfinite: bool = False, mapped: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, header) of the native file in folder ``path``; the header holds every field of :class:`Header`.

    Raises:
        ArtefactError: no such file, damage, an unknown version, or a header outside the schema.
    """
    path = Path(path).parent if Path(path).name == FILE else Path(path)
    where = os.fspath(path)
    try:
        tensors, metadata = tensorfile.read_tensors(path, FILE, allow_nonfinite=allow_nonfinite, mapped=mapped)
    except FileNotFoundError as e:
        raise ArtefactError(f"There is no {FILE} in {where!r}: it is not a native rankwise adapter.") from e
    return tensors, header_of(tensors, metadata, where)


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str, *, check: bool = True) -> dict[str, Any]:
    """The header of a native file whose tensors and metadata are read; ``check=False`` where its bytes were checked before.

    Args:
        tensors: of the file.
        metadata: of the file.
        where: what to call the file in messages.
        check: hold the digest against the tensors.

    Raises:
        ArtefactError: not a native file, damage, an unknown version, or a header outside the schema.
    """
    if metadata.get("format") != "rankwise" or set(metadata) != {"format", "rankwise", "sha256"}:
        raise ArtefactError(f"{where}/{FILE} is a safetensors file, but not one of rankwise.")
    text = metadata["rankwise"]
    data = tensorfile.strict_json(text.encode("utf-8", "surrogatepass"), where)
    version = data.get("version")
    if version != VERSION:
        raise ArtefactError(f"{where}/{FILE} has format version {version!r}; this rankwise reads {VERSION}. Update rankwise.")
    if check and tensorfile.digest(tensors, text) != metadata["sha256"]:
        raise ArtefactError(f"{where}/{FILE} is damaged: its digest does not fit its content.")
    return _validate(data, where)


def is_native(path: str | os.PathLike[str]) -> bool:
    """Whether folder ``path`` holds a native file (not whether it is sound)."""
    return os.path.isfile(os.path.join(path, FILE))


def state_tensors(state: AdapterState) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of ``state`` under their names in a file, and the header fields that describe them."""
    tensors: dict[str, Tensor] = {}
    sites: dict[str, Any] = {}
    for site, delta in state.sites.items():
        parts = delta.tensors()
        sites[site] = {"kind": delta.kind, "meta": dict(delta.meta()), "tensors": sorted(parts)}
        for key, tensor in parts.items():
            tensors[f"site::{site}::{key}"] = tensor
    for name, tensor in state.full.items():
        tensors[f"full::{name}"] = tensor
    if len(tensors) != sum(len(s["tensors"]) for s in sites.values()) + len(state.full):
        raise ArtefactError("Two tensors of the adapter would have the same name in the file.")
    return tensors, {"sites": sites, "full": sorted(state.full), "meta": dict(state.meta)}


def rebuild_state(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> AdapterState:
    """Inverse of :func:`state_tensors`; every tensor must be used, and none may be missing."""
    left = dict(tensors)

    def take(name: str) -> Tensor:
        if name not in left:
            raise ArtefactError(f"The file has no tensor {name!r}, which its header names.")
        return left.pop(name)

    sites = {}
    for site, entry in header["sites"].items():
        parts = {key: take(f"site::{site}::{key}") for key in entry["tensors"]}
        sites[site] = _rebuild(site, entry, parts)
    full = {name: take(f"full::{name}") for name in header["full"]}
    if left:
        raise ArtefactError(f"The file holds tensors that its header does not name: {sorted(left)[:5]}.")
    return AdapterState(sites, full, header["meta"])


def _rebuild(site: str, entry: Mapping[str, Any], parts: dict[str, Tensor]) -> Delta:
    """One site's value; what a hostile header makes a constructor trip over, or swallow, is refused here."""
    kind, meta = entry["kind"], entry["meta"]
    scale = meta.get("scale", 1.0)
    try:
        if type(scale) not in (int, float) or not math.isfinite(scale):
            raise ValueError(f"its scale is {str(scale)[:40]!r}")
        delta = rebuild(kind, parts, meta)
        if set(delta.tensors()) != set(parts) or json.loads(json.dumps(delta.meta())) != meta or min(delta.shape, default=0) < 0:
            raise ValueError("its fields are not those of the kind")
    except Exception as e:
        raise ArtefactError(f"Site {site!r} holds no valid {kind!r}: {e}") from e
    return delta


def save_state(path: str | os.PathLike[str], state: AdapterState, header: Mapping[str, Any] | None = None) -> Path:
    """Write an :class:`AdapterState` to folder ``path``; ``header`` adds fields (specs, fingerprint, provenance …)."""
    tensors, fields = state_tensors(state)
    return save_native(path, tensors, {"kind": "state", **(header or {}), **fields})


def load_state(path: str | os.PathLike[str], **options: Any) -> AdapterState:
    """The :class:`AdapterState` in folder ``path``; options as :func:`load_native`."""
    tensors, header = load_native(path, **options)
    return rebuild_state(tensors, header)


def _validate(header: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        return Header.model_validate(header).model_dump()
    except (pydantic.ValidationError, RecursionError) as e:
        first = e.errors()[0] if isinstance(e, pydantic.ValidationError) else {"loc": (), "msg": "nested too deeply"}
        place = ".".join(map(str, first["loc"])) or "header"
        raise ArtefactError(f"{where}: the header's field {place!r} is not valid: {first['msg']}.") from e
