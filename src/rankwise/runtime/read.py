"""Adapter files to an attached adapter: the native format, and other libraries' formats as parts of ours."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import ArtefactError, nearest
from rankwise.forms.foreign import foreign_form
from rankwise.recipe import Part, Recipe, build
from rankwise.runtime.build import choose_sites, make_deltas
from rankwise.runtime.install import install, uninstall
from rankwise.runtime.record import AdapterRecord, InstalledPart
from rankwise.runtime.registry import registry_of
from rankwise.runtime.tensors import base_tensors, reference_tensors
from rankwise.store.coded import KIND, decode_file
from rankwise.store.fingerprint import compare, fingerprint
from rankwise.store.foreign import read_foreign
from rankwise.store.names import check_name
from rankwise.store.native import load_native

if TYPE_CHECKING:
    from rankwise.forms.base import Form
    from rankwise.sites.site import Site


def load_native_file(
    model: nn.Module, path: Path, name: str | None, *, check_base: bool = True, reference: str | Path | None = None
) -> AdapterRecord:
    """Attach the adapter of a native file.

    Args:
        model: the base.
        path: the adapter's folder, or its file.
        name: what to call it here; None: its own name.
        check_base: refuse a base that differs in its weights, not only one that differs in shape.
        reference: of a file that is a difference, the other adapter: a folder, or the name of an attached one.
    """
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
    recipe = Recipe.from_json(head["recipe"])
    return rebuild(model, recipe, head, tensors, head["name"] if name is None else name)


def rebuild(model: nn.Module, recipe: Recipe, head: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str) -> AdapterRecord:
    """Attach from a description and its tensors: no init is run again, no number is drawn that the file does not replace.

    Args:
        model: the base.
        recipe: of the whole adapter.
        head: ``parts`` and ``states`` as a native header has them.
        tensors: by our names, exactly those that the parts have.
        name: what to call the adapter here.
    """
    check_name(name)
    had = "rankwise" in model._modules
    registry = registry_of(model, create=True)
    try:
        if name in registry.records:
            raise ArtefactError(f"An adapter called {name!r} is already attached; give this one another name.")
        installed, deltas, tied_sites = [], {}, {}
        for entry in head["parts"]:
            part = Part(**entry["part"])
            form: Form = build("form", part.form)
            sites, ties = _sites_for(registry, part, form, entry["ranks"])
            made, plan = make_deltas(form, part, sites, entry["ranks"], entry["scales"], recipe.seed, model, restoring=True)
            deltas.update(made)
            tied_sites.update(ties)
            installed.append(InstalledPart(part, form, plan, {n: d.site for n, d in made.items()}))
        for site, state in head["states"].items():
            deltas[site].restore_state(state, tensors, site)
        record = install(registry, name, recipe, installed, deltas, tied_sites)
    except BaseException:
        if not had and not registry.records:
            model._modules.pop("rankwise", None)
        raise
    try:
        copy_in(record, tensors)
    except ArtefactError:
        uninstall(registry, name)
        raise
    return record


def _sites_for(registry: Any, part: Part, form: Form, ranks: Mapping[str, int]) -> tuple[list[Site], dict[str, list[str]]]:
    """The sites a file names, in model order; each must exist here."""
    sites, ties = choose_sites(registry, part, form)
    known = {s.name: s for s in sites}
    missing = [n for n in ranks if n not in known]
    if missing:
        raise ArtefactError(f"The file adapts {missing[0]!r}, which this model lacks; {nearest(missing[0], known)}")
    return [s for s in sites if s.name in ranks], {k: v for k, v in ties.items() if k in ranks}


@torch.no_grad()
def copy_in(record: AdapterRecord, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into the adapter's own; every name, shape and kind of number must be the same on both sides."""
    mine = record.tensors()
    tensors = {k: t for k, t in tensors.items() if not k.endswith("::replaced")}
    lacking, foreign = sorted(set(mine) - set(tensors)), sorted(set(tensors) - set(mine))
    if lacking or foreign:
        what = f"lacks {lacking[0]!r}" if lacking else f"has {foreign[0]!r}, which nothing here takes"
        raise ArtefactError(f"The file {what} ({len(lacking)} missing, {len(foreign)} superfluous).")
    for key, t in mine.items():
        value = tensors[key]
        if value.shape != t.shape or value.dtype.is_floating_point != t.dtype.is_floating_point:
            raise ArtefactError(f"{key!r} is {tuple(value.shape)} {value.dtype} in the file, but {tuple(t.shape)} {t.dtype} here.")
        t.data.copy_(value)


def load_foreign_file(model: nn.Module, path: str, name: str | None) -> AdapterRecord:
    """Another library's adapter in the forms that take its factors; saved modules and biases become parts of their difference."""
    check_name("default" if name is None else name)
    had = "rankwise" in model._modules
    registry = registry_of(model, create=True)
    try:
        state, info = read_foreign(path, registry.known, getattr(model, "config", None))
        parts, tensors = as_native(registry.known, state, info, path)
    except BaseException:
        if not had and not registry.records:
            model._modules.pop("rankwise", None)
        raise
    recipe = Recipe(parts=[entry["part"] for entry in parts])
    return rebuild(model, recipe, {"parts": parts, "states": {}}, tensors, "default" if name is None else name)


def as_native(known: Mapping[str, Site], state: Any, info: Any, path: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """(parts as a native header has them, tensors by our names) of another library's adapter.

    Args:
        known: every site of the base, by name.
        state: low-rank changes by site, and whole parameters.
        info: what the reader found beside them: ``magnitude``, ``bias``, ``dropout``, ``untied``.
        path: for messages.
    """
    magnitude: Mapping[str, Tensor] = info["magnitude"]
    parts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    form = foreign_form("A", "B", *(("magnitude",) if magnitude else ()))
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for n, d in state.sites.items():
        A, B = (d.A, d.B) if d.core is None else d.factors()
        ranks[n], scales[n] = A.shape[-2], float(d.scale) if d.core is None else 1.0
        tensors |= form.at(n, {"A": A, "B": B, **({"magnitude": magnitude[n]} if n in magnitude else {})})
    if ranks:
        part = {
            "form": form.name,
            "targets": list(ranks),
            "r": max(ranks.values()),
            "dropout": info["dropout"],
            "separate_tied": bool(info["untied"]),
        }
        parts.append({"part": part, "ranks": ranks, "scales": scales})
    differences = _differences(known, state.full, info["bias"], path)
    if differences:
        form = foreign_form("difference")
        ones = {"ranks": dict.fromkeys(differences, 1), "scales": dict.fromkeys(differences, 1.0)}
        parts.append({"part": {"form": form.name, "targets": list(differences)}, **ones})
        for n, D in differences.items():
            tensors |= form.at(n, {"difference": D})
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
