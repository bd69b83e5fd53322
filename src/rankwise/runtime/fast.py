"""The fused executor of a called linear: base and adapters in one autograd function, where nothing forbids it.

It stands beside :func:`rankwise.runtime.forward.add_changes`, which is its reference; it returns None where it does not apply:
another layer than a plain ``nn.Linear``, a form that is no plain pair, dropout, masks, routers.  Rows under different adapters,
one a row, go to :mod:`rankwise.forms.grouped`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.forms.fused import Factor, fusable, lora_linear, reference_linear
from rankwise.forms.grouped import grouped_linear
from rankwise.forms.packed import PackedWeight, ProductChoice, choose
from rankwise.runtime.context import forward_context

if TYPE_CHECKING:
    from rankwise.runtime.module_state import AdaptedModuleState, AdapterBranch, FastPath
    from rankwise.runtime.view import View


def fast_forward(
    module: Any, state: AdaptedModuleState, x: Tensor, view: View, acting: list[tuple[AdapterBranch, Tensor]]
) -> Tensor | None:
    """y of the whole module, or None for the reference path.

    Args:
        module: the adapted linear.
        state: what it holds.
        x: (…, in).
        view: the current one.
        acting: (branch, strength) of each adapter that acts here.
    """
    fast = state.fast
    masked = bool(view.rows or view.tokens)
    if not fast.plain or (masked and view.row_segments is None) or forward_context.decisions is not None:
        return None
    weight = module._parameters["weight"]
    if not fusable(x, weight):
        return None
    if masked:
        return _grouped(module, fast, x, view, acting)
    factors = _factors(view, acting)
    if factors is None:
        return None
    packed, widen = _how(fast, x, weight)
    if packed is None and not widen and small(x, weight):
        return reference_linear(x, weight, module.bias, factors)
    h = None
    if fast.group is not None and len(fast.members) > 1:
        own = [A for A, _, _ in factors]
        h = fast.group.down(x, own, lambda: _siblings(fast.members, view), widen=widen)
    return lora_linear(x, weight, module.bias, factors, packed=packed, widen=widen, h=h)


#: multiplications of the frozen product below which a function of our own costs more than it saves on a processor
SMALL = 1 << 25


def small(x: Tensor, weight: Tensor) -> bool:
    """Whether torch's own operators, whose backward runs without Python, are the faster way for a product of this size."""
    return x.device.type == "cpu" and x.numel() * weight.shape[0] < SMALL and x.requires_grad and torch.is_grad_enabled()


def _how(fast: FastPath, x: Tensor, weight: Tensor) -> tuple[PackedWeight | None, bool]:
    """(the packed weight or None, whether to widen) for a product of x's rows."""
    if torch.compiler.is_compiling() or torch.are_deterministic_algorithms_enabled():
        return None, False
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else weight.dtype
    return fast.product.how(weight, dtype, x.numel() // max(x.shape[-1], 1), torch.is_grad_enabled() and x.requires_grad)


def _grouped(module: Any, fast: FastPath, x: Tensor, view: View, acting: list[tuple[AdapterBranch, Tensor]]) -> Tensor | None:
    """y where each row is under one adapter of the view, or None for the reference path."""
    segments = view.segments_in(x.shape[0], x.dim()) if x.dim() > 1 and x.numel() else None
    if segments is None:
        return None
    found: dict[str, list[Factor]] = {}
    for branch, strength in acting:
        factors = _factors(view, [(branch, strength)])
        if factors is None:
            return None
        found.setdefault(branch.name, []).extend(factors)
    tokens = x.numel() // (x.shape[-1] * x.shape[0])
    groups = [(a * tokens, b * tokens, f) for name, a, b in segments if name is not None for f in found.get(name, ())]
    packed, widen = _how(fast, x, module._parameters["weight"])
    return grouped_linear(x, module._parameters["weight"], module.bias, groups, packed=packed, widen=widen)


def foreseen(form: Any, rows: int) -> ProductChoice | None:
    """How the frozen product at an attached layer's module would run in a training step of ``rows`` rows, or None off the fast path."""
    site = form.site
    state = site.module.__dict__.get("_rankwise")
    if (
        form.fused_factors() is None
        or state is None
        or not state.fast.plain
        or site.spec.rows is not None
        or site.spec.kind != "linear"
    ):
        return None
    weight = site.module._parameters["weight"]
    return choose(weight, weight.dtype, rows)


def forget(model: nn.Module) -> None:
    """Let every adapted module of ``model`` choose again how its product runs."""
    for module in model.modules():
        state = module.__dict__.get("_rankwise")
        if state is not None:
            state.fast.product.choices.clear()


def _factors(view: View, acting: list[tuple[AdapterBranch, Tensor]]) -> list[Factor] | None:
    """(A, B, scale·strength) of every acting pair, or None if one of them is not a plain pair at the whole weight."""
    out: list[Factor] = []
    for branch, strength in acting:
        form = branch.form
        factors = (
            None
            if branch.transposed or branch.site.spec.rows is not None or (form.dropout and form.training)
            else form.fused_factors()
        )
        if factors is None:
            return None
        branch.was_called = True
        c = view.number(branch.name, strength)
        out += [(A, B, s * c) for A, B, s in factors]
    return out


def _siblings(members: list[AdaptedModuleState], view: View) -> list[list[Tensor]]:
    """The A's that act at each module of an input group in this view."""
    out: list[list[Tensor]] = []
    for state in members:
        acting = [(t, s) for n, s in view.strengths.items() for t in state.branches.get(n, ())]
        factors = [None if t.transposed or (t.form.dropout and t.form.training) else t.form.fused_factors() for t, _ in acting]
        out.append([] if None in factors else [A for f in factors if f is not None for A, _, _ in f])
    return out
