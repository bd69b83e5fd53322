"""What the files of other libraries share: one module's factors in or out of a file, put on the model's sites by exact name.

Every key must be understood and every name must lead to one module of the model; nothing is guessed and nothing skipped.
"""

from __future__ import annotations

import dataclasses
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError, nearest
from rankwise.sites.spec import SiteSpec
from rankwise.store import tensorfile
from rankwise.store.atomic import replace_file
from rankwise.store.peft import config as cfg
from rankwise.store.peft import pack as packing
from rankwise.store.peft.info import PeftInfo

#: a pipeline's parts, by the names that diffusers gives them
COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_OURS = ("rankwise.safetensors",)


@dataclasses.dataclass
class Factors:
    """One module's tensors as a file has them; ``scale`` is what B·A is multiplied by, ``rank`` what the config says.

    Args:
        A: down projection, rank first; None: not found.
        B: up projection, rank second; None: not found.
        alpha: the scale's numerator; None: the file has none.
        magnitude: DoRA's row norms; None: no DoRA.
    """

    A: Tensor | None = None
    B: Tensor | None = None
    alpha: float | None = None
    magnitude: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class WeightChange:
    """One whole weight's change on its way out: A: r×in, B: out×r, ΔW = scale·B·A, and DoRA's row norms (out,).

    Args:
        spec: of the weight.
        A: r×in.
        B: out×r.
        scale: of B·A.
        magnitude: (out,); None: no DoRA.
    """

    spec: SiteSpec
    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return self.A.shape[-2]


# --- files --------------------------------------------------------------------------------------------------------
def find_file(path: str | os.PathLike[str], suffix: str) -> Path | None:
    """The one file with ``suffix`` that ``path`` is or holds (ours and PEFT's aside); None where there is none.

    Raises:
        ArtefactError: several, so that which one is meant is not known.
    """
    p = Path(path)
    if p.is_file():
        return p if p.suffix == suffix else None
    if not p.is_dir():
        return None
    found = sorted(f for f in p.iterdir() if f.suffix == suffix and f.name not in (*_OURS, cfg.WEIGHTS))
    if len(found) > 1:
        raise ArtefactError(f"{p} holds several {suffix} files ({', '.join(f.name for f in found[:4])}); give the path of one.")
    return found[0] if found else None


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """One safetensors file in one atomic rename; equal tensors give equal bytes."""
    plain = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    replace_file(file, tensorfile.pack(plain, {"format": "pt", **metadata}))
    return file


def target(path: str | os.PathLike[str], suffix: str, default: str) -> Path:
    """``path`` where it names a file with ``suffix``, else file ``default`` in folder ``path``."""
    p = Path(path)
    return p if p.suffix == suffix else p / default


# --- out ----------------------------------------------------------------------------------------------------------
def pieces(
    state: AdapterState,
    specs: Mapping[str, Any],
    magnitude: Mapping[str, Tensor],
    format: str,
    kinds: Iterable[str] = ("linear", "conv"),
) -> list[WeightChange]:
    """The changes by whole weight, in model order; fused parts share one pair, zero changes are left out.

    Args:
        state: low-rank changes.
        specs: every site of the model, in module order.
        magnitude: site → DoRA's row norms.
        format: its name, for messages.
        kinds: of site that the format can hold.

    Raises:
        ArtefactError: whole tensors, or a place that ``format`` cannot hold; the message names it.
    """
    if state.full:
        raise ArtefactError(
            f"{format} holds low-rank pairs only, but {sorted(state.full)[:3]} are saved whole. Use the native or PEFT's format."
        )
    plain = {n: getattr(s, "spec", s) for n, s in specs.items()}
    whole: dict[tuple[str, str], SiteSpec] = {}
    for spec in plain.values():
        if spec.rows is None:
            whole.setdefault((spec.module, spec.param), spec)
    parts: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name, spec in plain.items():
        if name in state.sites and state.sites[name].exact_rank != 0:
            parts[spec.module, spec.param].append(name)
    if not parts:
        raise ArtefactError("There is nothing to export: no site has a change.")
    out = []
    for key, names in parts.items():
        if key not in whole:
            raise ArtefactError(f"The specs lack the whole weight of {names[0]!r}; give every site of the model.")
        _check_place(whole[key], specs.get(whole[key].name), format, tuple(kinds))
        out.append(_piece(whole[key], names, plain, state, magnitude, format))
    return out


def _piece(
    whole: SiteSpec,
    names: list[str],
    specs: Mapping[str, SiteSpec],
    state: AdapterState,
    magnitude: Mapping[str, Tensor],
    format: str,
) -> WeightChange:
    found = [(specs[n], *packing.pair(state.sites[n], n)) for n in names]  # type: ignore[arg-type]
    normed = [n for n in names if n in magnitude]
    if len(found) == 1 and found[0][0].rows is None:
        _, A, B, s = found[0]
        return WeightChange(whole, A, B, s, magnitude.get(names[0]))
    if normed:
        raise ArtefactError(
            f"{format} has no norms for a part of a fused weight, which {normed[0]!r} is; merge the adapter instead."
        )
    A, B = packing.fuse([(spec, A, (B.double() * s).to(B.dtype)) for spec, A, B, s in found], whole)
    return WeightChange(whole, A, B, 1.0)


