"""A cut linear by the definition, one module at a time: slow, and what the serving engine's way is held to.

    column-parallel   y_n = x W_nᵀ + b_n + v B_nᵀ              v = gather(x A_nᵀ) (T×r), or x Aᵀ where A is on every device
    row-parallel      y = Σ_n (x_n W_nᵀ + b [n = 0] + δ_n)      δ_n = (Σ_n x_n A_nᵀ) B_nᵀ in columns [lo, hi), or x_n A_nᵀ Bᵀ

x: T×in, y: T×out; the pairs are cut by :mod:`rankwise.serve.parallel.experimental.cutting`.  Source: see there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from rankwise.serve.parallel.experimental.cutting import cut_pairs, gathered

if TYPE_CHECKING:
    from rankwise.serve.ops.base import Pairs
    from rankwise.serve.parallel.experimental.comm import Communicator
    from rankwise.serve.parallel.experimental.shares import Share

Pair = tuple[Tensor, Tensor]


class CutLinear:
    """The forward of one module of a cut model, with one adapter's pair (None: the base alone).

    Args:
        m: the cut module.
        comm, rank: the devices; the pair's rank.
        pair: A and B, this device's part.
        split: whether A is cut over its rank.
        outputs: columns of y that B makes here, None for a column-parallel module.
    """

    def __init__(
        self, m: nn.Module, comm: Communicator, pair: Pair | None, rank: int, split: bool, outputs: tuple[int, int] | None
    ):
        self.weight, self.bias = m.get_parameter("weight"), m._parameters.get("bias")
        self.comm, self.pair, self.rank, self.split, self.outputs = comm, pair, rank, split, outputs

    def __call__(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.weight, self.bias)
        if self.outputs is None:
            return y if self.pair is None else y + self._column(x, *self.pair)
        if self.pair is not None:
            self._row(x, y, *self.pair)
        return self.comm.all_reduce(y.contiguous(), "base")

    def _column(self, x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        v = x @ A.t()
        if self.split:
            v = gathered(self.comm.all_gather(v.contiguous(), "adapter"), self.rank)
        return v @ B.t()

    def _row(self, x: Tensor, y: Tensor, A: Tensor, B: Tensor) -> None:
        v = x @ A.t()
        if not self.split:
            y += v @ B.t()
            return
        assert self.outputs is not None
        y[..., slice(*self.outputs)] += self.comm.all_reduce(v, "adapter") @ B.t()


@torch.no_grad()
def install(local: nn.Module, share: Share, comm: Communicator, pairs: Mapping[str, Pairs], split: bool) -> None:
    """Give every cut linear of ``local`` (:func:`~rankwise.serve.parallel.experimental.cutting.cut_model`) its forward by the definition.

    Args:
        local: the cut model.
        share, comm: this device's part, the devices.
        pairs: one adapter, as the whole base has it; A is split over its own rank here, not over LoRA pages.
        split: whether A is cut.
    """
    for name, g in share.whole.items():
        mine = pairs.get(name) or (None,) * len(g.modules)
        for module, pair in zip(g.modules, mine, strict=True):
            rank = 0 if pair is None else pair[0].shape[0]
            one = tuple(pair if m == module else None for m in g.modules)
            cut = None if pair is None else cut_pairs(one, name, share, split, rank)[g.modules.index(module)]
            outputs = share.outputs(name) if share.row_parallel(name) else None
            m = local.get_submodule(module)
            m.forward = CutLinear(m, comm, cut, rank, split, outputs)  # type: ignore[assignment]
