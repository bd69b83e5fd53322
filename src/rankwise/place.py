"""One adapted forward pass: the class an adapted module is swapped to, and what it computes.

A *called* module adds its adapters' changes to its own output.  A *read* module's weight becomes a property
that returns W + ΔW.  A *block* hands its call to the forms that wrap it.  Outside every view each is the
plain class's forward, to the bit.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.errors import ViewError
from rankwise.forms.base import SiteDelta
from rankwise.forms.bottleneck import BlockDelta
from rankwise.forms.fast import Fast, fast_forward
from rankwise.sites.site import Site
from rankwise.view import HERE, View, current

if TYPE_CHECKING:
    from rankwise.roster import Roster


class Tap:
    """One adapter at one site of a module; ``transposed`` at the far end of a tie."""

    __slots__ = ("acted", "form", "name", "site", "transposed")

    def __init__(self, name: str, site: Site, form: SiteDelta, transposed: bool = False):
        self.name = name
        self.site = site
        self.form = form
        self.transposed = transposed
        self.acted = form.in_place

    def change(self, x: Tensor, y: Tensor, strength: Tensor) -> Tensor:
        """Δy in this site's rows of the module's output."""
        if self.transposed:
            return self.form.dropped(self.form.effective().transposed().scaled(strength), self.site, x, y)
        return self.form(x, y, strength)


class Place:
    """What an adapted module knows: its taps by adapter name, and original tensors to act where an owner does not.

    A plain object, not a module, so the model's own tree and state dict stay as they were.
    """

    def __init__(self, roster: Roster, base: type[nn.Module]):
        self.roster = roster
        self.base = base
        self.taps: dict[str, list[Tap]] = {}
        self.originals: dict[str, dict[str, nn.Parameter]] = {}  # adapter → parameter name → the base's own tensor
        self.fast = Fast(base)

    def acting(self) -> tuple[View, list[tuple[Tap, Tensor]]]:
        """The view in force, and the taps that act in it."""
        view = current(self.roster)
        found = [(tap, s) for name, s in view.strengths.items() for tap in self.taps.get(name, ()) if not tap.form.in_place]
        return view, found

    @contextlib.contextmanager
    def base_tensors(self, module: nn.Module, view: View) -> Iterator[None]:
        """Put the base's own tensors in place while an adapter that moved them is out of the view."""
        away = [o for name, o in self.originals.items() if name not in view.strengths]
        swapped = {p: t for o in away for p, t in o.items()}
        moved = {p: module._parameters[p] for p in swapped}
        module._parameters.update(swapped)
        try:
            yield
        finally:
            module._parameters.update(moved)

    def must_restore(self, view: View) -> bool:
        return bool(self.originals) and any(name not in view.strengths for name in self.originals)


class Called:
    """Mixin of a module that is linear in its weight and is called: y = base(x) + Σ strength · Δ(x)."""

    _rankwise: Place

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        place = self._rankwise
        view, acting = place.acting()
        acting = [(t, s) for t, s in acting if t.site.spec.mode == "called"]  # a bias of this module is read, below
        if place.must_restore(view):
            with place.base_tensors(self, view):  # type: ignore[arg-type]
                return add_changes(super().forward(x, *args, **kwargs), x, view, acting)  # type: ignore[misc]
        if not acting:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not args and not kwargs:
            y = fast_forward(self, place, x, view, acting)
            if y is not None:
                return y
        return add_changes(gathered(super().forward, x, args, kwargs), x, view, acting)  # type: ignore[misc]


