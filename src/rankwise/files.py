"""Adapters to files and back: the native format, and other libraries' formats through the store."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise._version import __version__
from rankwise.attach import _install, activate_adapters, choose_sites, make_deltas
from rankwise.codecs.library import keep_stored
from rankwise.delta import Delta
from rankwise.errors import ArtefactError, MergeError, OptionError, nearest
from rankwise.forms.base import Form
from rankwise.recipe import Part, Recipe, build
from rankwise.roster import Installed, roster_of
from rankwise.sites import Site
from rankwise.store.fingerprint import compare, fingerprint
from rankwise.store.names import check_name

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.delta import AdapterState

FORMATS = ("peft", "native", "diffusers", "kohya", "gguf")


def base_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The base's own parameters by name, as they were before any adapter moved them."""
    roster = model._modules.get("rankwise")
    out: list[tuple[str, Tensor]] = [(n, p) for n, p in model.named_parameters() if not n.startswith("rankwise.")]
    if roster is None:
        return out
    journal = {**roster.journal, **{k: t for k, (_, t) in roster.moved.items() if t is not None}}  # type: ignore[union-attr,dict-item,operator]
    kept = {f"{m}.{p}".lstrip("."): t for (m, p), t in journal.items() if isinstance(t, Tensor)}  # type: ignore[misc]
    return [(n, kept.get(n, p)) for n, p in out]


def save(adapter: Adapter, path: Path) -> Path:
    """Write the native format: every tensor of the adapter, its recipe, ranks, scales and the base's fingerprint."""
    from rankwise.store.native import save_native

    extra = {f"{n}::{k}": t for n, d in adapter.sites.items() for k, t in d.file_tensors().items()}
    tensors = {**adapter.tensors(), **extra}
    _refuse_nonfinite(adapter, tensors)
    return save_native(path, tensors, header(adapter))


def save_coded(adapter: Adapter, path: str | Path, codec: str | Mapping[str, Any], *, reference: str | Path | None = None) -> Path:
    """Write a native file whose matrices are coded: ``"compeft"`` or ``{"name": "intk", "k": 8}``; :func:`load` reads it.

    Args:
        reference: for ``delta`` the other adapter: a folder, or the name of one attached to the same model.

    Raises:
        UnknownName, OptionError: no such codec or option; a reference missing or not needed; nothing to code; a whole weight in
            training (the form ``full``), whose neutral value is the base, by a lossy codec.
    """
    from rankwise.codecs.delta import Difference
    from rankwise.codecs.weights import adapter_codec
    from rankwise.store import coded

    made = adapter_codec(codec)
    if isinstance(made, Difference):
        if reference is None:
            raise OptionError(
                "The codec 'delta' stores an adapter as a difference from another one; give that one as the reference."
            )
        made = made.bind(reference_tensors(adapter.model, reference))
    elif reference is not None:
        raise OptionError(f"The codec {made.name!r} needs no other adapter; leave the reference out.")
    whole_weights = [n for n, d in adapter.sites.items() if getattr(d, "base_parameters", None) is not None]
    if whole_weights and not made.exact and not isinstance(made, Difference):
        raise OptionError(
            f"{whole_weights[0]!r} is trained whole, so its neutral value is the base, which {made.name!r} does not know; "
            "use lossless, or delta against another adapter."
        )
    extra = {f"{n}::{k}": t for n, d in adapter.sites.items() for k, t in d.file_tensors().items()}
    tensors = {**adapter.tensors(), **extra}
    _refuse_nonfinite(adapter, tensors)
    # a loaded adapter may be frozen as a whole: then every parameter counts as trained
    trained = adapter.named_parameters() or adapter.tensors(buffers=False)
    return coded.save_coded(path, tensors, header(adapter), made, set(trained))


