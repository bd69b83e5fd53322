"""LoRA on a linear layer as one autograd function: base product, down- and up-projections, and their gradients.

For x: N×in, W: out×in, and k pairs A_i: r_i×in, B_i: out×r_i with scales s_i, stacked to A: R×in and
U = [s_i·B_iᵀ]: R×out,

    y  = x·Wᵀ + b + h·U            h  = x·Aᵀ           (N×R, the only activation kept beside x)
    dx = dy·W + dh·A               dh = dy·Uᵀ
    dA = dhᵀ·x                     dB_i = s_i·(hᵀ·dy)_iᵀ

The order of the small products matters: on a CPU ``(hᵀ·dy)ᵀ`` with hᵀ contiguous takes a fraction of ``dyᵀ·h``,
and an R×out U half the time of B's transposed view.  Sites fed by the very same tensor (q, k and v; gate and up)
share one down-projection and one gradient of it: :class:`InputGroup`.

Everything here is plain functions of tensors: nothing is read from a module.  The composite path (the same
maths in torch's own operators) serves ``torch.compile``, ``torch.func``, forward-mode derivatives and a trained
strength; second derivatives need it too (:func:`composite`), as the fused function is differentiable once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable

from rankwise.forms import packed as product

if TYPE_CHECKING:
    from rankwise.forms.packed import PackedWeight

Factor = tuple[Tensor, Tensor, "float | Tensor"]  # A: r×in, B: out×r, scale (a number or a 0-d tensor)


class _Local(threading.local):
    composite: bool = False


_LOCAL = _Local()


@contextlib.contextmanager
def composite() -> Iterator[None]:
    """Within it :func:`lora_linear` runs in torch's own operators, so second derivatives work (slower, saves more)."""
    before, _LOCAL.composite = _LOCAL.composite, True
    try:
        yield
    finally:
        _LOCAL.composite = before


def fusable(x: Tensor, weight: Tensor) -> bool:
    """True where :func:`lora_linear` may stand in for a linear's forward: plain floating tensors, one device, frozen 2-D W."""
    return (
        type(weight) in (Tensor, nn.Parameter)
        and weight.dim() == 2
        and weight.dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
        and not weight.requires_grad
        and isinstance(x, Tensor)
        and x.is_floating_point()
        and x.dim() >= 1
        and x.device == weight.device
        and x.shape[-1] == weight.shape[1]
        and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type))
    )


def out_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """What ``F.linear`` would give: autocast's dtype where it is on (fp64 is left alone), else the weight's."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def composite_now(x: Tensor, factors: Sequence[Factor]) -> bool:
    return (
        _LOCAL.composite
        or torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._functorch.maybe_current_level() is not None
        or forward_ad._current_level >= 0
        or any(isinstance(s, Tensor) and s.requires_grad for _, _, s in factors)
    )


@dataclasses.dataclass(frozen=True, slots=True)
class _Call:
    """What one call needs beside its differentiable tensors."""

    scales: tuple[float | Tensor, ...]
    out: torch.dtype  # of y
    compute: torch.dtype  # of every product
    packed: PackedWeight | None


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Sequence[Factor],
    *,
    packed: PackedWeight | None = None,
    widen: bool = False,
    h: Sequence[Tensor] | None = None,
) -> Tensor:
    """x·Wᵀ + b + Σ s·(x·Aᵀ)·Bᵀ, with gradients of x, b, and every A and B.

    Args:
        x: …×in, any leading axes, contiguous or not, also with no rows.
        weight: out×in, frozen.
        bias: out, or None.
        factors: (A: r×in, B: out×r, scale) of each adapter; any floating dtype (fp32 masters get fp32 gradients).
        packed: the weight packed by oneDNN; passed over where it no longer holds this weight.
        widen: run the products in fp32 and round the result, where the probe found the narrow dtype slow.
        h: x·Aᵀ of each factor (…×r, without scale), already made by :func:`shared_down` or from a dropped-out x.

    Returns:
        …×out in the dtype that ``F.linear`` gives here (autocast included).
    """
    out = out_dtype(x, weight)
    if composite_now(x, factors):
        return _reference(x, weight, bias, factors, h, out)
    compute = torch.float32 if widen and out in product.NARROW else out
    call = _Call(tuple(s for _, _, s in factors), out, compute, packed)
    ups = tuple(B for _, B, _ in factors)
    downs = tuple(h) if h is not None else tuple(A for A, _, _ in factors)
    with torch.autocast(x.device.type, enabled=False):
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, bias, *downs, *ups)):
            return _LoraLinear.apply(call, h is not None, x, weight, bias, *downs, *ups)
        return _forward(call, h is not None, x, weight, bias, downs, ups)[0]


def reference_linear(x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factor]) -> Tensor:
    """:func:`lora_linear` in torch's own operators: its naive reference, and the faster way for small products.

    Args:
        x: …×in.
        weight: out×in, frozen.
        bias: (out,) or None.
        factors: (A: r×in, B: out×r, scale) of each pair.
    """
    return _reference(x, weight, bias, factors, None, out_dtype(x, weight))


def _reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, factors: Sequence[Factor], h: Sequence[Tensor] | None, out: torch.dtype
) -> Tensor:
    """The same value in torch's own operators."""
    y = nn.functional.linear(x, weight, bias)
    xo = x.to(out)
    for i, (A, B, s) in enumerate(factors):
        hi = nn.functional.linear(xo, A.to(out)) if h is None else h[i].to(out)
        y = y + nn.functional.linear(hi * s, B.to(out))
    return y


