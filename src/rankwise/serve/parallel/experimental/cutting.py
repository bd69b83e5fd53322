"""A device's slices: of the model (modules of its own, uncut tensors shared), and of an adapter's factors.

    split      column-parallel: A r/N × in, B out/N × r (v is gathered)     row-parallel: A r × in/N, B out/N × r (v is summed)
    replicate  column-parallel: A r × in,   B out/N × r (v is whole)        row-parallel: A r × in/N, B out × r (partial changes
               B v_n ride on the base's all-reduce, since Σ_n B v_n = B Σ_n v_n)

With ``split`` the row-parallel slice of B gives a device outputs [lo, hi) of the whole change, added to those columns of its
partial sum.  r that N does not divide is padded with zero components.  A row-parallel bias stays on device 0 alone, so that
the sum holds it once.  Sources: S-LoRA (arXiv 2311.03285), section 6; the second is vLLM's default.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.runtime.shared_copy import shared_copy

if TYPE_CHECKING:
    from rankwise.serve.ops.base import Pairs
    from rankwise.serve.parallel.experimental.shares import Share


@torch.no_grad()
def cut_model(model: nn.Module, share: Share) -> nn.Module:
    """``model`` as device ``share.rank`` holds it; ``model`` stays as it is, and what is not cut is the same memory.

    Its plain forward gives partial sums at o and down: whoever runs it adds them up over the devices.
    """
    local = shared_copy(model)
    for path, cut in share.cuts.items():
        m = local.get_submodule(path)
        W, b = m.get_parameter("weight"), m._parameters.get("bias")
        if cut.out is not None:
            _hold(m, W[cut.out], None if b is None else b[cut.out])
        elif cut.inp is not None:
            _hold(m, W[:, cut.inp], b if share.rank == 0 else None)
    _count_heads(local, share)
    head = local.get_output_embeddings()  # type: ignore[operator]
    if share.rank and head.weight is not local.get_input_embeddings().weight:  # type: ignore[operator]
        _hold(head, head.weight[:0], None)
    return local


def _hold(m: nn.Module, weight: Tensor, bias: Tensor | None) -> None:
    """Make these the linear's own: copies, also of views, or the whole weight would live as long as its slice."""
    for name, t in (("weight", weight), ("bias", bias)):
        m.register_parameter(name, None if t is None else nn.Parameter(t.clone() if t._is_view() else t, requires_grad=False))
    m.out_features, m.in_features = weight.shape  # type: ignore[assignment]


def _count_heads(local: nn.Module, share: Share) -> None:
    """Modelling code that counts heads (fused projections do) counts this device's."""
    for path, (q, kv) in share.heads.items():
        m = local.get_submodule(path)
        for name, n in (
            ("num_heads", q),
            ("num_attention_heads", q),
            ("num_key_value_heads", kv),
            ("num_key_value_groups", q // kv),
        ):
            if isinstance(getattr(m, name, None), int):
                setattr(m, name, n)
        config = getattr(m, "config", None)
        if config is not None:  # one for all layers, a copy of the model's: every layer has the same share
            config.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            config.num_attention_heads, config.num_key_value_heads = q, kv


def components(A: Tensor, width: int, rank: int, size: int) -> Tensor:
    """One device's rows of A: (⌈r/width⌉·⌈width/N⌉)×in, with zero rows where r ends.

    Args:
        A: r×in.
        width: rows of which each device has an N-th.
        rank, size: of the device, and N.
    """
    mine = -(-width // size)
    A = nn.functional.pad(A, (0, 0, 0, -A.shape[0] % width)).unflatten(0, (-1, width))
    A = nn.functional.pad(A, (0, 0, 0, mine * size - width))
    return A[:, rank * mine : (rank + 1) * mine].flatten(0, 1)


def gathered(v: Tensor, width: int) -> Tensor:
    """(…, width): the devices' parts (N, …, ⌈width/N⌉) side by side, what padding added left out."""
    return v.movedim(0, -2).flatten(-2)[..., :width]


def cut_pairs(pairs: Pairs, group: str, share: Share, split: bool, width: int) -> Pairs:
    """One group's factors as this device holds them.

    Args:
        pairs, group: of the whole adapter, A: r×in with the scale in it, B: out×r for each module of the group.
        share: the device's slices.
        split: whether the adapter is held split, else replicated.
        width: components in a page.
    """
    modules = share.whole[group].modules
    return tuple(None if p is None else _cut_pair(*p, group, m, share, split, width) for p, m in zip(pairs, modules, strict=True))


def _cut_pair(A: Tensor, B: Tensor, group: str, module: str, share: Share, split: bool, width: int) -> tuple[Tensor, Tensor]:
    cut = share.cuts[module]
    if cut.out is not None:
        return components(A, width, share.rank, share.size) if split else A, B[cut.out]
    assert cut.inp is not None
    lo, hi = share.outputs(group)
    return A[:, cut.inp], B[lo:hi] if split else B
