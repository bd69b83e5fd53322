"""An adapter's folder as a source of a merge, read one site at a time and without its model.

Of a PEFT folder the header and the config are read at once (by the store's own reader, on tensors without values), so
that every wrong name, rank or setting is told before any merging; a site's factors are read when it is its turn.  So a
hundred adapters cost the memory of one site of each.  What only the model can tell (DoRA's W, the change of a bias,
experts in a stack) is refused here and read by :func:`rankwise.merge.read_state`.
"""

from __future__ import annotations

import dataclasses
import mmap
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rankwise.catalogue import find
from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError, MergeError
from rankwise.sites.spec import SiteSpec
from rankwise.store import native, tensorfile
from rankwise.store.names import open_inside
from rankwise.store.peft import config as peft_config
from rankwise.store.peft import pack as peft_pack
from rankwise.store.peft.export import export_peft
from rankwise.store.peft.read import PeftReader

if TYPE_CHECKING:
    from rankwise.delta.base import Delta

T = TypeVar("T")


class Lazy(Mapping[str, T]):
    """Names whose values are made each time they are asked for."""

    def __init__(self, names: Sequence[str], make: Callable[[str], T]):
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> T:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclasses.dataclass(frozen=True, eq=False)
class Folder:
    """A :class:`~rankwise.merge.engine.base.Source` on disk.

    Attributes:
        sites: module name → LowRank, read at each access.
        full: parameter name → whole tensor (a head of ``modules_to_save``), likewise.
        specs: of the sites, as far as the file tells: what an export without the model needs.
        base: what the file says of its base: a name, or a fingerprint's digest.
    """

    path: Path
    sites: Mapping[str, Delta]
    full: Mapping[str, Tensor]
    specs: Mapping[str, SiteSpec]
    base: str | None
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def open_folder(path: str | os.PathLike[str], *, verify: bool = True) -> Folder:
    """The adapter in folder ``path``, PEFT or native.

    Args:
        verify: check the file's own digest, where it has one, tensor by tensor.

    Raises:
        ArtefactError: no such folder, damage.
        MergeError: an adapter that is not plain low-rank changes without its model.
    """
    folder = Path(path)
    if native.is_native(folder):
        return _native(folder, verify)
    if not (folder / peft_config.CONFIG).is_file():
        raise ArtefactError(f"{folder} holds no adapter: neither {native.FILE} nor {peft_config.CONFIG} is in it.")
    return _peft(folder, verify)


def open_folders(paths: Sequence[str | os.PathLike[str]], *, check_base: bool = True, verify: bool = True) -> list[Folder]:
    """Each of them; adapters that say they are of different bases are refused unless ``check_base`` is off."""
    found = [open_folder(p, verify=verify) for p in paths]
    bases = {f.base: f.path.name for f in found if f.base}
    if check_base and len({b.startswith("content:") for b in bases}) == 1 and len(bases) > 1:
        said = ", ".join(f"{where} of {base}" for base, where in list(bases.items())[:3])
        raise MergeError(
            f"These adapters were made for different bases: {said}. Merge adapters of one base (from Python, check_base=False merges them all the same)."
        )
    return found


def export_merged(path: str | os.PathLike[str], state: AdapterState, sources: Sequence[Folder]) -> Path:
    """Write the merged value of ``sources`` as a PEFT folder, for no model is at hand that could save it natively.

    A sum of so many adapters that its factors are wider than the matrix is written in as few as that has rows or columns.
    """
    narrow: dict[str, Delta] = {}
    for n, d in state.sites.items():
        most = min(d.shape[-2:])
        narrow[n] = d.to_lowrank(rank=most)[0] if (d.exact_rank or 0) > most else d
    specs = {n: s for f in reversed(sources) for n, s in f.specs.items()}
    named = next((f.base for f in sources if f.base and not f.base.startswith("content:")), None)
    task = next((f.config["task_type"] for f in sources if f.config.get("task_type")), None)
    return export_peft(path, AdapterState(narrow, state.full, state.meta), specs, base_model=named, task_type=task)


