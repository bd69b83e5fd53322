"""A linear whose rows are under different LoRA adapters, as one autograd function: many small jobs on one frozen base.

Rows [a_i, b_i) of x: N×in are adapter i's (A_i: r_i×in, B_i: out×r_i, scale s_i); a row of none is the base's.

    y  = x·Wᵀ + b         y[a_i:b_i]  += s_i·(x[a_i:b_i]·A_iᵀ)·B_iᵀ
    dx = dy·W             dx[a_i:b_i] += s_i·(dy[a_i:b_i]·B_i)·A_i

One product with W serves all rows.  The small products run batched where every adapter has as many rows and the same
rank (half to two thirds of the loop's time on a CPU, two launches instead of 2k on an accelerator), else in a loop:
one product with all A's at once and a mask does k times the arithmetic and was the slowest of the three.

No sum runs over rows of two adapters, so a NaN in one job's rows stays there.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.forms import packed as product
from rankwise.forms.fused import Factor, composite_now, out_dtype

if TYPE_CHECKING:
    from rankwise.forms.packed import PackedWeight

Group = tuple[int, int, Factor]  # first row, row after the last, and the (A, B, scale) of those rows


@dataclasses.dataclass(frozen=True, slots=True)
class _GroupedCall:
    """What one call needs beside its differentiable tensors."""

    spans: tuple[tuple[int, int], ...]
    scales: tuple[float | Tensor, ...]
    out: torch.dtype
    compute: torch.dtype
    packed: PackedWeight | None
    batched: bool

    @property
    def one_scale(self) -> bool:
        return all(s == self.scales[0] for s in self.scales)

    def cut(self, t: Tensor) -> list[Tensor]:
        return [t[a:b] for a, b in self.spans]

    def stacked(self, t: Tensor) -> Tensor:
        """(N, ·) as (k, rows of each, ·); a view."""
        first, rows = self.spans[0][0], self.spans[0][1] - self.spans[0][0]
        return t[first : self.spans[-1][1]].view(len(self.spans), rows, t.shape[-1])


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: Sequence[Group],
    *,
    packed: PackedWeight | None = None,
    widen: bool = False,
) -> Tensor | None:
    """x·Wᵀ + b and each group's own change, with gradients of x, b, and every A and B.

    Args:
        x: …×in; ``groups`` count its rows as if it were N×in.
        weight: out×in, frozen.
        groups: (first, last + 1, (A, B, scale)); rows in none are the base's, rows in two get both changes.
        packed, widen: as in :func:`rankwise.forms.fused.lora_linear`.

    Returns:
        …×out in the dtype that ``F.linear`` gives here; None where only torch's own operators will do (compilation,
        ``torch.func``, second derivatives, a trained strength).
    """
    if composite_now(x, [f for _, _, f in groups]):
        return None
    out = out_dtype(x, weight)
    compute = torch.float32 if widen and out in product.NARROW else out
    spans = tuple((a, b) for a, b, _ in groups)
    downs, ups = tuple(f[0] for *_, f in groups), tuple(f[1] for *_, f in groups)
    call = _GroupedCall(spans, tuple(f[2] for *_, f in groups), out, compute, packed, _alike(spans, downs))
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *downs, *ups)):
            return _GroupedLinear.apply(call, x, weight, bias, *downs, *ups)
        return _forward(call, x, weight, bias, downs, ups)[0]


def _alike(spans: Sequence[tuple[int, int]], downs: Sequence[Tensor]) -> bool:
    """Whether the groups lie one after the other, with as many rows and the same rank each."""
    rows = spans[0][1] - spans[0][0]
    follow = all(b == c for (_, b), (c, _) in itertools.pairwise(spans))
    return follow and rows > 0 and all(b - a == rows for a, b in spans) and all(A.shape == downs[0].shape for A in downs)


def _forward(
    call: _GroupedCall, x: Tensor, weight: Tensor, bias: Tensor | None, downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """y (…×out) and the h = x·Aᵀ of each group, or one stack of them."""
    x2 = x.reshape(-1, x.shape[-1]).to(call.compute)
    y = product.linear(x2, weight, bias, call.compute, call.packed)
    if call.batched:
        h3 = torch.bmm(call.stacked(x2), _stack(downs, call.compute).mT)
        call.stacked(y).baddbmm_(h3, _scaled(call, ups).mT)
        h = [h3]
    else:
        h = []
        for xi, yi, A, B, s in zip(call.cut(x2), call.cut(y), downs, ups, call.scales):
            h.append(xi @ A.to(call.compute).t())
            yi.addmm_(h[-1], (B * s).to(call.compute).t())
    return y.to(call.out).reshape(*x.shape[:-1], weight.shape[0]), h


def _stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return torch.stack(tuple(tensors)).to(dtype)


def _scaled(call: _GroupedCall, ups: Sequence[Tensor]) -> Tensor:
    """[s_i·B_i]: k×out×r; the scale is put in at the masters' precision."""
    B = torch.stack(tuple(ups))
    if call.one_scale:
        return B.mul_(call.scales[0]).to(call.compute)
    s = torch.stack([torch.as_tensor(s, dtype=B.dtype, device=B.device) for s in call.scales])
    return B.mul_(s[:, None, None]).to(call.compute)