def reference_tensors(model: nn.Module, reference: str | Path) -> dict[str, Tensor]:
    """Every tensor of the adapter in a native folder, or of the attached one of that name.

    Raises:
        ArtefactError: neither; a file that is itself a difference.
    """
    from rankwise.store.coded import KIND, decode_file
    from rankwise.store.native import is_native, load_native

    if is_native(reference):
        tensors, head = load_native(reference)
        return decode_file(tensors, head, str(reference))[0] if head["kind"] == KIND else tensors
    roster = model._modules.get("rankwise")
    if roster is not None and str(reference) in roster.records:  # type: ignore[union-attr,operator]
        from rankwise.adapter import Adapter

        held = Adapter(roster, str(reference))  # type: ignore[arg-type]
        return {**held.tensors(), **{f"{n}::{k}": t for n, d in held.sites.items() for k, t in d.file_tensors().items()}}
    raise ArtefactError(
        f"The reference {str(reference)!r} is neither a native adapter's folder nor an adapter attached to this model."
    )


def _refuse_nonfinite(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """An adapter that load would refuse must not take the place of a good file."""
    for key, t in tensors.items():
        if t.is_floating_point() and not torch.isfinite(t).all():
            site, _, tensor = key.partition("::")
            raise ArtefactError(
                f"The adapter {adapter.name!r} is not written: its tensor {tensor!r} at {site!r} holds NaN or infinite numbers. "
                "Go back to the last good checkpoint."
            )


def header(adapter: Adapter) -> dict[str, Any]:
    """The native file's description of an adapter: enough to rebuild it on a base of the same shapes."""
    record = adapter._record
    return {
        "name": adapter.name,
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
        "fingerprint": fingerprint(adapter.model, base_tensors(adapter.model)),
        "provenance": {"rankwise": __version__, "torch": torch.__version__},
    }


def load(
    model: nn.Module,
    path: str | Path,
    *,
    name: str | None = None,
    activate: bool = True,
    check_base: bool = True,
    reference: str | Path | None = None,
) -> Adapter:
    """Attach the adapter in ``path`` (a native, PEFT, diffusers, kohya or GGUF folder or file, or a hub id) and return its handle.

    Args:
        name: what to call it here; default its own name, or "default".
        check_base: refuse an adapter whose base differs in its weights, not only one that differs in shape.
        reference: of a file that is a difference (codec ``delta``), the other adapter: a folder, or the name of an attached one.

    Raises:
        ArtefactError: damaged, hostile or foreign file; the message names what differs.
    """
    keep_stored(model)  # a base that inference has repacked is told as such, not taken for another one
    folder = Path(path)
    if (folder / "rankwise.safetensors").exists() or folder.name == "rankwise.safetensors":
        return _load_native(model, folder, name, activate, check_base, reference)
    if reference is not None:
        raise ArtefactError(f"{path} is no native file, so it is no difference from another adapter; leave the reference out.")
    return _load_foreign(model, str(path), name, activate)


def _load_native(
    model: nn.Module, path: Path, name: str | None, activate: bool, check_base: bool, reference: str | Path | None
) -> Adapter:
    from rankwise.store.coded import KIND, decode_file
    from rankwise.store.native import load_native

    tensors, head = load_native(path)
    if head["kind"] == KIND:
        other = None if reference is None else reference_tensors(model, reference)
        tensors, head = decode_file(tensors, head, str(path), other)
    elif reference is not None:
        raise ArtefactError(f"{path} is a plain native file, not a difference from another adapter; leave the reference out.")
    differences = compare(head["fingerprint"], fingerprint(model, base_tensors(model)))
    shapes = [d for d in differences if not d.startswith("content")]
    if shapes or (differences and check_base):
        raise ArtefactError(
            f"The adapter in {path} was made for another base: {'; '.join(differences[:4])}. "
            + ("" if shapes else "Load it on its own base (from Python, check_base=False uses it here all the same).")
        )
    recipe = Recipe(**head["recipe"])
    return rebuild(model, recipe, head, tensors, head["name"] if name is None else name, activate)


def rebuild(
    model: nn.Module, recipe: Recipe, head: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, activate: bool
) -> Adapter:
    """Attach from a description and its tensors: no init is run again, no number is drawn that the file does not replace."""
    from rankwise.adapter import Adapter

    check_name(name)
    had = "rankwise" in model._modules
    roster = roster_of(model, create=True)
    try:
        if name in roster.records:
            raise ArtefactError(f"An adapter called {name!r} is already attached; give this one another name.")
        installed, deltas, followers = [], {}, {}
        for entry in head["parts"]:
            part = Part(**entry["part"])
            form: Form = build("form", part.form)
            sites, ties = _sites_for(roster, part, form, entry["ranks"])
            made, plan = make_deltas(form, part, sites, entry["ranks"], entry["scales"], recipe.seed, model, restoring=True)
            deltas.update(made)
            followers.update(ties)
            installed.append(Installed(part, form, plan, {n: d.site for n, d in made.items()}))
        for site, state in head["states"].items():
            deltas[site].restore_state(state, tensors, site)
        _install(roster, name, recipe, installed, deltas, followers)
    except BaseException:
        if not had and not roster.records:
            model._modules.pop("rankwise", None)
        raise
    adapter = Adapter(roster, name)
    _copy_in(adapter, tensors)
    if activate:
        activate_adapters(model, name)
    return adapter


def _sites_for(roster: Any, part: Part, form: Form, ranks: Mapping[str, int]) -> tuple[list[Site], dict[str, list[str]]]:
    """The sites a file names, in model order; each must exist here."""
    sites, ties = choose_sites(roster, part, form)
    known = {s.name: s for s in sites}
    missing = [n for n in ranks if n not in known]
    if missing:
        raise ArtefactError(f"The file adapts {missing[0]!r}, which this model lacks; {nearest(missing[0], known)}")
    return [s for s in sites if s.name in ranks], {k: v for k, v in ties.items() if k in ranks}


@torch.no_grad()
def _copy_in(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    mine = adapter.tensors()
    tensors = {k: t for k, t in tensors.items() if not k.endswith("::replaced")}
    lacking, foreign = sorted(set(mine) - set(tensors)), sorted(set(tensors) - set(mine))
    if lacking or foreign:
        what = f"lacks {lacking[0]!r}" if lacking else f"has {foreign[0]!r}, which nothing here takes"
        adapter.detach()
        raise ArtefactError(f"The file {what} ({len(lacking)} missing, {len(foreign)} superfluous).")
    for key, t in mine.items():
        value = tensors[key]
        if value.shape != t.shape or value.dtype.is_floating_point != t.dtype.is_floating_point:
            adapter.detach()
            raise ArtefactError(f"{key!r} is {tuple(value.shape)} {value.dtype} in the file, but {tuple(t.shape)} {t.dtype} here.")
        t.data.copy_(value)


# --- other libraries' formats -------------------------------------------------------------------------------
def export(adapter: Adapter, path: Path, format: str = "peft", **options: Any) -> Path:
    """Write in another format; the value leaves against the untouched base, residual starts included.

    Raises:
        MergeError: a site's change is neither low-rank nor a whole module's.
    """
    if format == "native":
        return save(adapter, path)
    if format not in FORMATS:
        raise OptionError(f"There is no format {format!r}; {nearest(format, FORMATS)}")
    record, model, known = adapter._record, adapter.model, adapter._roster.known
    state, magnitude = value_of(adapter, format)
    if format == "diffusers" or format == "kohya":
        from rankwise.store.interchange import component_of

        options.setdefault("component", component_of(model))
        if format == "diffusers":
            from rankwise.store.diffusers import export_diffusers

            return export_diffusers(path, state, known, magnitude=magnitude, **options)
        from rankwise.store.kohya import export_kohya

        return export_kohya(path, state, known, magnitude=magnitude, **options)
    if format == "gguf":
        from rankwise.store.gguf import export_gguf

        return export_gguf(path, state, known, getattr(model, "config", None), magnitude=magnitude, **options)
    from rankwise.store.peft import export_peft

    if not state.sites:
        raise MergeError(
            "PEFT's format needs at least one low-rank change beside whole modules; this adapter has none. Save it in the native format."
        )
    config = getattr(model, "config", None)
    options.setdefault("base_model", getattr(config, "_name_or_path", None) or None)
    options.setdefault("modules", [n for n, _ in model.named_modules() if n and not n.startswith("rankwise")])
    options.setdefault("tied", not any(p.part.untie for p in record.parts))
    return export_peft(path, state, known, magnitude=magnitude, **options)


def value_of(adapter: Adapter, format: str = "peft") -> tuple[AdapterState, dict[str, Tensor]]:
    """(state of low-rank changes and whole parameters, DoRA's norms by site) as other libraries hold an adapter."""
    from rankwise.delta import AdapterState
    from rankwise.delta.lowrank import standing

    sites: dict[str, Delta] = {}
    magnitude: dict[str, Tensor] = {}
    full: dict[str, Any] = {}
    for name, delta in adapter._record.deltas.items():
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
    return AdapterState(standing(sites) if not magnitude else sites, full), magnitude


def whole(site: Site, value: Delta) -> Tensor:
    """The parameter of a module saved whole: W + D as stored, in the base's dtype."""
    now = site.param.detach()
    return (now.float() + site.stored(value.dense().detach().float(), torch.zeros_like(now, dtype=torch.float32))).to(now.dtype)


def _load_foreign(model: nn.Module, path: str, name: str | None, activate: bool) -> Adapter:
    """Another library's adapter as a `lora` or `dora` adapter of ours; saved modules and biases become `dense` parts."""
    from rankwise.store.foreign import read_foreign

    check_name("default" if name is None else name)
    had = "rankwise" in model._modules
    roster = roster_of(model, create=True)
    try:
        state, info = read_foreign(path, roster.known, getattr(model, "config", None))
        parts, tensors = as_native(roster.known, state, info, path)
    except BaseException:
        if not had and not roster.records:
            model._modules.pop("rankwise", None)
        raise
    recipe = Recipe(parts=[entry["part"] for entry in parts])
    return rebuild(model, recipe, {"parts": parts, "states": {}}, tensors, "default" if name is None else name, activate)


def as_native(known: Mapping[str, Site], state: Any, info: Any, path: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(parts as a native header has them, tensors by our names) of a PEFT adapter."""
    magnitude: Mapping[str, Tensor] = info["magnitude"]
    parts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    inner = "inner." if magnitude else ""
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for n, d in state.sites.items():
        A, B = (d.A, d.B) if d.core is None else d.factors()
        ranks[n], scales[n] = A.shape[-2], float(d.scale) if d.core is None else 1.0
        tensors |= {f"{n}::{inner}A": A, f"{n}::{inner}B": B}
        if n in magnitude:
            tensors[f"{n}::m"] = magnitude[n]
    if ranks:
        part = {
            "form": "dora" if magnitude else "lora",
            "targets": list(ranks),
            "r": max(ranks.values()),
            "dropout": info["dropout"],
            "untie": bool(info["untied"]),
        }
        parts.append({"part": part, "ranks": ranks, "scales": scales})
    differences = _differences(known, state.full, info["bias"], path)
    if differences:
        parts.append(
            {
                "part": {"form": "dense", "targets": list(differences)},
                "ranks": dict.fromkeys(differences, 1),
                "scales": dict.fromkeys(differences, 1.0),
            }
        )
        tensors |= {f"{n}::D": D for n, D in differences.items()}
    if not parts:
        raise ArtefactError(f"The PEFT adapter in {path} changes nothing.")
    return parts, tensors


def _differences(known: Mapping[str, Site], full: Mapping[str, Tensor], bias: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    by_param = {f"{s.spec.module}.{s.spec.param}".lstrip("."): s for s in known.values() if s.spec.rows is None}
    out: dict[str, Tensor] = {}
    for param, value in full.items():
        if param not in by_param:
            raise ArtefactError(f"The adapter in {path} saves {param!r} whole, which this model lacks; {nearest(param, by_param)}")
        site = by_param[param]
        out[site.name] = site.view(value.float()) - site.read()
    for n, change in bias.items():
        site = by_param.get(f"{known[n].spec.module}.bias".lstrip("."))  # type: ignore[assignment]
        if site is None:
            raise ArtefactError(f"The adapter in {path} changes the bias of {n!r}, which has none here.")
        out[site.name] = change.float().reshape(site.spec.shape)
    return out
