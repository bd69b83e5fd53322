"""TIES: trim, elect a sign, average those that agree."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.delta import LowRank
from rankwise.errors import OptionError
from rankwise.merge.base import Lifted, Merge


@register("merge", "ties", title="TIES: trim, elect sign, disjoint mean", paper="arXiv 2306.01708", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class TIES(Merge):
    """Keep the top ``density`` of each source by magnitude; ε = sign of the sum of the kept (``elect="total"``) or of their
    signs ("frequency"); then Σ_t w_t·v_t·[sign v_t = ε] / max(1, #agreeing), with v_t on the unweighted ΔW_t.

    In delta space (default): each ΔW_t out×in is formed at its site, one site at a time, and the result cut to ``rank`` with
    the error reported.  ``space="factors"`` does it to A and B apart with √w weights, as HF PEFT's ``ties``: the products of
    trimmed factors are not trimmed products.  λ multiplies the result.

    Source: prateeky2806/ties-merging; HF PEFT, merge_utils.  The sign of an all-zero coordinate is +1, which never matters.
    """

    density: float = 0.2
    elect: Literal["total", "frequency"] = "total"
    space: Literal["delta", "factors"] = "delta"
    rank: int | None = None
    lam: float = 1.0
    gauge_invariant: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise OptionError(f"The merge 'ties' keeps a share density in (0, 1] of each source; it got {self.density}.")
        if self.elect not in ("total", "frequency") or self.space not in ("delta", "factors"):
            raise OptionError(
                f"The merge 'ties' has elect 'total' or 'frequency' and space 'delta' or 'factors'; it got {self.elect!r}, {self.space!r}."
            )

    def combine(self, lifted: Lifted, g: torch.Generator) -> LowRank:
        sources = lifted.present()
        if self.space == "factors":
            if len({A.shape[0] for A, _, _ in sources}) > 1:
                raise OptionError(f"The merge 'ties' in factor space needs equal ranks at {lifted.site!r}; use space='delta'.")
            A = self.merge([A for A, _, _ in sources], [abs(w) ** 0.5 * (1 if w >= 0 else -1) for *_, w in sources])
            B = self.merge([B for _, B, _ in sources], [abs(w) ** 0.5 for *_, w in sources])
            return LowRank(A, self.lam * B)
        W = self.lam * self.merge([B @ A for A, B, _ in sources], [w for *_, w in sources])
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
        r = lifted.rank(self.rank)
        root = S[:r].sqrt()
        return LowRank(root[:, None] * Vh[:r], U[:, :r] * root)

    def merge(self, values: list[Tensor], weights: list[float]) -> Tensor:
        """The disjoint mean of trimmed tensors of one shape."""
        kept = torch.stack([trim(v, self.density) for v in values])
        total = kept.sum(0) if self.elect == "total" else kept.sign().sum(0)
        elected = torch.where(total >= 0, 1.0, -1.0)
        agree = (kept.sign() == elected) & (kept != 0)
        w = torch.tensor(weights, dtype=kept.dtype).view(-1, *([1] * values[0].dim()))
        return (w * kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def trim(v: Tensor, density: float) -> Tensor:
    """``v`` with all but its int(density·numel) largest entries by magnitude set to zero."""
    k = max(int(density * v.numel()), 1)
    if k >= v.numel():
        return v
    kept = v.abs().flatten().topk(k).indices
    mask = torch.zeros(v.numel(), dtype=torch.bool).scatter_(0, kept, True)
    return v * mask.view(v.shape)