class _GroupedLinear(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(ctx: Any, call: _GroupedCall, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        k = len(call.spans)
        y, h = _forward(call, x, weight, bias, factors[:k], factors[k:])
        ctx.call, ctx.lead, ctx.x_dtype = call, x.shape, x.dtype
        ctx.save_for_backward(weight, x, *factors, *h)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call, k = ctx.call, len(ctx.call.spans)
        weight, x, *rest = ctx.saved_tensors
        downs, ups, h = rest[:k], rest[k : 2 * k], rest[2 * k :]
        with torch.autocast(dy.device.type, enabled=False):
            narrow = dy.reshape(-1, dy.shape[-1])
            dy2, x2 = narrow.to(call.compute), x.reshape(-1, x.shape[-1]).to(call.compute)
            dx = product.dx(dy2, weight, call.compute, call.packed) if ctx.needs_input_grad[1] else None
            grads = (_batched if call.batched else _looped)(call, dy2, x2, dx, downs, ups, h)
            if dx is not None:
                dx = dx.to(ctx.x_dtype).reshape(ctx.lead)
            dbias = narrow.sum(0) if ctx.needs_input_grad[3] else None
        needed = [g.to(t.dtype) if n else None for g, t, n in zip(grads, (*downs, *ups), ctx.needs_input_grad[4:])]
        return None, dx, None, dbias, *needed


def _batched(
    call: _GroupedCall,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    h: Sequence[Tensor],
) -> list[Tensor]:
    """Every dA_i and dB_i by products over the stack; adds the groups' part to ``dx``."""
    dy3 = call.stacked(dy)
    dh = torch.bmm(dy3, _scaled(call, ups))
    if dx is not None:
        call.stacked(dx).baddbmm_(dh, _stack(downs, call.compute))
    dA = torch.bmm(dh.mT.contiguous(), call.stacked(x))
    dB = torch.bmm(h[0].mT.contiguous(), dy3)
    if not call.one_scale or any(B.dtype != ups[0].dtype for B in ups):
        return [*dA.unbind(), *((g.to(B.dtype) * s).t() for g, B, s in zip(dB.unbind(), ups, call.scales))]
    # scaled and laid out as the parameters are for all at once, not one by one on their way into .grad
    return [*dA.unbind(), *dB.to(ups[0].dtype).mul_(call.scales[0]).mT.contiguous().unbind()]


def _looped(
    call: _GroupedCall,
    dy: Tensor,
    x: Tensor,
    dx: Tensor | None,
    downs: Sequence[Tensor],
    ups: Sequence[Tensor],
    h: Sequence[Tensor],
) -> list[Tensor]:
    """The same, a group at a time."""
    dA, dB = [], []
    for (a, b), A, B, s, hi in zip(call.spans, downs, ups, call.scales, h):
        dyi, U = dy[a:b], (B * s).to(call.compute)
        dh = dyi @ U
        if dx is not None:
            dx[a:b].addmm_(dh, A.to(call.compute))
        dA.append(dh.t().contiguous() @ x[a:b])
        dB.append(((hi.t().contiguous() @ dyi).to(B.dtype) * s).t())
    return [*dA, *dB]