def _check_place(spec: SiteSpec, site: Any, format: str, kinds: tuple[str, ...]) -> None:
    what = f"{format} cannot hold the change of {spec.name!r}:"
    if spec.kind not in kinds:
        raise ArtefactError(f"{what} it is a place of kind {spec.kind!r}, and the format knows {', '.join(kinds)}.")
    if not spec.module or spec.param != "weight" or spec.mode == "read":
        raise ArtefactError(f"{what} it is no weight that its own module multiplies with. Merge the adapter instead.")
    if spec.groups > 1:
        raise ArtefactError(f"{what} its convolution has {spec.groups} groups, which the format's pair of convolutions ignores.")
    module = getattr(site, "module", None) if spec.kind == "conv" and not isinstance(site, SiteSpec) else None
    if module is not None and (set(module.dilation) != {1} or module.padding_mode != "zeros"):
        raise ArtefactError(f"{what} its convolution is dilated or padded otherwise than with zeros, which readers ignore.")


# --- in -----------------------------------------------------------------------------------------------------------
def on_sites(
    found: Mapping[str, Factors], specs: Mapping[str, Any], scale_of: Callable[[str, int, Factors], float], where: str
) -> tuple[AdapterState, PeftInfo]:
    """(state, info) of the factors by *module of the model*; ``scale_of(module, rank, factors)`` is the multiplier.

    Args:
        found: module of the model → factors.
        specs: every site of the model, in module order.
        scale_of: the multiplier of B·A.
        where: what to call the file in messages.

    Raises:
        ArtefactError: half a pair, a wrong shape, a module that the model lacks.
    """
    whole = by_module(specs)
    sites: dict[str, LowRank] = {}
    norms: dict[str, Tensor] = {}
    for module, f in found.items():
        if module not in whole:
            raise ArtefactError(
                f"{where} adapts {module!r}, which this model lacks; {nearest(module, whole)} It was made for another base."
            )
        spec = whole[module]
        if f.A is None or f.B is None:
            raise ArtefactError(f"{where}: {module!r} lacks its {'first' if f.A is None else 'second'} factor.")
        A, B = _fit(f.A, spec), _fit(f.B, spec)
        rank = A.shape[0]
        if rank > cfg.MAX_RANK:
            raise ArtefactError(f"{where}: {module!r} claims rank {rank}; the limit is {cfg.MAX_RANK}.")
        A, B = packing.from_peft(spec, A, B, rank, f"{where}: {module}")
        sites[spec.name] = LowRank(A, B, scale_of(module, rank, f))
        if f.magnitude is not None:
            packing.expect(f.magnitude.reshape(-1), (spec.out,), f"{where}: the magnitude of {module}", spec)
            norms[spec.name] = f.magnitude.reshape(-1)
    if not sites:
        raise ArtefactError(f"{where} holds no adapter: no tensor in it is a LoRA factor.")
    if norms and set(norms) != set(sites):
        raise ArtefactError(f"{where}: {sorted(set(sites) - set(norms))[:3]} lack the magnitude that the others have.")
    info = PeftInfo(
        config={},
        base_model=None,
        task_type=None,
        dropout=0.0,
        magnitude=norms,
        bias={},
        base_layers={},
        untied=sorted(n for n in sites if specs_of(specs)[n].tie_group),
        modules_to_save=[],
    )
    return AdapterState(sites, {}, {"source": where}), info


def specs_of(specs: Mapping[str, Any]) -> dict[str, SiteSpec]:
    """Plain specs of sites or specs."""
    return {n: getattr(s, "spec", s) for n, s in specs.items()}


def by_module(specs: Mapping[str, Any]) -> dict[str, SiteSpec]:
    """Module path → its whole weight, for the modules that a pair of factors can belong to."""
    out: dict[str, SiteSpec] = {}
    for spec in specs_of(specs).values():
        if spec.rows is None and spec.kind in ("linear", "conv", "embedding") and spec.param == "weight":
            out.setdefault(spec.module, spec)
    return out


def _fit(tensor: Tensor, spec: SiteSpec) -> Tensor:
    """A 1×1 convolution's factor for a linear, and the other way: some models store the same projection either way."""
    if spec.kind == "linear" and tensor.dim() > 2 and set(tensor.shape[2:]) == {1}:
        return tensor.reshape(tensor.shape[:2])
    if spec.kind == "conv" and tensor.dim() == 2 and set(spec.kernel) == {1}:
        return tensor.reshape(*tensor.shape, *spec.kernel)
    return tensor


def align(modules: Iterable[str], known: Iterable[str]) -> Callable[[str], str]:
    """How a file's module names become the model's: as they are, or with one leading segment more or less, all alike."""
    modules, names = list(modules), set(known)
    changes: list[Callable[[str], str]] = [lambda m: m]
    for lead in ("text_model.", "model.", *(f"{c}." for c in COMPONENTS)):
        changes += [lambda m, lead=lead: m.removeprefix(lead), lambda m, lead=lead: lead + m]  # type: ignore[misc]
    changes += [lambda m, c=c: m.replace(f"{c}.text_model.", f"{c}.") for c in COMPONENTS]  # type: ignore[misc]
    return max(changes, key=lambda change: sum(change(m) in names for m in modules))


def component_of(model: Any) -> str:
    """What diffusers calls a lone ``model`` in a pipeline; "" for a module whose children bear the components' names."""
    if any(name in COMPONENTS for name in getattr(model, "_modules", {})):
        return ""
    kind = type(model).__name__
    if "UNet" in kind:
        return "unet"
    if kind.startswith(("CLIPText", "T5Encoder", "UMT5Encoder")):
        return "text_encoder"
    return "transformer"


def scalar(tensor: Tensor, what: str) -> float:
    """The finite non-zero number in a file's ``alpha``."""
    if tensor.numel() != 1 or not bool(torch.isfinite(tensor.float()).all()):
        raise ArtefactError(f"{what} is no single finite number.")
    return float(tensor)