# --- the tensors of one file -----------------------------------------------------------------------------------
@dataclasses.dataclass(frozen=True)
class _TensorFile:
    """A safetensors file: its checked table, and a copy of one tensor at a time."""

    folder: Path
    name: str
    table: Mapping[str, tensorfile.Entry]
    metadata: Mapping[str, str]

    @classmethod
    def open(cls, folder: Path, name: str) -> _TensorFile:
        where = f"{folder}/{name}"
        try:
            fd = open_inside(folder, name)
        except FileNotFoundError as e:
            raise ArtefactError(f"There is no {where}.") from e
        try:
            if os.fstat(fd).st_size == 0:
                raise ArtefactError(f"{where} is empty.")
            with mmap.mmap(fd, 0, access=mmap.ACCESS_READ) as view:
                table, metadata, _ = tensorfile.read_header(view, where)
        finally:
            os.close(fd)
        return cls(folder, name, table, metadata)

    def read(self, name: str) -> Tensor:
        """A copy, so that no page of the file stays mapped.

        Raises:
            ArtefactError: values that are not finite.
        """
        from safetensors import safe_open

        with safe_open(self.folder / self.name, "pt") as f:
            tensor: Tensor = f.get_tensor(name).clone()
        tensorfile._check_values(tensor, f"{self.folder}/{self.name}: tensor {name!r}", False)
        return tensor

    def all(self) -> Mapping[str, Tensor]:
        return Lazy(list(self.table), self.read)

    def shapes(self) -> dict[str, Tensor]:
        """Every tensor without its values."""
        return {n: torch.empty(shape, dtype=dtype, device="meta") for n, (dtype, shape, _, _) in self.table.items()}


# --- PEFT ------------------------------------------------------------------------------------------------------
def _peft(folder: Path, verify: bool) -> Folder:
    """Alpha and rank patterns and rank-stabilised scales are in each site's own scale.  ``fan_in_fan_out`` says only how the
    base stores W: A and B are r×in and out×r all the same.
    """
    raw = tensorfile.read_small(folder, peft_config.CONFIG, peft_config.MAX_CONFIG)
    config = peft_config.parse_config(raw, f"{folder}/{peft_config.CONFIG}")
    file = _TensorFile.open(folder, peft_config.WEIGHTS)
    stamp = file.metadata.get("rankwise_sha256")
    if verify and stamp is not None:
        salt = peft_config.config_salt(tensorfile.strict_json(raw, str(folder)))
        if tensorfile.digest(file.all(), salt) != stamp:
            raise ArtefactError(f"{folder}: its config and its tensors do not belong together, or one is damaged. Export it again.")
    shapes = file.shapes()
    reader = PeftReader(config, shapes, None, str(folder))
    state, info = reader.read(collapse_ties=False)
    for what, found, why in (
        ("magnitudes (DoRA)", info["magnitude"], "their change depends on W"),
        ("changes of biases", info["bias"], "a bias is no low-rank change"),
        ("copies of base weights", info["base_layers"], "an embedding was resized or saved whole"),
    ):
        if found:
            raise MergeError(
                f"{folder} holds {what}, such as {next(iter(found))!r}: {why}. Give the model, and it is read with that (read_state)."
            )
    key_of = {id(t): k for k, t in shapes.items()}
    pairs = {n: reader.found[reader.specs[n].module, 0] for n in state.sites}
    keys = {n: (key_of[id(p["lora_A"])], key_of[id(p["lora_B"])]) for n, p in pairs.items()}
    scales = {n: (d.scale, peft_config.scale_of(config, reader.specs[n].module)[0]) for n, d in state.sites.items()}  # type: ignore[attr-defined]
    whole = {n: key_of[id(t)] for n, t in state.full.items()}
    embeddings = {n for n, (a, _) in keys.items() if a.endswith("lora_embedding_A")}
    specs = {n: dataclasses.replace(s, kind="embedding") if n in embeddings else s for n, s in reader.specs.items()}

    def site(name: str) -> Delta:
        scale, rank = scales[name]
        A, B = (file.read(k) for k in keys[name])
        return LowRank(*peft_pack.from_peft(reader.specs[name], A, B, rank, f"{folder}: {name}"), scale)

    base = info["base_model"]
    return Folder(
        folder, Lazy(list(state.sites), site), Lazy(list(whole), lambda n: file.read(whole[n])), specs, base, info["config"]
    )


