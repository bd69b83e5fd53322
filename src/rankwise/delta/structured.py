"""Kronecker, Hadamard and tiled changes: small factors, known rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry, Linear
from rankwise.delta.lowrank import LowRank
from rankwise.errors import OptionError


@dataclasses.dataclass(frozen=True, eq=False)
class Kron(Delta):
    """Δ = scale·P ⊗ Q with P: (…, p₁, p₂), Q: (…, q₁, q₂); shape (…, p₁q₁, p₂q₂), rank min(p₁, p₂)·min(q₁, q₂)."""

    P: Tensor
    Q: Tensor
    scale: float | Tensor = 1.0
    kind: ClassVar[str] = "kron"

    def __post_init__(self) -> None:
        if self.P.dim() < 2 or self.P.shape[:-2] != self.Q.shape[:-2]:
            raise OptionError(
                f"P: {tuple(self.P.shape)} and Q: {tuple(self.Q.shape)} do not fit; their leading axes are one stack."
            )

    @property
    def shape(self) -> torch.Size:
        (*lead, p, pi), (q, qi) = self.P.shape, self.Q.shape[-2:]
        return torch.Size((*lead, p * q, pi * qi))

    @property
    def exact_rank(self) -> int:
        return min(self.P.shape[-2:]) * min(self.Q.shape[-2:])

    def _exact(self) -> LowRank:
        (a, b), (c, d) = _thin(self.P), _thin(self.Q)  # (b·a) ⊗ (d·c) = (b ⊗ d)·(a ⊗ c)
        return LowRank(_kron(a, c), _kron(b, d), self.scale)

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if not isinstance(op, Linear) or self.P.dim() > 2:
            return op.linear(x, self.dense())
        rows = x.unflatten(-1, (self.P.shape[1], self.Q.shape[1]))
        return (self.P @ (rows @ self.Q.mT)).flatten(-2) * self.scale

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return _kron(self.P, self.Q) * self.scale

    def _inner(self, other: Delta) -> Tensor | None:
        if not isinstance(other, Kron) or (self.P.shape, self.Q.shape) != (other.P.shape, other.Q.shape):
            return None
        a, b = self._wide(), other._wide()
        return ((a.P * b.P).sum((-2, -1)) * (a.Q * b.Q).sum((-2, -1))).sum() * a.scale * b.scale

    def scaled(self, c: float | Tensor) -> Kron:
        return dataclasses.replace(self, scale=self.scale * c)

    def transposed(self) -> Kron:
        return Kron(self.P.mT.contiguous(), self.Q.mT.contiguous(), self.scale)


def _kron(P: Tensor, Q: Tensor) -> Tensor:
    """P ⊗ Q of the last two axes (torch.kron would take all of them)."""
    (*lead, p, pi), (q, qi) = P.shape, Q.shape[-2:]
    return (P[..., :, None, :, None] * Q[..., None, :, None, :]).reshape(*lead, p * q, pi * qi)


def _thin(M: Tensor) -> tuple[Tensor, Tensor]:
    """(A, B) with B·A = M to the bit, of rank min(M.shape[-2:]): the identity on M's shorter side."""
    rows, columns = M.shape[-2:]
    eye = torch.eye(min(rows, columns), dtype=M.dtype, device=M.device).expand(*M.shape[:-2], -1, -1)
    return (M, eye) if rows <= columns else (eye, M)


@dataclasses.dataclass(frozen=True, eq=False)
class Hadamard(Delta):
    """ΔW = left ∘ right, elementwise; exact rank r₁·r₂ by the products of every component of one with every one of the other."""

    left: LowRank
    right: LowRank
    kind: ClassVar[str] = "hadamard"

    def __post_init__(self) -> None:
        if self.left.shape != self.right.shape:
            raise OptionError(
                f"An elementwise product needs equal shapes; it got {tuple(self.left.shape)} and {tuple(self.right.shape)}."
            )

    @property
    def shape(self) -> torch.Size:
        return self.left.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.left.dtype

    @property
    def exact_rank(self) -> int:
        return self.left.r * self.right.r

    def _exact(self) -> LowRank:
        (A, B), (C, D) = self.left.factors(), self.right.factors()
        rows = (A[..., :, None, :] * C[..., None, :, :]).flatten(-3, -2)
        cols = (B[..., :, :, None] * D[..., :, None, :]).flatten(-2, -1)
        return LowRank(rows, cols)

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        out, inp = self.shape[-2:]
        if op.factors and self.exact_rank * (out + inp) < out * inp:  # a row costs less through A and B
            return self._exact().apply(x, y, op=op)
        return op.linear(x, self.dense())

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return self.left.dense() * self.right.dense()

    def scaled(self, c: float | Tensor) -> Hadamard:
        return Hadamard(self.left.scaled(c), self.right)

    def transposed(self) -> Hadamard:
        return Hadamard(self.left.transposed(), self.right.transposed())

    def tensors(self) -> dict[str, Tensor]:
        return {f"{side}.{n}": t for side in ("left", "right") for n, t in getattr(self, side).tensors().items()}

    def meta(self) -> dict[str, Any]:
        return {"left": self.left.meta(), "right": self.right.meta()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
        def side(name: str) -> LowRank:
            mine = {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(name)}
            return LowRank(**{**meta[name], **mine})

        return cls(side("left"), side("right"))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(self, left=self.left.map(fn), right=self.right.map(fn))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        return dataclasses.replace(self, left=self.left.to(dtype, device), right=self.right.to(dtype, device))


@dataclasses.dataclass(frozen=True, eq=False)
class Tile(Delta):
    """Δ = Dᵀ·[I_r I_r …] cut to ``in_features`` columns; D: (…, r, out) (MiSS)."""

    D: Tensor
    in_features: int
    kind: ClassVar[str] = "tile"

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.D.shape[:-2], self.D.shape[-1], self.in_features))

    @property
    def exact_rank(self) -> int:
        return self.D.shape[-2]

    def _exact(self) -> LowRank:
        r = self.D.shape[-2]
        T = torch.eye(r, dtype=self.D.dtype, device=self.D.device).repeat(1, -(-self.in_features // r))[:, : self.in_features]
        return LowRank(T.expand(*self.D.shape[:-2], *T.shape), self.D.mT)

    def apply(self, x: Tensor, y: Tensor | None = None, **kwargs: Any) -> Tensor:
        return self._exact().apply(x, y, **kwargs)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return self._exact().dense()

    def scaled(self, c: float | Tensor) -> Tile:
        return dataclasses.replace(self, D=self.D * c)

    def _join(self, other: Delta) -> Delta | None:
        same = isinstance(other, Tile) and other.D.shape == self.D.shape
        return dataclasses.replace(self, D=self.D + other.D) if same else None  # type: ignore[attr-defined]
