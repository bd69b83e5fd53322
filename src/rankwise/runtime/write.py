"""An attached adapter to files: the native format, plain or coded, and other libraries' formats through the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise._version import __version__
from rankwise.codecs.weights import adapter_codec
from rankwise.delta.lowrank import drop_zero_sites
from rankwise.delta.state import AdapterState
from rankwise.errors import ArtefactError, MergeError, OptionError, nearest
from rankwise.recipe import Part
from rankwise.runtime.tensors import base_tensors, reference_tensors
from rankwise.store import coded
from rankwise.store.diffusers import export_diffusers
from rankwise.store.fingerprint import fingerprint
from rankwise.store.gguf import export_gguf
from rankwise.store.interchange import component_of
from rankwise.store.kohya import export_kohya
from rankwise.store.native import save_native
from rankwise.store.peft.export import export_peft

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.runtime.record import AdapterRecord
    from rankwise.sites.site import Site

FORMATS = ("peft", "native", "diffusers", "kohya", "gguf")


def save(record: AdapterRecord, model: nn.Module, path: str | Path) -> Path:
    """Write the native format: every tensor of the adapter, its recipe, ranks, scales and the base's fingerprint."""
    tensors = record.file_tensors()
    _refuse_nonfinite(record, tensors)
    return save_native(path, tensors, header(record, model))


def save_coded(
    record: AdapterRecord,
    model: nn.Module,
    path: str | Path,
    codec: str | Mapping[str, Any],
    *,
    reference: str | Path | None = None,
) -> Path:
    """Write a native file whose matrices are coded; ``rw.load`` reads it.

    Args:
        record: the adapter.
        model: the one it is attached to.
        path: the folder to write.
        codec: ``"compeft"`` or ``{"name": "intk", "k": 8}``.
        reference: for ``delta`` the other adapter: a folder, or the name of one attached to the same model.

    Raises:
        UnknownName, OptionError: no such codec or option; a reference missing or not needed; nothing to code; a whole weight in
            training (the form ``full``), whose neutral value is the base, by a lossy codec.
    """
    made = adapter_codec(codec)
    if made.relative:
        if reference is None:
            raise OptionError(
                f"The codec {made.name!r} stores an adapter as a difference from another one; give that one as the reference."
            )
        made = made.bind(reference_tensors(model, reference))
    elif reference is not None:
        raise OptionError(f"The codec {made.name!r} needs no other adapter; leave the reference out.")
    whole_weights = [n for n, d in record.deltas.items() if getattr(d, "base_parameters", None) is not None]
    if whole_weights and not made.exact and not made.relative:
        raise OptionError(
            f"{whole_weights[0]!r} is trained whole, so its neutral value is the base, which {made.name!r} does not know; "
            "use lossless, or delta against another adapter."
        )
    tensors = record.file_tensors()
    _refuse_nonfinite(record, tensors)
    # a loaded adapter may be frozen as a whole: then every parameter counts as trained
    trained = record.named_parameters() or record.tensors(buffers=False)
    return coded.save_coded(path, tensors, header(record, model), made, set(trained))


def _refuse_nonfinite(record: AdapterRecord, tensors: Mapping[str, Tensor]) -> None:
    """An adapter that load would refuse must not take the place of a good file."""
    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            site, _, tensor = key.partition("::")
            raise ArtefactError(
                f"The adapter {record.name!r} is not written: its tensor {tensor!r} at {site!r} holds NaN or infinite numbers. "
                "Go back to the last good checkpoint."
            )


def header(record: AdapterRecord, model: nn.Module) -> dict[str, Any]:
    """The native file's description of an adapter: enough to rebuild it on a base of the same shapes."""
    return {
        "name": record.name,
        "recipe": record.recipe.to_json(),
        "parts": [
            {
                "part": p.part.model_dump(mode="json", exclude_defaults=True, include=set(Part.model_fields)),
                "ranks": {n: p.plan.ranks[n] for n in p.sites if n in p.plan.ranks},
                "scales": {n: p.plan.scales[n] for n in p.sites if n in p.plan.scales},
                "specs": {n: s.spec.to_json() for n, s in p.sites.items()},
            }
            for p in record.parts
        ],
        "states": {n: d.file_state() for n, d in record.deltas.items()},
        "fingerprint": fingerprint(model, base_tensors(model)),
        "provenance": {"rankwise": __version__, "torch": torch.__version__},
    }


# --- other libraries' formats -------------------------------------------------------------------------------
def export(
    record: AdapterRecord, model: nn.Module, known: Mapping[str, Site], path: Path, format: str = "peft", **options: Any
) -> Path:
    """Write in another format; the value leaves against the untouched base, residual starts included.

    Args:
        record: the adapter.
        model: the one it is attached to.
        known: every site of the model, by name.
        path: the folder (or file) to write.
        format: one of :data:`FORMATS`.
        options: the format's own.

    Raises:
        MergeError: a site's change is neither low-rank nor a whole module's.
    """
    if format == "native":
        return save(record, model, path)
    if format not in FORMATS:
        raise OptionError(f"There is no format {format!r}; {nearest(format, FORMATS)}")
    state, magnitude = value_of(record, format)
    if format == "diffusers" or format == "kohya":
        options.setdefault("component", component_of(model))
        if format == "diffusers":
            return export_diffusers(path, state, known, magnitude=magnitude, **options)
        return export_kohya(path, state, known, magnitude=magnitude, **options)
    if format == "gguf":
        return export_gguf(path, state, known, getattr(model, "config", None), magnitude=magnitude, **options)
    if not state.sites:
        raise MergeError(
            "PEFT's format needs at least one low-rank change beside whole modules; this adapter has none. Save it in the native format."
        )
    config = getattr(model, "config", None)
    options.setdefault("base_model", getattr(config, "_name_or_path", None) or None)
    options.setdefault("modules", [n for n, _ in model.named_modules() if n and not n.startswith("rankwise")])
    options.setdefault("tied", not any(p.part.separate_tied for p in record.parts))
    return export_peft(path, state, known, magnitude=magnitude, **options)


def value_of(record: AdapterRecord, format: str = "peft") -> tuple[AdapterState, dict[str, Tensor]]:
    """(state of low-rank changes and whole parameters, DoRA's norms by site) as other libraries hold an adapter."""
    sites: dict[str, Delta] = {}
    magnitude: dict[str, Tensor] = {}
    full: dict[str, Any] = {}
    for name, delta in record.deltas.items():
        spec = delta.site.spec
        if spec.mode == "block":
            raise MergeError(
                f"{name!r} is a wrapped block, which the format {format!r} cannot hold; save the adapter in the native format."
            )
        value, m = delta.for_peft()
        if value.kind == "dense" and spec.rows is None:
            full[f"{spec.module}.{spec.param}".lstrip(".")] = whole(delta.site, value)
            continue
        try:
            sites[name] = value.to_lowrank()[0].detach()
        except (OptionError, MergeError) as error:
            raise MergeError(
                f"The format {format!r} holds low-rank pairs and whole modules, and {name!r} is neither: {error}"
            ) from error
        if m is not None:
            magnitude[name] = m.detach()
    return AdapterState(drop_zero_sites(sites) if not magnitude else sites, full), magnitude


def whole(site: Site, value: Delta) -> Tensor:
    """The parameter of a module saved whole: W + D as stored, in the base's dtype."""
    now = site.param.detach()
    return (now.float() + site.stored(value.dense().detach().float(), torch.zeros_like(now, dtype=torch.float32))).to(now.dtype)