# --- native ----------------------------------------------------------------------------------------------------
def _native(folder: Path, verify: bool) -> Folder:
    """A saved ``lora`` adapter, or a saved state of low-rank values."""
    file = _TensorFile.open(folder, native.FILE)
    where = f"{folder}/{native.FILE}"
    if set(file.metadata) != {"format", "rankwise", "sha256"}:
        raise ArtefactError(f"{where} is a safetensors file, but not one of rankwise.")
    text = file.metadata["rankwise"]
    head = native._validate(tensorfile.strict_json(text.encode("utf-8", "surrogatepass"), where), str(folder))
    if verify and tensorfile.digest(file.all(), text) != file.metadata["sha256"]:
        raise ArtefactError(f"{where} is damaged: its digest does not fit its content.")
    keys, scales = _of_state(folder, head) if head["kind"] == "state" else _of_adapter(folder, head, set(file.table))
    said = {n: s for part in head.get("parts", ()) for n, s in part["specs"].items()}
    specs = {n: _spec(n, file.table[a][1], file.table[b][1], said.get(n)) for n, (a, b) in keys.items()}
    full = {n: f"full::{n}" for n in head["full"]}

    def site(name: str) -> Delta:
        A, B = (file.read(k) for k in keys[name])
        return LowRank(A, B, scales[name])

    content = head["fingerprint"].get("content") or None
    base = f"content:{content}" if content else None
    return Folder(folder, Lazy(list(keys), site), Lazy(list(full), lambda n: file.read(full[n])), specs, base)


Keys = dict[str, tuple[str, str]]


def _of_state(folder: Path, head: Mapping[str, Any]) -> tuple[Keys, dict[str, float]]:
    for n, entry in head["sites"].items():
        if entry["kind"] != "lowrank" or sorted(entry["tensors"]) != ["A", "B"]:
            raise MergeError(f"{folder}: {n!r} is a {entry['kind']} change of {entry['tensors']}; lower it to low rank first.")
    keys = {n: (f"site::{n}::A", f"site::{n}::B") for n in head["sites"]}
    return keys, {n: float(e["meta"].get("scale", 1.0)) for n, e in head["sites"].items()}


def _of_adapter(folder: Path, head: Mapping[str, Any], tensors: set[str]) -> tuple[Keys, dict[str, float]]:
    keys: Keys = {}
    scales: dict[str, float] = {}
    for entry in head["parts"]:
        form = entry["part"].get("form", "lora")
        form = form.get("name") if isinstance(form, dict) else form
        if not {"pair", "lowrank"} <= find("form", str(form)).cls.provides:  # type: ignore[attr-defined]
            raise MergeError(
                f"{folder} is of the form {form!r}, not plain low-rank factors; give the model, and it is read with that."
            )
        for n in entry["ranks"]:
            keys[n], scales[n] = (f"{n}::A", f"{n}::B"), float(entry["scales"][n])
    if other := sorted(tensors - {k for pair in keys.values() for k in pair}):
        raise MergeError(f"{folder} holds {other[0]!r} beside its factors; give the model, and it is read with that (read_state).")
    return keys, scales


def _spec(name: str, A: tuple[int, ...], B: tuple[int, ...], said: Mapping[str, Any] | None) -> SiteSpec:
    """What the adapter's file says of the site (of a state nothing): an export must know an embedding from a linear layer."""
    if len(A) != 2 or len(B) != 2 or A[0] != B[1]:
        raise MergeError(f"The source at {name!r} has A {A} and B {B}; merge stacks of experts one by one.")
    return SiteSpec(name=name, module=name, out=B[0], inp=A[1]) if said is None else SiteSpec.from_json(dict(said))
