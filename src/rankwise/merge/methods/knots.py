"""KnOTS: merge in a basis that all sources share."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from rankwise.catalogue import make, register
from rankwise.delta.lowrank import LowRank
from rankwise.merge.engine.base import Merge, at_least_one, one_of, share
from rankwise.merge.engine.result import Merged, truncated

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import FactorStack, Stack
    from rankwise.merge.methods.entries import Entrywise


#: option ``rule`` → the registered merge that joins the coordinates
_RULES = {"ties": "ties", "sum": "magnitude_prune"}


@register("merge", "knots", title="KnOTS: merge in the sources' joint basis", paper="arXiv 2410.19735", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class KnOTS(Merge):
    """[ΔW_1 … ΔW_T] = U·S·[V_1 … V_T]ᵀ; merge the coordinates Z_t = S·V_tᵀ = Uᵀ·ΔW_t (R×in) by an entry-wise rule; ΔW = U·Z.

    The result is exactly a LoRA (B = U: out×R, A = Z), R ≤ min(out, Σ r_t), cut to ``rank`` where given.  U comes from a
    QR of [B_1 … B_T] and the SVD of a small core, never from out×(T·in).  ``rule``: "ties" (top ``density``, signs by the
    sum, mean of those that agree) or "sum" (of what is kept).  ``lam`` multiplies the result.  The released code cuts each source's
    largest entries over the whole model; here it is per site, as everything is.

    Source: gstoica27/KnOTS.  Errors: singular values that coincide leave U free, so that which coordinates are cut is not determined.

    Args:
        rule: how coordinates join: "ties" or "sum".
        density: the share of coordinates kept.
        lam: multiplies the result.
        cutoff: singular values below this share of the largest are none.
        rank: of the result; None: as it comes.
    """

    adapters: ClassVar[bool] = True
    checkpoints: ClassVar[bool] = False
    rule: Literal["ties", "sum"] = "ties"
    density: float = 0.2
    lam: float = 0.6
    cutoff: float = 1e-5
    rank: int | None = None

    def __post_init__(self) -> None:
        one_of("knots", "rule", self.rule, tuple(_RULES))
        share("knots", "density", self.density)
        at_least_one("knots", self.rank)

    def combine(self, stack: Stack, seed: int) -> Merged:
        stack = stack.factors()
        U = self._basis(stack)
        rule: Entrywise = make("merge", _RULES[self.rule], density=self.density)
        Z = rule.entries(stack.in_basis(U), seed).double()
        made = LowRank(self.lam * Z, U)
        return Merged(made) if self.rank is None else truncated(made, self.rank)

    def _basis(self, stack: FactorStack) -> torch.Tensor:
        """U: out×R, orthonormal, of the singular values above the cutoff."""
        B = torch.cat([B for _, B, _ in stack.sources()], dim=1)
        Q, R = torch.linalg.qr(B)
        core, at = [], 0
        for A, Bt, _ in stack.sources():  # R·blockdiag(A_t)·its transpose: the small Gram matrix of the joint
            r = A.shape[0]
            core.append(R[:, at : at + r] @ torch.linalg.qr(A.mT)[1].mT)  # the same singular values and U as R_t·A_t
            at += r
        U, S, _ = torch.linalg.svd(torch.cat(core, dim=1), full_matrices=False)
        kept = self.cutoff * S[0].clamp_min(1e-300) < S
        return Q @ U[:, kept] if bool(kept.any()) else Q @ U[:, :1]
