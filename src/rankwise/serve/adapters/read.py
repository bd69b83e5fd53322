"""One adapter's bytes, read through one descriptor of its folder, as a native header and tensors, whatever its format."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import RankwiseError
from rankwise.recipe import Part
from rankwise.runtime.read import as_native
from rankwise.serve.adapters.base import AdapterMetadata, LoadedAdapter
from rankwise.serve.adapters.kinds import Options, grouped, lifted, measured, refuse_nonfinite
from rankwise.serve.types import AdapterRefused, ServeError
from rankwise.store import tensorfile
from rankwise.store.coded import KIND, decode_file
from rankwise.store.foreign import read_foreign
from rankwise.store.native import FILE, header_of
from rankwise.store.peft import config as cfg
from rankwise.store.peft.folder import check_stamp
from rankwise.store.peft.read import PeftReader

if TYPE_CHECKING:
    from rankwise.serve.adapters.layout import Layout

#: what of a native header decides the numbers; its name, provenance and the base's fingerprint do not
_MEANING = ("parts", "states", "recipe", "kind")
Key = tuple[tuple[str, int, int, int], ...]


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class AdapterFile:
    """An adapter as native fields and tensors by our names.

    Attributes:
        format: native, peft or foreign.
        head, tensors: its header and its tensors.
        digest: of both and of how they will be prepared.
    """

    format: str
    head: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    digest: str

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())


@contextlib.contextmanager
def refusing(name: str, *folders: Path) -> Iterator[None]:
    """Every error of a file as an :class:`AdapterRefused` that names the adapter, never where it lies."""
    try:
        yield
    except ServeError:
        raise
    except (RankwiseError, OSError) as error:
        said = str(error)
        for folder in folders:
            said = said.replace(os.fspath(folder), name)
        raise AdapterRefused(f"The adapter {name!r} cannot be served: {said}") from error


def state_key(at: int) -> Key:
    """What tells one version of a folder's files from another without reading them."""
    found = [(e.name, e.stat()) for e in os.scandir(at) if not e.name.startswith(".") and e.is_file()]
    return tuple(sorted((n, s.st_size, s.st_mtime_ns, s.st_ino) for n, s in found))


def holds_adapter(folder: str) -> bool:
    """Whether a folder has the look of an adapter."""
    with os.scandir(folder) as entries:
        return any(e.name == cfg.CONFIG or e.name.endswith((".safetensors", ".gguf")) for e in entries)


def read_adapter(
    at: int, folder: Path, name: str, layout: Layout, config: Any, options: Options, *, trusted: bool = False
) -> AdapterFile:
    """The adapter in the folder that descriptor ``at`` stands for; ``folder`` is its path, for links and messages.

    Args:
        config: the model's config (GGUF's names depend on it).
        trusted: bytes of this digest were checked before; the caller compares digests, so they are not checked again.

    Raises:
        AdapterRefused: damaged, hostile, of no known format, or its names and shapes do not fit the base.
    """
    inside = Path(f"/proc/self/fd/{at}")  # the very folder that was checked, whatever its name leads to now
    inside = inside if inside.is_dir() else folder
    with refusing(name, folder, inside):
        names = {n for n, *_ in state_key(at)}
        if FILE in names:
            format, (head, tensors) = "native", _native(folder, at, name, trusted)
        elif cfg.CONFIG in names:
            format, (head, tensors) = "peft", _peft(folder, at, name, layout, trusted)
        else:
            state, info = read_foreign(inside, layout.sites, config)
            format, (head, tensors) = "foreign", _described(*as_native(layout.sites, state, info, name))
        meaning = json.dumps({k: head.get(k) for k in _MEANING}, sort_keys=True, separators=(",", ":"))
        return AdapterFile(format, head, tensors, tensorfile.digest(tensors, f"{options.salt()}\0{meaning}"))


