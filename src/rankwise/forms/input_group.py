"""Sites that the very same tensor feeds (q, k and v; gate and up) share one down-projection and one gradient of it.

For the stacked A: R×in of all their pairs, h = x·Aᵀ is one product, and so is dx = dh·A; :class:`InputGroup` keeps h until each
site has taken its share.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rankwise.forms import packed as product
from rankwise.forms.fused import _grad_down, _rows, _stack_down, composite_now, out_dtype


def shared_down(x: Tensor, A: Sequence[Tensor], *, widen: bool = False, dtype: torch.dtype | None = None) -> list[Tensor]:
    """[x·A_iᵀ], each …×r_i, in one product; its backward is one product for dx and one for all dA.

    Args:
        x: …×in.
        A: r_i×in each, any floating dtype.
        widen: compute in fp32 though the dtype is narrower (as in :func:`lora_linear`).
        dtype: of the linear this feeds (default: x's, or autocast's where it is on).
    """
    return _shared_down(x, A, widen, dtype if dtype is not None else out_dtype(x, x), None)


def _shared_down(x: Tensor, A: Sequence[Tensor], widen: bool, out: torch.dtype, entry: weakref.ref[_Entry] | None) -> list[Tensor]:
    if composite_now(x, ()):
        return [nn.functional.linear(x.to(out), a.to(out)) for a in A]
    compute = torch.float32 if widen and out in product.NARROW else out
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t.requires_grad for t in (x, *A)):
            return list(_SharedDown.apply(compute, entry, x, *A))
        return list(_down(compute, x, A))


def _down(compute: torch.dtype, x: Tensor, A: Sequence[Tensor]) -> tuple[Tensor, ...]:
    h = _rows(x, compute) @ _stack_down(A, compute).t()
    return h.reshape(*x.shape[:-1], h.shape[-1]).split([a.shape[0] for a in A], -1)


class _SharedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: torch.dtype, entry: weakref.ref[_Entry] | None, x: Tensor, *A: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.compute, ctx.entry, ctx.lead, ctx.x_dtype = compute, entry, x.shape, x.dtype
        ctx.save_for_backward(x if any(ctx.needs_input_grad[3:]) else None, *A)
        return _down(compute, x, A)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dh: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *A = ctx.saved_tensors
        if ctx.entry is not None and (entry := ctx.entry()) is not None:
            entry.left.clear()  # this graph is spent: a sibling called from now on makes its own h
        used = [i for i, g in enumerate(dh) if g is not None]  # a sibling that was never called has none
        if not used:
            return (None, None, None, *([None] * len(A)))
        need = ctx.needs_input_grad
        with torch.autocast(dh[used[0]].device.type, enabled=False):  # type: ignore[union-attr]
            parts = [_rows(dh[i], ctx.compute) for i in used]  # type: ignore[arg-type]
            all_dh = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
            mine = [A[i] for i in used]
            dx = (all_dh @ _stack_down(mine, ctx.compute)).to(ctx.x_dtype).reshape(ctx.lead) if need[2] else None
            grads: list[Tensor | None] = [None] * len(A)
            for i, g in zip(used, _grad_down(all_dh, x, mine, [need[3 + i] for i in used], ctx.compute)):
                grads[i] = g
        return None, None, dx, *grads


class InputGroup:
    """The sites that one tensor feeds (q, k and v; gate and up): the first one called makes h for all of them.

    The others take theirs when they are called with the very same tensor, unchanged, under the same gradient mode
    and dtype and with the same factors, before a backward has run; else they make their own.  What nobody has taken
    is freed with x.  One cache a thread.  Order, a sibling never called, one called twice, and recomputation change
    the time, and the last bits (a wider product rounds otherwise).  Siblings share one node of the graph: a separate
    backward for each needs ``retain_graph``, as for any value that two losses share.
    """

    def __init__(self) -> None:
        self._local = threading.local()

    def down(
        self,
        x: Tensor,
        own: Sequence[Tensor],
        siblings: Callable[[], Sequence[Sequence[Tensor]]],
        *,
        widen: bool = False,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """x·Aᵀ for each A in ``own``.

        Args:
            own: the A's acting at the calling site.
            siblings: gives the A's acting at every site of the group in this view, the calling one included.
            widen, dtype: as in :func:`shared_down`; the first site's ``widen`` counts.
        """
        out = dtype if dtype is not None else out_dtype(x, x)
        if composite_now(x, ()):
            return _shared_down(x, own, widen, out, None)
        entry = getattr(self._local, "entry", None)
        mode = (torch.is_grad_enabled(), out)
        if entry is None or not entry.fits(x, mode):
            entry = self._local.entry = _Entry(x, mode, [a for site in siblings() for a in site], widen)
        taken = entry.take(own)
        if entry.empty():
            self._local.entry = None
        return taken if taken is not None else _shared_down(x, own, widen, out, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        return InputGroup()

    def __reduce__(self) -> Any:
        return InputGroup, ()


class _Entry:
    """h of one tensor for the sites that have not taken theirs."""

    def __init__(self, x: Tensor, mode: tuple[bool, torch.dtype], A: Sequence[Tensor], widen: bool):
        made = _shared_down(x, A, widen, mode[1], weakref.ref(self))
        left = {id(a): (a, _version(a), h) for a, h in zip(A, made)}
        self.x = weakref.ref(x, lambda _: left.clear())
        self.mode, self.stamp, self.left = mode, _version(x), left

    def fits(self, x: Tensor, mode: tuple[bool, torch.dtype]) -> bool:
        return self.x() is x and self.stamp == _version(x) and self.mode == mode

    def take(self, own: Sequence[Tensor]) -> list[Tensor] | None:
        """The h of each A, which then leaves; None unless all are there and none was changed since."""
        found = [self.left.pop(id(a), None) for a in own]
        if any(f is None or f[0] is not a or f[1] != _version(a) for f, a in zip(found, own)):
            return None
        return [f[2] for f in found if f is not None]

    def empty(self) -> bool:
        return not self.left


def _version(t: Tensor) -> int:
    return -1 if t.is_inference() else t._version
