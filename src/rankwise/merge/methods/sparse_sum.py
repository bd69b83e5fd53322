"""Composition of sparse fine-tunings: the sum of values of any kind, entry by entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from rankwise.budgets.lt_sft import overlap
from rankwise.catalogue import register
from rankwise.delta.sparse import Entries
from rankwise.delta.state import AdapterState
from rankwise.merge.engine.base import Merge, Source

if TYPE_CHECKING:
    from rankwise.delta.base import Delta


@register(
    "merge", "sparse_sum", title="Composition of sparse fine-tunings", paper="ACL 2022, 2110.07560", reference="177", mergeable=True
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseSum(Merge):
    """θ = θ_0 + Σ w_t·φ_t (weights 1 by default): the sparse differences of a task and of a language, added to the base.

    Takes changes of every kind as they are, without lowering: entries stay entries (the union of their places, fp64 sums),
    low-rank stays low-rank, unlike kinds stand beside each other.  Exact, commutative, and off again to the bit, since W
    is never written.  :func:`rankwise.budgets.lt_sft.sparse` takes φ out of a trained adapter,
    :func:`~rankwise.budgets.lt_sft.overlap` counts the entries that several change.

    Source: cambridgeltl/composable-sft, sft/sft.py.
    """

    checkpoints: ClassVar[bool] = False
    any_kind: ClassVar[bool] = True
    whole_weights: ClassVar[bool] = True

    def add(self, found: Sequence[Delta | None], weights: Sequence[float]) -> Delta:
        total: Delta | None = None
        for d, w in zip(found, weights, strict=True):
            if d is not None:
                wide = d.to(torch.float64)
                part = wide if w == 1 else wide.scaled(w)
                total = part if total is None else total + part
        assert total is not None
        return total

    def notes(self, sources: Sequence[Source]) -> dict[str, Any]:
        """``shared``: site → entries that more than one source changes, where all are sparse."""
        sparse = {n for s in sources for n in s.sites if all(isinstance(o.sites.get(n, None), Entries | None) for o in sources)}
        some = [AdapterState({n: s.sites[n] for n in sparse if n in s.sites}) for s in sources]
        return {"shared": overlap(some)} if sparse else {}