def _native(folder: Path, at: int, name: str, trusted: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, metadata = tensorfile.read_tensors(folder, FILE, allow_nonfinite=trusted, at=at)
    head = header_of(tensors, metadata, name, check=not trusted)
    if head["kind"] == KIND:
        tensors, head = decode_file(tensors, head, name)
    if head["kind"] != "adapter" or not head["parts"]:
        raise AdapterRefused(f"The adapter {name!r} is a native file of kind {head['kind']!r}, not an adapter with its recipe.")
    return head, tensors


def _peft(folder: Path, at: int, name: str, layout: Layout, trusted: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    raw = tensorfile.read_small(folder, cfg.CONFIG, cfg.MAX_CONFIG, at=at)
    try:
        tensors, metadata = tensorfile.read_tensors(folder, cfg.WEIGHTS, allow_nonfinite=trusted, at=at)
    except FileNotFoundError as error:
        for other in sorted(os.listdir(at)):
            tensorfile.refuse_pickle(other, b"")
        raise AdapterRefused(f"The adapter {name!r} has {cfg.CONFIG}, but no {cfg.WEIGHTS}.") from error
    if not trusted:
        check_stamp(raw, tensors, metadata, name)
    state, info = PeftReader(cfg.parse_config(raw, name), tensors, layout.sites, name).read(collapse_ties=True)
    return _described(*as_native(layout.sites, state, info, name))


def _described(parts: list[dict[str, Any]], tensors: dict[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    return {"parts": parts, "states": {}, "recipe": None, "kind": "adapter"}, tensors


# --- the straight way of plain pairs ---------------------------------------------------------------------------
def kind_of(head: Mapping[str, Any]) -> str:
    """The forms of an adapter's parts, with their routers: ``lora``, ``dora+dense``, ``lora/smora``."""
    found = set()
    for entry in head["parts"]:
        part = Part(**entry["part"])
        form, router = (f["name"] if isinstance(f, Mapping) else f for f in (part.form, part.router))
        found.add(f"{form}/{router}" if router else f"{form}")
    return "+".join(sorted(found))


def is_plain(kind: str, head: Mapping[str, Any], layout: Layout) -> bool:
    """Whether every part is a plain ``lora`` at linears of the groups, so that its tensors are its pairs."""
    if kind != "lora" or any(head["states"].values()):
        return False
    sites = [n for entry in head["parts"] for n in entry["ranks"]]
    return all(n in layout.spots and not layout.sites[n].spec.tie_group for n in sites)


def plain_served(read: AdapterFile, layout: Layout, manifest: AdapterMetadata, options: Options) -> LoadedAdapter:
    """A plain LoRA's tensors as pairs; what the general way gives of it, without attaching it to anything.

    Args:
        read, manifest: the adapter, and what is known of it already.
        layout, options: where its pairs go, and how they are prepared.

    Raises:
        AdapterRefused: a tensor missing, superfluous or of another shape; numbers that are not finite once scaled.
    """
    names = [(n, float(entry["scales"][n]), r) for entry in read.head["parts"] for n, r in entry["ranks"].items()]
    left = dict(read.tensors)
    found = [(left.pop(f"{n}::A", None), left.pop(f"{n}::B", None)) for n, _, _ in names]
    for (site, _, rank), (A, B) in zip(names, found, strict=True):
        spec = layout.sites[site].spec
        if A is None or B is None or A.shape != (rank, spec.inp) or B.shape != (spec.out, rank):
            got = [None if t is None else tuple(t.shape) for t in (A, B)]
            raise AdapterRefused(
                f"The adapter {manifest.name!r} has A, B of {got} at {site!r}, which takes {(rank, spec.inp)}, {(spec.out, rank)}."
            )
    if left:
        raise AdapterRefused(f"The adapter {manifest.name!r} holds {min(left)!r}, which nothing in the base takes.")
    scales = [s for _, s, _ in names]
    As = _together([A for A, _ in found], scales, options.dtype, manifest.name)  # type: ignore[misc]
    Bs = _together([B for _, B in found], [1.0] * len(found), options.dtype, manifest.name)  # type: ignore[misc]
    pairs: dict[tuple[str, int], list[tuple[Tensor, Tensor]]] = {}
    for (site, _, _), A, B in zip(names, As, Bs, strict=True):
        spot = layout.spots[site]
        pairs.setdefault((spot.group, spot.j), []).append(lifted(spot, A, B))
    return measured(LoadedAdapter(manifest, grouped(layout, pairs)))


def _together(tensors: list[Tensor], scales: list[float], dtype: torch.dtype, name: str) -> list[Tensor]:
    """Each tensor times its scale, in fp32, then ``dtype``; views of one new stretch of memory, so that no file's buffer is kept."""
    sizes = [t.numel() for t in tensors]
    flat = torch.cat([t.reshape(-1).float() for t in tensors])
    if len(set(scales)) == 1:
        flat *= scales[0]
    else:
        for part, s in zip(flat.split(sizes), scales, strict=True):
            part *= s
    flat = flat.to(dtype)
    refuse_nonfinite([flat], name)
    return [part.view(t.shape) for part, t in zip(flat.split(sizes), tensors, strict=True)]
