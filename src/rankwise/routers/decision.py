"""What a router decided for a batch of rows, and the ways to compute it.

The executor, never the router, picks the way (``plan``).  All compute the same sum
y_n = s · Σ_j g_nj · (A_j·x_n) · B_j over rank-one components j, and agree to 1e-10 in fp64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.errors import OptionError

Plan = Literal["constant", "dense", "bag", "segments"]


@dataclasses.dataclass(frozen=True)
class Decision:
    """Weights of U units (components, or experts of ``sizes`` components each) for N rows.

    Attributes:
        units: U.
        index: (N, k) int64, the units of ``weight``'s columns; None where it is dense.
        weight: (N, U) dense, or (N, k) beside ``index`` (N, k) sparse; (U,) where every row has the same.
        sizes: components of each unit, in storage order; None: a unit is one component.
        logits, probs: (N, U) with graph, for losses.
    """

    weight: Tensor
    units: int
    index: Tensor | None = None
    sizes: Sequence[int] | None = None
    logits: Tensor | None = None
    probs: Tensor | None = None

    @property
    def constant(self) -> bool:
        """True where every row has the same weights, so that the adapter can be merged."""
        return self.weight.dim() == 1

    def dense(self, n: int | None = None, u: int | None = None) -> Tensor:
        """(N, U) weights; (U,) where constant."""
        if self.index is None:
            return self.weight
        return torch.zeros(*self.index.shape[:-1], self.units, dtype=self.weight.dtype, device=self.weight.device).scatter_add(
            -1, self.index, self.weight
        )

    def gate(self) -> Tensor:
        """(N, R) weights of components: a unit's weight for each of its own."""
        g = self.dense()
        if self.sizes is None:
            return g
        return g.repeat_interleave(torch.tensor(list(self.sizes), device=g.device), dim=-1)

    def pairs(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rows, units, weights) of all that act, each (P,), sorted by unit; a row may have none."""
        if self.index is None:
            units, rows = (self.weight.mT != 0).nonzero(as_tuple=True)
            return rows, units, self.weight[rows, units]
        order = self.index.reshape(-1).argsort(stable=True)
        return order // self.index.shape[-1], self.index.reshape(-1)[order], self.weight.reshape(-1)[order]

    def counts(self, mask: Tensor | None = None) -> Tensor:
        """How many rows chose each unit, (U,)."""
        chosen = self.dense() != 0 if self.index is None else None
        if chosen is None:
            assert self.index is not None
            one = torch.ones_like(self.index, dtype=torch.float32)
            if mask is not None:
                one = one * mask[:, None]
            return torch.zeros(self.units, device=one.device).scatter_add(0, self.index.reshape(-1), one.reshape(-1))
        return (chosen if mask is None else chosen & mask[:, None]).sum(0).float()


def pick_plan(n: int, r: int, active: int, decision: Decision, training: bool) -> Plan:
    """The way to compute a decision: "constant" where all rows have the same weights; "dense", two masked products, in training
    and for few components; "bag" where few of many components act.

    Args:
        n: rows.
        r: components.
        active: components that act per row.
        decision: for whether it is constant or sparse.
        training: whether gradients are recorded.
    """
    if decision.constant:
        return "constant"
    if decision.index is None or r < 128 or active * 8 > r:
        return "dense"
    return "bag" if not training or active * 8 <= r else "dense"


def execute(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, decision: Decision, plan: Plan | None = None) -> Tensor:
    """Δy, (N, out).

    Args:
        x: (N, in).
        A: (R, in).
        B: (out, R).
        scale: a number or a 0-d tensor.
        decision: the weights of the R components, or of groups of them.
        plan: "constant", "dense", "bag" or "segments" (rows sorted by expert); default :func:`pick_plan`'s.
    """
    active = decision.units if decision.index is None else decision.index.shape[-1]
    if decision.sizes is not None and decision.index is not None:
        active *= max(decision.sizes)
    plan = plan or pick_plan(len(x), len(A), active, decision, torch.is_grad_enabled())
    if plan == "constant":
        if not decision.constant:
            raise OptionError("The plan 'constant' needs a decision that is the same for all rows.")
        return F.linear(F.linear(x, A) * (decision.gate() * scale).to(x.dtype), B)
    if plan == "dense":
        return F.linear(F.linear(x, A) * (decision.gate() * scale).to(x.dtype), B)
    if decision.index is None:
        raise OptionError(f"The plan {plan!r} needs a sparse decision.")
    return _bag(x, A, B, scale, decision) if plan == "bag" else _segments(x, A, B, scale, decision)


def _bag(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, d: Decision) -> Tensor:
    """Dense down, sparse up: sums of the selected rows of Bᵀ, weighted by z ⊙ g."""
    ids, w = _component_ids(d)
    z = F.linear(x, A).gather(1, ids)
    return F.embedding_bag(ids, B.mT.contiguous(), per_sample_weights=z * (w * scale).to(z.dtype), mode="sum")


def _component_ids(d: Decision) -> tuple[Tensor, Tensor]:
    """(N, K) component ids and weights of the selected units; ragged units are padded with weight 0."""
    assert d.index is not None
    if d.sizes is None:
        return d.index, d.weight
    sizes = torch.tensor(list(d.sizes), device=d.index.device)
    starts = sizes.cumsum(0) - sizes
    widest = int(sizes.max())
    step = torch.arange(widest, device=d.index.device)
    inside = step < sizes[d.index][..., None]
    ids = torch.where(inside, starts[d.index][..., None] + step, torch.zeros_like(step))
    weights = d.weight[..., None] * inside
    return ids.flatten(1), weights.flatten(1)


def _segments(x: Tensor, A: Tensor, B: Tensor, scale: float | Tensor, d: Decision) -> Tensor:
    """Rows sorted by expert, two products per non-empty segment, added back."""
    assert d.index is not None
    sizes = list(d.sizes) if d.sizes is not None else [1] * d.units
    k = d.index.shape[1]
    flat = d.index.reshape(-1)
    order = flat.argsort(stable=True)
    rows = order // k
    counts = torch.bincount(flat, minlength=d.units).tolist()
    parts, at = [], 0
    starts = [sum(sizes[:e]) for e in range(d.units)]
    for e, count in enumerate(counts):
        mine = x[rows[at : at + count]]
        block = slice(starts[e], starts[e] + sizes[e])
        parts.append(F.linear(F.linear(mine, A[block]), B[:, block]))
        at += count
    y = torch.cat(parts) * (d.weight.reshape(-1)[order][:, None] * scale).to(x.dtype)
    return torch.zeros(len(x), B.shape[0], dtype=y.dtype, device=y.device).index_add(0, rows, y)
