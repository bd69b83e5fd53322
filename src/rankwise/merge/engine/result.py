"""What a merge gives for one tensor, cut to a rank where that was asked for, and how far it is from the weighted sum."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from rankwise.delta.lowrank import LowRank
from rankwise.delta.solve import randomized_svd

#: relative distance above which fp32 products tell it to five digits; what is nearer is told in fp64
FAR = 0.3
#: the least share of its summands that a sum of fp32 products must keep, and the least sum, to be told by them
CANCELS, TINY = 1e-2, 1e-30


@dataclasses.dataclass(frozen=True)
class Merged:
    """One tensor's result: low-rank or out×in, and the share of it that cutting to a rank lost.

    ``error``: ‖value − Σ w·ΔW‖/‖Σ w·ΔW‖ where the method knows it, else it is measured.
    """

    value: LowRank | Tensor
    truncation: float = 0.0
    error: float | None = None


def distance(a: LowRank, b: LowRank) -> float:
    """‖a − b‖/‖b‖ from r-wide products, in fp64 where the two are near each other; 0 where both vanish."""
    wide = a.dtype == torch.float64 or b.dtype == torch.float64
    ratio = float("nan") if wide else _distance(a, b, torch.float32)
    return ratio if ratio > FAR and math.isfinite(ratio) else _distance(a, b, torch.float64)


def _distance(a: LowRank, b: LowRank, dtype: torch.dtype) -> float:
    (A, B), (C, D) = a.factors(), b.factors()
    left = torch.cat([B.to(dtype), -D.to(dtype)], 1)
    right = torch.cat([A.to(dtype), C.to(dtype)], 0)
    products, own = (left.mT @ left).mul_(right @ right.mT).double(), slice(B.shape[1], None)
    return share_of(products, products[own, own], dtype)


def truncated(total: LowRank, rank: int) -> Merged:
    """The best rank-``rank`` part of a low-rank value (QR + small SVD), √S on each side, and what it lost."""
    low, lost = total.to_lowrank(rank=min(rank, *total.shape[-2:]))
    return Merged(low, lost)


def lowered(W: Tensor, rank: int, g: torch.Generator) -> Merged:
    """A merged out×in change cut to ``rank``, √S on each side; by a randomised SVD where the rank is far below full."""
    if 8 * rank < min(W.shape):
        low, _ = LowRank.from_svd(*(t.double() for t in randomized_svd(W, rank, oversample=rank, generator=g)), rank=rank)
    else:
        low, _ = LowRank.from_svd(*torch.linalg.svd(W.double(), full_matrices=False), rank=rank)
    size = float(W.double().norm())
    A, B = low.factors()
    gap = torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=-1).double().norm()
    return Merged(low, float(gap) / size if size else 0.0)


def share_of(gap: Tensor, whole: Tensor, dtype: torch.dtype) -> float:
    """√(Σ gap / Σ whole) of squares told by their summands, which came from products in ``dtype``; 0 where both vanish.

    NaN where fp32 products do not tell ``whole`` to five digits, because its summands cancel or are too small.
    """
    size = float(whole.sum())
    if dtype == torch.float32 and not (size > TINY and size > CANCELS * float(whole.abs().sum())):
        return float("nan")
    off = max(float(gap.sum()), 0.0)
    return math.sqrt(off / size) if size > 0 else float(off > 0)
