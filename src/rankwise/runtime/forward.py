"""The forward of an adapted module.  Attaching swaps a module's class for a subclass made here (see :func:`adapted_class`).

There are three ways to adapt a module, one mixin each:

- :class:`OutputHook`: the module is linear in its weight and is called, so Δ(x) is added to its output (as in PEFT's LoRA layers);
- :class:`WeightParametrization`: another forward reads the weight (expert stacks, ``nn.MultiheadAttention``), so the parameter
  becomes a property that returns W + ΔW (as ``torch.nn.utils.parametrize`` does);
- :class:`BlockWrapper`: the adapter wraps a whole block (bottleneck adapters, expert blocks).

Which adapters act in a call is told by the current view (:mod:`rankwise.runtime.view`).  Where none acts, each is the plain
class's forward, to the bit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from rankwise.errors import ViewError
from rankwise.runtime.context import forward_context
from rankwise.runtime.fast import fast_forward
from rankwise.runtime.view import View, current

if TYPE_CHECKING:
    from rankwise.forms.block import BlockDelta
    from rankwise.runtime.module_state import AdaptedModuleState, AdapterBranch


class OutputHook:
    """Mixin of a module that is linear in its weight and is called: y = base(x) + Σ strength · Δ(x)."""

    _rankwise: AdaptedModuleState

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = self._rankwise
        view, acting = state.acting()  # [(branch, its strength)]
        acting = [(t, s) for t, s in acting if t.site.spec.mode == "called"]  # an adapted bias goes by WeightParametrization
        if state.must_restore(view):
            with state.base_tensors(self, view):  # type: ignore[arg-type]
                return add_changes(super().forward(x, *args, **kwargs), x, view, acting)  # type: ignore[misc]
        if not acting:
            return super().forward(x, *args, **kwargs)  # type: ignore[misc]
        if not args and not kwargs and acting[0][0].fusable:  # base and adapters in one autograd function
            y = fast_forward(self, state, x, view, acting)
            if y is not None:
                return y
        return add_changes(gathered(super().forward, x, args, kwargs), x, view, acting)  # type: ignore[misc]


def gathered(base: Callable[..., Any], x: Tensor, args: Any, kwargs: Any) -> Any:
    """base(x).  Inside a mixture-of-experts block x holds each row once for every expert that takes it: the base's product, which is
    the same for all of them, is computed once a row and gathered.

    Args:
        base: the plain forward of the module.
        x: (…, in).
        args: other positional arguments of the call.
        kwargs: its keyword arguments.
    """
    for context in (forward_context.decisions or {}).values():
        if context.x is x and not args and not kwargs:
            return base(context.h)[context.rows]
    return base(x, *args, **kwargs)


def add_changes(y: Tensor, x: Tensor, view: View, acting: list[tuple[AdapterBranch, Tensor]]) -> Tensor:
    """y + Σ strength·Δ(x), each adapter's change computed from the base's own x and y; the naive reference of the fast path.

    Args:
        y: (…, out) the base's output.
        x: (…, in) the module's input.
        view: which adapters act on which rows.
        acting: (branch, strength) of each adapter that acts here.

    Where the view has each row under one adapter (``row_segments``), each adapter sees its rows alone, so no row's NaN reaches
    another's gradient.
    """
    if view.row_segments is not None and all(branch.form.row_wise and not branch.site.spec.routed for branch, _ in acting):
        segments = view.segments_in(y.shape[0], y.dim())
        if segments is not None:
            return torch.cat([_summed(y[a:b], x[a:b], [t for t in acting if t[0].name == name]) for name, a, b in segments])
    return _summed(y, x, acting, view)


def _summed(y: Tensor, x: Tensor, acting: list[tuple[AdapterBranch, Tensor]], view: View | None = None) -> Tensor:
    total = y
    for branch, strength in acting:
        branch.was_called = True
        rows = None if branch.site.spec.rows is None else branch.site.spec.row_index()
        mine = y if rows is None else y.index_select(-1, rows.to(y.device))
        change = branch.change(x, mine, strength)
        mask = view.mask(branch.name, change, branch.site.spec.routed) if view is not None else None
        if mask is not None:
            change = change * mask
        total = total + change if rows is None else total.index_add(-1, rows.to(y.device), change)
    return total


class WeightParametrization:
    """Mixin of a module whose forward (or whose parent's) reads the weight: the parameter becomes W + ΔW."""

    _rankwise: AdaptedModuleState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        state = self._rankwise
        view = current(state.registry)
        if state.must_restore(view):
            with state.base_tensors(self, view):  # type: ignore[arg-type]
                return super().forward(*args, **kwargs)  # type: ignore[misc]
        return super().forward(*args, **kwargs)  # type: ignore[misc]


def reading(param: str) -> property:
    """The property that replaces parameter ``param`` of a module by W + ΔW."""

    def get(module: Any) -> Tensor:
        state: AdaptedModuleState = module._rankwise
        W = module._parameters[param]
        view, acting = state.acting()
        acting = [(t, s) for t, s in acting if t.site.spec.param == param]
        if not acting:
            return W
        if view.rows or view.tokens:
            raise ViewError(
                f"A row mask cannot reach {acting[0][0].site.name!r}, whose weight another forward reads for all rows at once."
            )
        for branch, strength in acting:
            branch.was_called = True
            W = W + in_storage(branch, strength, W)
        return W

    def put(module: Any, value: Any) -> None:
        nn.Module.__setattr__(module, param, value)

    return property(get, put)


def in_storage(branch: AdapterBranch, strength: Tensor, W: Tensor) -> Tensor:
    """A branch's ΔW as the module stores weights (transposed, in its rows), in ``W``'s dtype; differentiable."""
    d = branch.form.total_delta()
    if branch.transposed:
        d = d.transposed()
    change = d.scaled(strength).dense(branch.site.read() if d.needs_weight else None).to(W.dtype)
    return branch.site.stored(change, torch.zeros_like(W))


def wrapping(branch: AdapterBranch) -> BlockDelta:
    """The branch's layer, which at a block is one of block scope."""
    return cast("BlockDelta", branch.form)


class BlockWrapper:
    """Mixin of a module that adapters wrap as a whole; each sees the block's own input and output.

    An adapter adds to the block's output, or ``replaces`` the block (an expert block); at most one of those can act at a time.
    """

    _rankwise: AdaptedModuleState

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        base: Callable[..., Any] = super().forward  # type: ignore[misc]
        state = self._rankwise
        view, acting = state.acting()
        if not acting:
            return base(*args, **kwargs)
        changing = [(t, s) for t, s in acting if not wrapping(t).replaces]
        replacing = [(t, s) for t, s in acting if wrapping(t).replaces]
        if len(replacing) > 1:
            raise ViewError(
                f"Adapters {replacing[0][0].name!r} and {replacing[1][0].name!r} both replace this block; let one act at a time."
            )
        for branch, _ in acting:
            branch.was_called = True
        if replacing and not changing:
            branch, strength = replacing[0]
            return wrapping(branch).block(
                base, args, kwargs, None, strength, functools.partial(view.mask, branch.name, routed=False)
            )
        y = wrapping(replacing[0][0]).plain(base, args, kwargs) if replacing else base(*args, **kwargs)
        first, rest = (y[0], y[1:]) if isinstance(y, tuple) else (y, None)
        total = first
        for branch, strength in acting:
            form = wrapping(branch)
            change = form.block(base, args, kwargs, first, strength, functools.partial(view.mask, branch.name, routed=False))
            if form.replaces:
                total = total + (change[0] if isinstance(change, tuple) else change) - first
                continue
            mask = view.mask(branch.name, change, False)
            total = total + (change if mask is None else change * mask)
        return total if rest is None else (total, *rest)


_MIXINS = {"called": OutputHook, "read": WeightParametrization, "block": BlockWrapper, "plain": WeightParametrization}
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
