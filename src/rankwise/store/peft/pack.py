"""One module's change ↔ PEFT's tensors: linear, convolution (grouped too), embedding, fused rows, expert stacks.

Rankwise: A is r×in, B out×r (E×… for a stack), Δ = s·B·core·A.  PEFT: a stack is A (E·r × in) with the expert
slowest and B (out × r·E) with the expert fastest; a convolution is A (r, in, k…), B (out, r/groups, 1…); in a fused
projection the parts share one pair whose B is block-structured, of rank exactly the sum of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankwise.errors import ArtefactError

if TYPE_CHECKING:
    from rankwise.sites.spec import SiteSpec


def pair(delta: Any, name: str) -> tuple[Tensor, Tensor, float]:
    """(A, B, scale) of a LowRank delta, its core folded into B; refuses every other kind with advice."""
    if getattr(delta, "kind", "") != "lowrank":
        kind = getattr(delta, "kind", type(delta).__name__)
        raise ArtefactError(
            f"Site {name!r} holds a change of kind {kind!r}, which a PEFT LoRA file cannot hold; lower it first: "
            "adapter.lower() where its rank is known, adapter.lower(rank=…) with a reported error elsewhere."
        )
    A, B, core, scale = delta.A.detach(), delta.B.detach(), getattr(delta, "core", None), delta.scale
    if core is not None:
        core = core.detach()
        B = B.double() * core.double().unsqueeze(-2) if core.dim() == A.dim() - 1 else B.double() @ core.double()
        B = B.to(A.dtype)
    if isinstance(scale, Tensor) and scale.numel() != 1:
        B = (B.double() * scale.detach().double()).to(A.dtype)
        scale = 1.0
    for what, t in (("A", A), ("B", B)):
        if not t.numel() or t.device.type == "meta":
            raise ArtefactError(f"Tensor {what} of site {name!r} is empty: it was not gathered before saving.")
    return A, B, float(scale)


def fuse(parts: Sequence[tuple[SiteSpec, Tensor, Tensor]], whole: SiteSpec) -> tuple[Tensor, Tensor]:
    """One (A, B) for the whole weight from its parts' (scale already in B): A stacked, B in their rows."""
    if len(parts) == 1 and parts[0][0].rows is None:
        return parts[0][1], parts[0][2]
    A = torch.cat([a for _, a, _ in parts], dim=-2)
    lead = A.shape[:-2]
    B = torch.zeros(*lead, whole.out, A.shape[-2], dtype=A.dtype)
    at = 0
    for spec, a, b in parts:
        r, index = a.shape[-2], spec.row_index()
        rows = index if index is not None else torch.arange(whole.out)
        B[..., rows, at : at + r] = b
        at += r
    return A, B


def to_peft(spec: SiteSpec, A: Tensor, B: Tensor) -> tuple[dict[str, Tensor], int]:
    """({key suffix: tensor}, PEFT's rank) for the whole weight of one module."""
    if spec.kind == "embedding":
        return {"lora_embedding_A": A, "lora_embedding_B": B}, A.shape[-2]
    if spec.kind == "experts":
        E, r, inp = A.shape
        return {"lora_A.weight": A.reshape(E * r, inp), "lora_B.weight": B.permute(1, 2, 0).reshape(spec.out, r * E)}, r
    if spec.kind == "conv":
        return _conv_to_peft(spec, A, B)
    return {"lora_A.weight": A, "lora_B.weight": B}, A.shape[-2]


