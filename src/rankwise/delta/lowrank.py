"""ΔW = s·B·core·A, a sum of r rank-one components: what LoRA trains and what the other kinds are factored to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.delta.solve import thin_svd_of_product
from rankwise.errors import OptionError


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank(Delta):
    """ΔW = scale·B·core·A; component i is column i of B times row i of A.

    Attributes:
        A: (…, r, in).
        B: (…, out, r).
        scale: a number or a 0-d tensor.
        core: None (the identity), (…, r) a diagonal, or (…, r, r).
    """

    A: Tensor
    B: Tensor
    scale: float | Tensor = 1.0
    core: Tensor | None = None
    kind: ClassVar[str] = "lowrank"

    def __post_init__(self) -> None:
        if self.A.shape[:-2] != self.B.shape[:-2] or self.A.shape[-2] != self.B.shape[-1]:
            raise OptionError(
                f"A: {tuple(self.A.shape)} and B: {tuple(self.B.shape)} do not fit; A is (…, r, in) and B (…, out, r)."
            )
        *lead, r, _ = self.A.shape
        if self.core is not None and tuple(self.core.shape) not in ((*lead, r), (*lead, r, r)):
            raise OptionError(f"A core of {tuple(self.core.shape)} for A: {tuple(self.A.shape)}; it is (…, r) or (…, r, r).")

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.A.shape[:-2], self.B.shape[-2], self.A.shape[-1]))

    @property
    def exact_rank(self) -> int:
        return self.r

    def _exact(self) -> LowRank:
        return self

    def _cored(self) -> Tensor:
        """B·core, (…, out, r)."""
        if self.core is None:
            return self.B
        return self.B * self.core[..., None, :] if self.core.dim() == self.A.dim() - 1 else self.B @ self.core

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B') with ΔW = B'·A: scale and core are multiplied into B'."""
        B = self._cored()
        return self.A, B if isinstance(self.scale, float) and self.scale == 1.0 else B * self.scale

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if not op.factors:  # a grouped convolution reads only a part of its input a channel: the kernel is made dense
            return op.linear(x, self.dense())
        return op.pointwise(op.linear(x, self.A) * self.scale, self._cored())

    def dense(self, weight: Tensor | None = None) -> Tensor:
        A, B = self.factors()
        return B @ A

    def scaled(self, c: float | Tensor) -> LowRank:
        return dataclasses.replace(self, scale=self.scale * c)

    def transposed(self) -> LowRank:
        return LowRank(self._cored().mT, self.A.mT, self.scale)

    def _join(self, other: Delta) -> Delta | None:
        low = other if isinstance(other, LowRank) else None
        if low is None:
            return None
        if self.core is None and low.core is None and isinstance(self.scale, float) and self.scale == low.scale:
            return LowRank(torch.cat([self.A, low.A], -2), torch.cat([self.B, low.B], -1), self.scale)  # nothing is rounded
        (A, B), (C, D) = self.factors(), low.factors()
        return LowRank(torch.cat([A, C], -2), torch.cat([B, D], -1))

    def _pair(self, low: LowRank) -> Tensor:
        """⟨ΔW, ΔW'⟩ through r×r' products, fp64."""
        (A, B), (C, D) = self._wide().factors(), low._wide().factors()
        return ((B.mT @ D) * (A @ C.mT)).sum()

    # --- spectrum -------------------------------------------------------------------------------------------------
    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Thin (U, S, Vh) in fp64, by QR of both factors and the SVD of the r×r core."""
        A, B = self._wide().factors()  # the scale is folded in fp64: the spectrum is of the value, not of a rounded copy
        return thin_svd_of_product(B, A)

    def singular_values(self) -> Tensor:
        return self.svd()[1]

    def truncate(self, rank: int | None = None, energy: float | None = None) -> tuple[LowRank, float]:
        """The best approximation of a lower rank (a stack gets one rank), √S on each side, and its relative error."""
        low, error = self.from_svd(*self.svd(), rank=rank, energy=energy)
        return LowRank(low.A.to(self.A.dtype), low.B.to(self.B.dtype)), error

    def canonical(self) -> LowRank:
        """The same ΔW with unique factors: its SVD, √S on each side, the largest entry of each left vector positive."""
        U, S, Vh = self.svd()
        at = U.abs().argmax(-2, keepdim=True)
        sign = torch.where(U.gather(-2, at) < 0, -1.0, 1.0).to(U.dtype)
        root = S.sqrt()
        B = U * sign * root[..., None, :]
        A = root[..., :, None] * Vh * sign.mT
        return LowRank(A.to(self.A.dtype), B.to(self.B.dtype))

    def units(self) -> tuple[Tensor, Tensor]:
        """(a, b): (…, r, in) and (…, r, out), the rank-one components with the scale in b; a dense core is taken into B."""
        A, B = self.factors()
        return A, B.mT

    @classmethod
    def from_units(cls, a: Tensor, b: Tensor) -> LowRank:
        return cls(a, b.mT)

    @classmethod
    def from_svd(
        cls, U: Tensor, S: Tensor, Vh: Tensor, *, rank: int | None = None, energy: float | None = None
    ) -> tuple[LowRank, float]:
        """The leading part of an SVD, √S on each side, and ‖the rest‖/‖ΔW‖; a stack gets one rank, the largest that one needs.

        Args:
            U: (…, out, k).
            S: (…, k), descending.
            Vh: (…, k, in).
            rank: how many singular values to keep.
            energy: or the share of ‖ΔW‖² to keep, in (0, 1].

        Raises:
            OptionError: not one of rank ≥ 1 and 0 < energy ≤ 1 (the share of ‖Δ‖² that is kept).
        """
        if (rank is None) == (energy is None):
            raise OptionError(f"Cutting a spectrum takes either rank or energy; it got rank = {rank}, energy = {energy}.")
        total = S.square().sum(-1, keepdim=True)
        if energy is not None:
            if not 0 < energy <= 1:
                raise OptionError(f"energy = {energy}; it is a share in (0, 1].")
            short = S.square().cumsum(-1) < energy * (1 - 1e-12) * total  # nowhere true where Δ is zero
            rank = int(short.sum(-1).max()) + 1
        if rank is None or rank < 1:
            raise OptionError(f"rank = {rank}; a rank is at least 1.")
        k = min(rank, S.shape[-1])
        root = S[..., :k].sqrt()
        size = total.sum()
        error = float((S[..., k:].square().sum() / size).sqrt()) if size > 0 else 0.0
        return cls(root[..., :, None] * Vh[..., :k, :], U[..., :k] * root[..., None, :]), error

    def select(self, index: Tensor) -> LowRank:
        """Only the components ``index`` (a dense core mixes components, so it is taken into B first)."""
        A, B = self.factors()
        return LowRank(A.index_select(-2, index), B.index_select(-1, index))

    def without_zero_components(self) -> LowRank:
        """Without the components whose entry of a diagonal core is zero (in all of a stack), as AdaLoRA's pruning leaves them."""
        if self.core is None or self.core.dim() != self.A.dim() - 1:
            return self
        kept = (self.core != 0).reshape(-1, self.r).any(0)
        if bool(kept.all()):
            return self
        return LowRank(self.A[..., kept, :], self.B[..., kept], self.scale, self.core[..., kept])

    @classmethod
    def zeros(cls, out: int, inp: int, r: int = 1, **kwargs: Any) -> LowRank:
        """ΔW = 0.

        Args:
            out, inp: features of the weight.
            r: number of components.
            kwargs: dtype, device, as ``torch.zeros`` takes them.
        """
        return cls(torch.zeros(r, inp, **kwargs), torch.zeros(out, r, **kwargs))


def drop_zero_sites(sites: Mapping[str, Delta]) -> dict[str, Delta]:
    """The sites without zero components, less those that keep none; unchanged where every site is zero, as before training."""
    kept = {n: d.without_zero_components() if isinstance(d, LowRank) else d for n, d in sites.items()}
    return {n: d for n, d in kept.items() if not isinstance(d, LowRank) or d.r} or dict(sites)


def from_dense(W: Tensor) -> LowRank:
    """Full-rank factors of a dense matrix, by its SVD in fp64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return LowRank.from_svd(U, S, Vh, rank=S.shape[-1])[0].to(W.dtype)
