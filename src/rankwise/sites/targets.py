"""``target_modules`` to sites: ``all-linear``, names, roles, patterns; every word must match something."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from rankwise.errors import TargetError, nearest

if TYPE_CHECKING:
    from rankwise.sites.site import Site

Targets = str | Iterable[str]
#: roles that "all-linear" leaves out: changing them is a decision, not a default
_NOT_ALL = {"head", "router", "embed", "position"}


def resolve(
    sites: Mapping[str, Site],
    targets: Targets,
    *,
    exclude: Iterable[str] = (),
    layers: Collection[int] | None = None,
    kinds: Collection[str] = ("linear", "conv", "embedding", "experts"),
    part: str = "",
) -> list[Site]:
    """The sites that ``targets`` name, in model order.

    A target is ``"all-linear"`` (linears and expert stacks, not the head, routers or embeddings), the end of a module path
    (``q_proj``, ``mlp.down_proj``), a role (``q``, ``gate``), a full site name, a shell pattern
    (``model.layers.[0-3].*``), or, given as one string, a regular expression for the full path, as PEFT has it.  Forms on any
    parameter (``kinds`` has "plain") also take ``"all"`` and the name of a module for every parameter in it.

    Args:
        sites: of the model, by name.
        targets: PEFT's ``target_modules``: one word, pattern or regular expression, or a list of words.
        exclude: words to leave out again, PEFT's ``exclude_modules``.
        layers: indices of transformer layers to keep, PEFT's ``layers_to_transform``; None: all.
        kinds: the kinds of site that the form can adapt.
        part: who asks, for the message.

    Raises:
        TargetError: a word matches nothing (with the nearest names), nothing is left after ``exclude`` and
            ``layers``, a site is of a kind outside ``kinds``, or a weight and a part of it are both named.
    """
    words = [targets] if isinstance(targets, str) else list(targets)
    if not words:
        raise TargetError("targets is empty; name modules, roles or 'all-linear'.")
    chosen: dict[str, Site] = {}
    for word in words:
        hits = _match(sites, word, single=isinstance(targets, str), plain="plain" in kinds)
        if not hits:
            raise TargetError(f"The target {word!r} matches no module in this model; {nearest(word, _names(sites))}")
        chosen.update((s.name, s) for s in _usable(hits, word, kinds, part))
    for word in exclude:
        hits = _match(sites, word, single=False, plain="plain" in kinds)
        if not hits:
            raise TargetError(f"The exclusion {word!r} matches no module in this model; {nearest(word, _names(sites))}")
        for s in hits:
            chosen.pop(s.name, None)
    if layers is not None:
        wanted = set(layers)
        missing = wanted - {s.spec.layer for s in sites.values()}
        if missing:
            raise TargetError(
                f"layers names block {min(missing)}, but the model's blocks go to {max(s.spec.layer for s in sites.values())}."
            )
        chosen = {n: s for n, s in chosen.items() if s.spec.layer in wanted}
    if not chosen:
        raise TargetError("No module is left after exclude and layers; widen the targets.")
    out = [s for n, s in sites.items() if n in chosen]
    _refuse_overlap(out)
    return out


def _usable(hits: list[Site], word: str, kinds: Collection[str], part: str) -> list[Site]:
    """Those of a target's sites that a form of ``kinds`` can adapt; TargetError if there is none."""
    foreign = next((s for s in hits if s.spec.refusal), None)
    if foreign is not None:
        raise TargetError(f"The target {word!r} matches {foreign.name!r}: {foreign.spec.refusal}")
    usable = [s for s in hits if s.spec.kind in kinds]
    if not usable:
        found = hits[0]
        raise TargetError(
            f"The target {word!r} matches {found.name!r}, of kind {found.spec.kind} ({found.spec.parent}), which "
            f"{part or 'this form'} cannot adapt; it adapts: {', '.join(kinds)}."
        )
    return usable


def _match(sites: Mapping[str, Site], word: str, *, single: bool, plain: bool) -> list[Site]:
    if plain:  # forms on any parameter: a word may be a module, or "all"
        wholes = [s for s in sites.values() if s.spec.rows is None]
        hits = wholes if word == "all" else [s for s in wholes if _inside(s, word)]
        if hits:
            return hits
    if word == "all-linear":
        return [
            s
            for s in sites.values()
            if s.spec.kind in ("linear", "experts") and s.spec.role not in _NOT_ALL and s.spec.rows is None
        ]
    if word in sites:
        return [sites[word]]
    wholes = [s for s in sites.values() if s.spec.rows is None and s.spec.mode != "plain"]
    hits = [s for s in wholes if _ends(s, word)]
    if hits:
        return hits
    hits = [s for s in sites.values() if s.spec.role == word and s.spec.mode != "plain"]
    if hits:
        return hits
    if any(c in word for c in "*?["):
        hits = [s for s in wholes if fnmatch.fnmatchcase(s.name, word)]
        if hits:
            return hits
    if single:
        try:
            pattern = re.compile(word)
        except re.error as error:
            raise TargetError(f"The target {word!r} is neither a name nor a valid pattern: {error}.") from error
        return [s for s in wholes if pattern.fullmatch(s.spec.module) or pattern.fullmatch(s.name)]
    return []


def _inside(site: Site, word: str) -> bool:
    """Whether the site is a parameter of (or below) the module ``word``, or the parameter so called."""
    path = f".{site.spec.module}.{site.spec.param}."
    return f".{word}." in path


def _ends(site: Site, word: str) -> bool:
    return any(n == word or n.endswith(f".{word}") for n in (site.name, site.spec.module) if n) and not (
        site.spec.param != "weight" and site.spec.module.endswith(word) and site.spec.mode == "plain"
    )


def _names(sites: Mapping[str, Site]) -> set[str]:
    live = [s for s in sites.values() if s.spec.mode != "plain"]
    return {s.spec.module.rpartition(".")[2] or s.name for s in live} | {s.spec.role for s in live} | {"all-linear"}


def _refuse_overlap(chosen: list[Site]) -> None:
    whole = {(s.spec.module, s.spec.param): s for s in chosen if s.spec.rows is None}
    for s in chosen:
        if s.spec.rows is not None and (s.spec.module, s.spec.param) in whole:
            raise TargetError(f"The targets name both {s.spec.module!r} and its part {s.name!r}; name one of them.")
