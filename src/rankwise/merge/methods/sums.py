"""Weighted sums: exact (cat), cut to a rank (svd), and factor by factor (linear), whose cross terms are told."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, ClassVar

import torch

from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.errors import MergeError
from rankwise.merge.engine.base import Merge, at_least_one
from rankwise.merge.engine.result import Merged

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack


@register("merge", "cat", title="Concatenation: the exact weighted sum", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class ConcatMerge(Merge):
    """Â = stack(A_t): (Σ r_t)×in, B̂ = [w_t·s_t·B_t]: out×(Σ r_t); exactly Σ w_t·ΔW_t.  Source: HF PEFT, ``cat``."""

    checkpoints: ClassVar[bool] = False
    spreads: ClassVar[bool] = True

    def combine(self, stack: Stack, seed: int) -> Merged:
        return Merged(stack.total(), error=0.0)


@register("merge", "svd", title="Weighted sum cut to a rank", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SvdMerge(Merge):
    """The best rank-``rank`` approximation of Σ w_t·ΔW_t (default: the largest source rank), by QR and a small SVD.

    The error is √Σ_{j>r} σ_j² (Eckart–Young) and is reported.  Source: HF PEFT, ``svd``, which forms ΔW and says nothing
    of the error.
    """

    checkpoints: ClassVar[bool] = False
    rank: int | None = None

    def __post_init__(self) -> None:
        at_least_one("svd", self.rank)

    def combine(self, stack: Stack, seed: int) -> Merged:
        made = stack.combined(stack.weights, self.rank or stack.rank())
        return dataclasses.replace(made, error=made.truncation)


@register("merge", "linear", title="Factor-wise weighted sum, with its cross terms", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearMerge(Merge):
    """Â = Σ sign(w_t)·√|w_t·s_t|·A_t, B̂ = Σ √|w_t·s_t|·B_t (equal ranks), so the result is Σ w_t·ΔW_t plus the cross terms
    Σ_{t≠u} √(w_t·w_u)·B_t·A_u: HF PEFT's ``linear``, kept under its own name for agreement with it.

    With weights 1/T, T identical adapters give T times the adapter.  Depends on the gauge of the factors.  For the sum
    itself use ``cat`` or ``svd``.  Errors: unequal ranks; a site that only some sources have.
    """

    gauge_invariant: ClassVar[bool] = False
    checkpoints: ClassVar[bool] = False
    spreads: ClassVar[bool] = True
    breaks: ClassVar[frozenset[str]] = frozenset({"twins"})

    def combine(self, stack: Stack, seed: int) -> Merged:
        stack = stack.factors()
        sources = stack.sources()
        if len({A.shape[0] for A, _, _ in sources}) > 1 or not all(stack.present):
            raise MergeError(
                f"The merge 'linear' adds factors, so every source needs {stack.name!r} at one rank; use 'cat' or 'svd'."
            )
        a, b = [math.copysign(math.sqrt(abs(w)), w) for w in stack.weights], [math.sqrt(abs(w)) for w in stack.weights]
        A, B = torch.zeros_like(sources[0][0]), torch.zeros_like(sources[0][1])
        for x, y, (A_t, B_t, _) in zip(a, b, sources, strict=True):
            A.add_(A_t, alpha=x), B.add_(B_t, alpha=y)
        crossed = torch.outer(torch.tensor(b, dtype=torch.float64), torch.tensor(a, dtype=torch.float64))
        return Merged(LowRank(A, B), error=stack.crossed(crossed))