def gathered(base: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
    """base(x); where a block expanded its rows to get x, the product is made once a row and gathered."""
    for context in (HERE.decisions or {}).values():
        if context.x is x and not args and not kwargs:
            return base(context.h)[context.rows]
    return base(x, *args, **kwargs)


def add_changes(y: Tensor, x: Tensor, view: View, acting: list[tuple[Tap, Tensor]]) -> Tensor:
    """The naive reference of the executor: the base's output plus each change, each from the base's own x and y.

    Where every row is under one adapter, each adapter sees its rows alone: no row's NaN reaches another's gradient.
    """
    if view.runs is not None and all(tap.form.row_wise and not tap.site.spec.routed for tap, _ in acting):
        spans = view.spans(y.shape[0], y.dim())
        if spans is not None:
            return torch.cat([_summed(y[a:b], x[a:b], [t for t in acting if t[0].name == name]) for name, a, b in spans])
    return _summed(y, x, acting, view)


def _summed(y: Tensor, x: Tensor, acting: list[tuple[Tap, Tensor]], view: View | None = None) -> Tensor:
    total = y
    for tap, strength in acting:
        tap.acted = True
        rows = tap.site.spec.row_index()
        mine = y if rows is None else y.index_select(-1, rows.to(y.device))
        change = tap.change(x, mine, strength)
        mask = view.mask(tap.name, change, tap.site.spec.routed) if view is not None else None
        if mask is not None:
            change = change * mask
        total = total + change if rows is None else total.index_add(-1, rows.to(y.device), change)
    return total


class Read:
    """Mixin of a module whose forward (or whose parent's) reads the weight: the parameter becomes W + ΔW."""

    _rankwise: Place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        place = self._rankwise
        view = current(place.roster)
        if place.must_restore(view):
            with place.base_tensors(self, view):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def reading(param: str) -> property:
    """The property that stands in for parameter ``param`` of a read module."""

    def get(module: Any) -> Tensor:
        place: Place = module._rankwise
        W = module._parameters[param]
        view, acting = place.acting()
        acting = [(t, s) for t, s in acting if t.site.spec.param == param]
        if not acting:
            return W
        if view.rows or view.tokens:
            raise ViewError(
                f"A row mask cannot reach {acting[0][0].site.name!r}, whose weight another forward reads for all rows at once."
            )
        for tap, strength in acting:
            tap.acted = True
            W = W + in_storage(tap, strength, W)
        return W

    def put(module: Any, value: Any) -> None:
        nn.Module.__setattr__(module, param, value)

    return property(get, put)


def in_storage(tap: Tap, strength: Tensor, W: Tensor) -> Tensor:
    """A tap's ΔW as the module stores weights (transposed, in its rows), in ``W``'s dtype; differentiable."""
    d = tap.form.effective()
    if tap.transposed:
        d = d.transposed()
    change = d.scaled(strength).dense(tap.site.read() if d.needs_weight else None).to(W.dtype)
    return tap.site.stored(change, torch.zeros_like(W))


def wrapping(tap: Tap) -> BlockDelta:
    """A tap's form where it wraps a block, as every form at a block does."""
    assert isinstance(tap.form, BlockDelta)
    return tap.form


class Block:
    """Mixin of a module that forms wrap as a whole; a form sees the block's own input and output."""

    _rankwise: Place

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base: Callable[..., Any] = super().forward  # type: ignore[misc]
        place = self._rankwise
        view, acting = place.acting()
        if not acting:
            return base(*args, **kwargs)
        changing = [(t, s) for t, s in acting if not wrapping(t).replaces]
        replacing = [(t, s) for t, s in acting if wrapping(t).replaces]
        if len(replacing) > 1:
            raise ViewError(
                f"Adapters {replacing[0][0].name!r} and {replacing[1][0].name!r} both replace this block; let one act at a time."
            )
        for tap, _ in acting:
            tap.acted = True
        if replacing and not changing:
            tap, strength = replacing[0]
            return wrapping(tap).block(base, args, kwargs, None, strength, functools.partial(view.mask, tap.name, routed=False))
        y = wrapping(replacing[0][0]).plain(base, args, kwargs) if replacing else base(*args, **kwargs)
        first, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        total = first
        for tap, strength in acting:
            form = wrapping(tap)
            change = form.block(base, args, kwargs, first, strength, functools.partial(view.mask, tap.name, routed=False))
            if form.replaces:
                total = total + (change[0] if isinstance(change, tuple) else change) - first
                continue
            mask = view.mask(tap.name, change, False)
            total = total + (change if mask is None else change * mask)
        return total if rest is None else (total, *rest)


_MIXINS = {"called": Called, "read": Read, "block": Block, "plain": Read}
_classes: dict[tuple[type[nn.Module], str, tuple[str, ...]], type[nn.Module]] = {}


def adapted_class(base: type[nn.Module], mode: str, reads: tuple[str, ...]) -> type[nn.Module]:
    """The subclass of ``base`` that an adapted module is swapped to; made once for each (base, mode, read parameters)."""
    key = (base, mode, reads)
    if key not in _classes:
        body: dict[str, Any] = {p: reading(p) for p in reads}
        body |= {"__module__": base.__module__, "__doc__": base.__doc__, "__reduce_ex__": _reduce, "_rankwise_key": key}
        _classes[key] = type(base.__name__, (_MIXINS[mode], base), body)
    return _classes[key]


def _reduce(module: Any, protocol: int) -> Any:
    return _revive, module._rankwise_key, module.__dict__


def _revive(base: type[nn.Module], mode: str, reads: tuple[str, ...]) -> Any:
    cls = adapted_class(base, mode, reads)
    return cls.__new__(cls)