def from_peft(spec: SiteSpec, A: Tensor, B: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    """Inverse of :func:`to_peft`: rankwise's (A, B) of the whole weight, shapes checked against ``spec``.

    Args:
        spec: of the whole weight.
        A: PEFT's lora_A.
        B: PEFT's lora_B.
        rank: what the config says.
        where: what to call the file in messages.
    """
    if spec.kind == "conv":
        return _conv_from_peft(spec, A, B, rank, where)
    E = spec.stack or 1
    expect(A, (E * rank, spec.inp), f"{where}: A", spec)
    expect(B, (spec.out, rank * E), f"{where}: B", spec)
    if spec.kind == "experts":
        return A.reshape(E, rank, spec.inp).contiguous(), B.reshape(spec.out, rank, E).permute(2, 0, 1).contiguous()
    return A, B


def expect(tensor: Tensor, shape: tuple[int, ...], what: str, spec: SiteSpec) -> None:
    """ArtefactError where a tensor does not fit its place.

    Args:
        tensor: what the file has.
        shape: what it must be.
        what: its name in the message.
        spec: of the site.
    """
    if tuple(tensor.shape) != shape:
        raise ArtefactError(
            f"{what} is {'×'.join(map(str, tensor.shape))}; site {spec.name!r} ({'×'.join(map(str, spec.shape))}) with this "
            f"config takes {'×'.join(map(str, shape))}."
        )
    if not tensor.is_floating_point():
        raise ArtefactError(f"{what} is of dtype {tensor.dtype}; factors are floating-point.")


def _conv_to_peft(spec: SiteSpec, A: Tensor, B: Tensor) -> tuple[dict[str, Tensor], int]:
    r, g, nd = A.shape[0], spec.groups, len(spec.kernel)
    per_group = spec.inp // math.prod(spec.kernel)
    wide = A.new_zeros(g, r, g * per_group, *spec.kernel)  # PEFT's A has no groups: each group's rows see only its channels
    for j in range(g):
        wide[j, :, j * per_group : (j + 1) * per_group] = A.reshape(r, per_group, *spec.kernel)
    return {
        "lora_A.weight": wide.reshape(g * r, g * per_group, *spec.kernel),
        "lora_B.weight": B.reshape(spec.out, r, *[1] * nd),
    }, g * r


def _conv_from_peft(spec: SiteSpec, A: Tensor, B: Tensor, rank: int, where: str) -> tuple[Tensor, Tensor]:
    g, nd = spec.groups, len(spec.kernel)
    per_group = spec.inp // math.prod(spec.kernel)
    if rank % g:
        raise ArtefactError(f"{where}: rank {rank} is no multiple of the convolution's {g} groups.")
    r = rank // g
    expect(A, (rank, g * per_group, *spec.kernel), f"{where}: A", spec)
    expect(B, (spec.out, r, *[1] * nd), f"{where}: B", spec)
    if g == 1:
        return A.reshape(rank, -1), B.reshape(spec.out, rank)
    blocks = A.reshape(g, r, g, per_group, -1)
    own = blocks[range(g), :, range(g)]  # g × r × per_group × taps
    if blocks.count_nonzero() != own.count_nonzero():
        raise ArtefactError(f"{where}: this adapter of a grouped convolution mixes its groups; no change of the weight does that.")
    own = own.reshape(g, r, spec.inp)
    B = B.reshape(spec.out, r)
    if bool((own == own[:1]).all()):
        return own[0].contiguous(), B
    wide = B.new_zeros(g, spec.out // g, g, r)
    wide[range(g), :, range(g)] = B.reshape(g, spec.out // g, r)
    return own.reshape(g * r, spec.inp), wide.reshape(spec.out, g * r)


def magnitude_to_peft(spec: SiteSpec, m: Tensor) -> Tensor:
    """PEFT's shape of a DoRA magnitude: (out,), or (1, out, 1…) for a convolution."""
    return m.reshape(1, -1, *[1] * len(spec.kernel)) if spec.kind == "conv" else m.reshape(-1)


def stack_experts(found: Mapping[int, tuple[Tensor, Tensor]], experts: int, where: str) -> tuple[Tensor, Tensor]:
    """(E×r×in, E×out×r) from one (A, B·s) an expert; unequal ranks are padded with zeros, a missing expert is an error."""
    missing = sorted(set(range(experts)) - set(found))
    if missing or len(found) != experts:
        raise ArtefactError(f"{where}: the file has adapters for {len(found)} of {experts} experts; missing: {missing[:8]}.")
    rank = max(a.shape[0] for a, _ in found.values())
    As, Bs = [], []
    for e in range(experts):
        a, b = found[e]
        pad = rank - a.shape[0]
        As.append(torch.cat([a, a.new_zeros(pad, a.shape[1])]))
        Bs.append(torch.cat([b, b.new_zeros(b.shape[0], pad)], dim=1))
    if len({t.shape for t in As}) > 1 or len({t.shape for t in Bs}) > 1:
        raise ArtefactError(f"{where}: the experts' factors are of unequal shape.")
    return torch.stack(As), torch.stack(Bs)
