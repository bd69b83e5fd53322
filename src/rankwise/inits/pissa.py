"""PiSSA, and the inits ``olora`` and ``gaussian``: first values of A and B from W itself, or drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.delta.solve import randomized_svd
from rankwise.errors import OptionError
from rankwise.inits.base import Fill, Init

if TYPE_CHECKING:
    from rankwise.calibration.base import Stats
    from rankwise.sites.site import Site


@register(
    "init",
    "pissa",
    title="PiSSA: principal singular values and vectors of W",
    paper="arXiv 2404.02948",
    reference="086",
    requires=("fill:A", "fill:B"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class PiSSA(Init):
    """W = U·S·Vᵀ; B = U_r·(S_r/s)^½: out×r, A = (S_r/s)^½·V_rᵀ: r×in, and the base becomes W − s·B·A (the residual).

    Balanced: A·Aᵀ = Bᵀ·B = diag(S_r)/s; the residual's spectrum is S_{r+1:}, whatever s.  Both factors have a gradient
    at once.  ``niter`` = None is the full SVD; K is a randomised one with K subspace iterations (``pissa_niter_K``),
    after which the first output is unchanged all the same, since the very same factors are subtracted.

    Source: GraphPKU/PiSSA, utils/init_pissa.py.  Published code subtracts in W's own (16-bit) storage; here −s·B₀·A₀ is kept
    in frozen buffers and W is not written.  Errors: niter < 1.
    """

    peft_fields: ClassVar[Mapping[str, Any] | None] = {"init_lora_weights": "pissa"}
    niter: int | None = None

    def __post_init__(self) -> None:
        if self.niter is not None and self.niter < 1:
            raise OptionError(f"The init 'pissa' has niter ≥ 1 (or none, for the exact SVD); it got {self.niter}.")

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        U, S, Vh = self._top(site.read(), rank, g)
        root = (S / scale).sqrt()
        return Fill({"A": root[..., :, None] * Vh, "B": U * root[..., None, :]}, "subtract")

    def _top(self, W: Tensor, rank: int, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        if self.niter is None:
            U, S, Vh = torch.linalg.svd(W, full_matrices=False)  # fp32, as PEFT's: the residual is exact for any factors
            return U[..., :rank], S[..., :rank], Vh[..., :rank, :]
        parts = [randomized_svd(w, rank, niter=self.niter, generator=g) for w in W.reshape(-1, *W.shape[-2:])]
        U, S, Vh = (torch.stack(t).reshape(*W.shape[:-2], *t[0].shape) for t in zip(*parts, strict=True))
        return U, S, Vh


@register(
    "init",
    "olora",
    title="OLoRA: an orthonormal basis of W's columns by QR",
    paper="arXiv 2406.01775",
    requires=("fill:A", "fill:B"),
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class OLoRA(Init):
    """W = Q·R (thin); B = Q_{:,:r}: out×r, A = R_{:r,:}: r×in, base ← W − s·B·A.  No randomness; s is not divided out.

    Bᵀ·B = I; at s = 1 the first r columns of W − B·A are zero.  Source: HF PEFT's olora_init, which does not un-transpose
    a Conv1D's storage; sites do.
    """

    peft_fields: ClassVar[Mapping[str, Any] | None] = {"init_lora_weights": "olora"}

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        Q, R = torch.linalg.qr(site.read().double())
        return Fill({"A": R[..., :rank, :].float(), "B": Q[..., :rank].float()}, "subtract")


@register("init", "gaussian", title="Gaussian A, zero B", requires=("fill:A",))
@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(Init):
    """A ~ N(0, (1/r)²): r×in, B = 0, as PEFT's ``init_lora_weights="gaussian"``."""

    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts")

    def fill(self, site: Site, stats: Stats, rank: int, scale: float, g: torch.Generator) -> Fill:
        stack = (site.spec.stack,) if site.spec.stack else ()
        return Fill({"A": torch.randn(*stack, rank, site.spec.inp, generator=g) / rank})