def _rows(t: Tensor, dtype: torch.dtype) -> Tensor:
    return t.reshape(-1, t.shape[-1]).to(dtype)


def _stack_down(A: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """[A_i]: R×in."""
    return A[0].to(dtype) if len(A) == 1 else torch.cat([a.to(dtype) for a in A])


def _stack_up(call: _Call, B: Sequence[Tensor]) -> Tensor:
    """U = [s_i·B_iᵀ]: R×out, contiguous; the scale is put in at the masters' precision."""
    U = [(b * s).t() for b, s in zip(B, call.scales)]
    return (U[0] if len(U) == 1 else torch.cat(U)).to(call.compute).contiguous()


def _forward(
    call: _Call, given: bool, x: Tensor, weight: Tensor, bias: Tensor | None, downs: Sequence[Tensor], ups: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """y (…×out) and h (N×R)."""
    x2 = _rows(x, call.compute)
    y = product.linear(x2, weight, bias, call.compute, call.packed)
    if given:
        h = _rows(downs[0] if len(downs) == 1 else torch.cat(tuple(downs), -1), call.compute)
    else:
        h = x2 @ _stack_down(downs, call.compute).t()
    y.addmm_(h, _stack_up(call, ups))
    return y.to(call.out).reshape(*x.shape[:-1], weight.shape[0]), h


class _LoraLinear(torch.autograd.Function):
    """See the module's docstring; ``downs`` are the A's, or the h's where ``given``."""

    @staticmethod
    def forward(ctx: Any, call: _Call, given: bool, x: Tensor, weight: Tensor, bias: Tensor | None, *factors: Tensor) -> Tensor:
        k = len(call.scales)
        downs, ups = factors[:k], factors[k:]
        y, h = _forward(call, given, x, weight, bias, downs, ups)
        need = ctx.needs_input_grad
        keeps_x = not given and any(need[5 : 5 + k])
        keeps_h = any(need[5 + k :])
        ctx.call, ctx.given, ctx.lead, ctx.x_dtype = call, given, x.shape, x.dtype
        ctx.h_like = [(t.shape, t.dtype) for t in downs] if given else []
        ctx.save_for_backward(weight, x if keeps_x else None, h if keeps_h else None, *ups, *(() if given else downs))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        call, k = ctx.call, len(ctx.call.scales)
        weight, x, h, *factors = ctx.saved_tensors
        ups, downs = factors[:k], factors[k:]
        need = ctx.needs_input_grad
        with torch.autocast(dy.device.type, enabled=False):
            narrow = _rows(dy, dy.dtype)
            dy2 = narrow.to(call.compute)
            U = _stack_up(call, ups)
            dh = dy2 @ U.t() if need[2] or any(need[5 : 5 + k]) else None
            dx = None
            if need[2] and dh is not None:
                dx = product.dx(dy2, weight, call.compute, call.packed)
                if not ctx.given:
                    dx.addmm_(dh, _stack_down(downs, call.compute))
                dx = dx.to(ctx.x_dtype).reshape(ctx.lead)
            if ctx.given:
                ddowns = _split_h(dh, ctx.h_like, need[5 : 5 + k])
            else:
                ddowns = _grad_down(dh, x, downs, need[5 : 5 + k], call.compute)
            dups = _grad_up(call, h, dy2, ups, need[5 + k :])
            dbias = narrow.sum(0) if need[4] else None
        return None, None, dx, None, dbias, *ddowns, *dups


def _split_h(dh: Tensor | None, like: Sequence[tuple[torch.Size, torch.dtype]], need: Sequence[bool]) -> list[Tensor | None]:
    """dh as the h's that were given."""
    if dh is None:
        return [None] * len(like)
    parts = dh.split([shape[-1] for shape, _ in like], -1)
    return [p.to(dtype).reshape(shape) if n else None for p, (shape, dtype), n in zip(parts, like, need)]


def _grad_down(
    dh: Tensor | None, x: Tensor | None, A: Sequence[Tensor], need: Sequence[bool], compute: torch.dtype
) -> list[Tensor | None]:
    """dA_i = dh_iᵀ·x in A_i's dtype, in one product."""
    if not any(need) or dh is None or x is None:
        return [None] * len(A)
    dA = dh.t().contiguous() @ _rows(x, compute)
    return [g.to(a.dtype) if n else None for g, a, n in zip(dA.split([a.shape[0] for a in A]), A, need)]


def _grad_up(call: _Call, h: Tensor | None, dy: Tensor, B: Sequence[Tensor], need: Sequence[bool]) -> list[Tensor | None]:
    """dB_i = s_i·(h_iᵀ·dy)ᵀ in B_i's dtype, in one product."""
    if h is None:
        return [None] * len(B)
    parts = (h.t().contiguous() @ dy).split([b.shape[1] for b in B])
    return [(g.to(b.dtype) * s).t() if n else None for g, b, s, n in zip(parts, B, call.scales, need)]
