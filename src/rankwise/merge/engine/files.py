"""Merged values and the model: read an adapter's folder as a value, attach a value as an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from rankwise.adapter import load, rebuild
from rankwise.budgets.lt_sft import sparse
from rankwise.delta.affine import Replace
from rankwise.delta.lowrank import LowRank
from rankwise.delta.state import AdapterState
from rankwise.errors import MergeError, OptionError, nearest
from rankwise.forms.patch import key
from rankwise.merge.engine.base import merge_states
from rankwise.recipe import Part, Recipe
from rankwise.sites.discover import find_sites

if TYPE_CHECKING:
    from rankwise.adapter import Adapter
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site


def read_state(model: nn.Module, folder: str | Path, *, rank: int | None = None, as_is: bool = False) -> AdapterState:
    """A folder's adapter as a value against the untouched base of ``model``, which is left as it was.

    ``rank`` cuts every site to it; without, a change that is not exactly low-rank (DoRA …) is refused.  ``as_is`` keeps each
    change's own kind instead (entries, dense …); of the form ``full`` it takes the entries that moved.

    Args:
        model: the adapter's base.
        folder: the adapter's, or a hub repository.
        rank: of every site; None: as it is.
        as_is: keep each change's kind.
    """
    name = f"__reading {folder}".replace("/", " ").replace("\\", " ")[:120]
    adapter = load(model, folder, name=name, activate=False)
    try:
        return _as_it_is(adapter) if as_is else adapter.lower(rank=rank)
    except OptionError as error:
        raise MergeError(f"{folder}: {error}") from error
    finally:
        adapter.detach()


def _as_it_is(adapter: Adapter) -> AdapterState:
    if all(d.in_place for d in adapter.sites.values()):
        return sparse(adapter)
    found = {n: adapter.delta(n) for n in adapter.sites}
    odd = next((n for n, d in found.items() if d.needs_weight or not d.constant), None)
    if odd is not None:
        raise MergeError(
            f"The change at {odd!r} is a {found[odd].kind} that depends on W or x, so it cannot be added; cut it to a rank."
        )
    return AdapterState(found)


def attach_state(model: nn.Module, state: AdapterState, *, name: str = "merged", activate: bool = True) -> Adapter:
    """Attach a value as an adapter: low-rank changes as an ordinary ``lora`` of uneven ranks, all others as ``patch``.

    A low-rank change is a ``patch`` too where no lora can be (biases, norms).  A sum of so many adapters that its factors are
    wider than the matrix is written in as few as that has rows or columns.  Whole tensors (``state.full``, by parameter
    name) stand in the parameter's place: at strength s it reads (1 − s)·W + s·value.

    Args:
        model: the base.
        state: the value.
        name: of the adapter here.
        activate: let it act by default.

    Raises:
        MergeError: the state changes nothing.
        ArtefactError, OptionError: a place this model lacks; a shape that is not the weight's; a change that x decides.
    """
    known: Mapping[str, Site] = getattr(model._modules.get("rankwise"), "known", None) or find_sites(model)  # type: ignore[assignment]
    pairs = {n: _narrow(d) for n, d in state.sites.items() if isinstance(d, LowRank) and _called(known.get(n))}
    held = {n: d for n, d in state.sites.items() if n not in pairs} | _whole(known, state)
    if not pairs and not held:
        raise MergeError(
            "The state changes nothing, so there is nothing to attach; give one with a change at a place or a whole tensor."
        )
    parts: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    if pairs:
        ranks = {n: d.r for n, d in pairs.items()}
        part = {"form": "lora", "targets": list(ranks), "r": max(ranks.values())}
        parts.append({"part": part, "ranks": ranks, "scales": dict.fromkeys(ranks, 1.0)})
        for n, d in pairs.items():
            A, B = d.factors()
            tensors |= {f"{n}::A": A, f"{n}::B": B}
    if held:
        part = {"form": "patch", "targets": list(held)}
        parts.append({"part": part, "ranks": dict.fromkeys(held, 1), "scales": dict.fromkeys(held, 1.0)})
        tensors |= {f"{n}::{key(field)}": t for n, v in held.items() for field, t in v.detach().tensors().items()}
    recipe = Recipe(**parts[0]["part"]) if len(parts) == 1 else Recipe(parts=[Part(**p["part"]) for p in parts])
    states = {n: {"kind": v.kind, "meta": v.meta()} for n, v in held.items()}
    return rebuild(model, recipe, {"parts": parts, "states": states}, tensors, name, activate)


def _called(site: Site | None) -> bool:
    """Whether a ``lora`` can be at the site (one this model lacks is refused later, by name)."""
    return site is None or site.spec.mode != "plain"


def _narrow(d: LowRank) -> LowRank:
    widest = min(d.shape[-2:])
    return d.to_lowrank(rank=widest)[0] if d.r > widest else d


def _whole(known: Mapping[str, Site], state: AdapterState) -> dict[str, Delta]:
    """The state's whole tensors as changes at the sites of their parameters."""
    sites = {f"{s.spec.module}.{s.spec.param}".lstrip("."): s for s in known.values() if s.spec.rows is None}
    out: dict[str, Delta] = {}
    for param, value in state.full.items():
        if param not in sites:
            raise MergeError(f"The state holds {param!r} whole, which this model lacks; {nearest(param, sites)}")
        site = sites[param]
        if site.name in state.sites:
            raise MergeError(f"The state both changes {site.name!r} and holds it whole; keep one of the two.")
        if value.shape != site.param.shape:
            raise MergeError(f"The state holds {param!r} as {tuple(value.shape)}; here it is {tuple(site.param.shape)}.")
        out[site.name] = Replace(site.view(value))
    return out


def attach_merged(
    model: nn.Module,
    folders: Sequence[str],
    method: str = "cat",
    weights: Sequence[float] | None = None,
    *,
    name: str = "merged",
    source_rank: int | None = None,
    **options: Any,
) -> Adapter:
    """Read adapter folders (cut to ``source_rank`` where given), merge them, attach the result.

    Args:
        model: the base of all of them.
        folders: of the adapters.
        method: a registered merge, with its ``options``.
        weights: one a folder; default 1/T each.
        name: of the result here.
        source_rank: cut each source to it first; None: sources must be exactly low-rank.
    """
    states = [read_state(model, f, rank=source_rank) for f in folders]
    return attach_state(model, merge_states(states, weights, method, **options), name=name)
