"""A few columns, rows or entries."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.delta.lowrank import LowRank
from rankwise.errors import OptionError


def _union(a: Tensor, va: Tensor, b: Tensor, vb: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Sorted union of two index sets and the sums of their values along ``axis``."""
    index, where = torch.cat([a, b]).unique(sorted=True, return_inverse=True)
    shape = list(va.shape)
    shape[axis] = len(index)
    values = torch.zeros(shape, dtype=va.dtype, device=va.device)
    return index, values.index_add(axis, where, torch.cat([va, vb.to(va.dtype)], axis))


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(Delta):
    """Δ[…, :, index] = values: (…, out, k); index: (k,) int64, distinct."""

    index: Tensor
    values: Tensor
    in_features: int
    kind: ClassVar[str] = "columns"
    indices: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        if self.values.shape[-1] != len(self.index):
            raise OptionError(
                f"{len(self.index)} column indices for values of {tuple(self.values.shape)}; the last axis is the columns'."
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-1], self.in_features))

    @property
    def exact_rank(self) -> int:
        return len(self.index)

    def _exact(self) -> LowRank:
        A = torch.zeros(len(self.index), self.in_features, dtype=self.values.dtype, device=self.values.device)
        A = A.scatter(1, self.index[:, None], 1.0)
        return LowRank(A.expand(*self.values.shape[:-2], *A.shape), self.values)

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        kept = op.columns(x, self.index) if self.values.dim() == 2 else None
        return op.linear(x, self.dense()) if kept is None else op.linear(kept, self.values)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device).index_copy(-1, self.index, self.values)

    def scaled(self, c: float | Tensor) -> Columns:
        return dataclasses.replace(self, values=self.values * c)

    def transposed(self) -> Rows:
        return Rows(self.index, self.values.mT, self.in_features)

    def _join(self, other: Delta) -> Delta | None:
        if not isinstance(other, Columns):
            return None
        index, values = _union(self.index, self.values, other.index, other.values, -1)
        return Columns(index, values, self.in_features)


@dataclasses.dataclass(frozen=True, eq=False)
class Rows(Delta):
    """Δ[…, index, :] = values: (…, k, in)."""

    index: Tensor
    values: Tensor
    out_features: int
    kind: ClassVar[str] = "rows"
    indices: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        if self.values.shape[-2] != len(self.index):
            raise OptionError(
                f"{len(self.index)} row indices for values of {tuple(self.values.shape)}; the last axis but one is the rows'."
            )

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.values.shape[:-2], self.out_features, self.values.shape[-1]))

    @property
    def exact_rank(self) -> int:
        return len(self.index)

    def _exact(self) -> LowRank:
        return self.transposed()._exact().transposed()

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return torch.zeros(self.shape, dtype=self.values.dtype, device=self.values.device).index_copy(-2, self.index, self.values)

    def scaled(self, c: float | Tensor) -> Rows:
        return dataclasses.replace(self, values=self.values * c)

    def transposed(self) -> Columns:
        return Columns(self.index, self.values.mT, self.out_features)

    def _join(self, other: Delta) -> Delta | None:
        if not isinstance(other, Rows):
            return None
        index, values = _union(self.index, self.values, other.index, other.values, -2)
        return Rows(index, values, self.out_features)


@dataclasses.dataclass(frozen=True, eq=False)
class Entries(Delta):
    """Δ.flatten()[index] = values; index: (k,) int64, distinct, into out·in (leading axes included)."""

    index: Tensor
    values: Tensor
    size: tuple[int, ...]
    kind: ClassVar[str] = "entries"
    indices: ClassVar[tuple[str, ...]] = ("index",)

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))
        if self.index.shape != self.values.shape:
            raise OptionError(f"{len(self.index)} entry indices for {len(self.values)} values; give one each.")

    @property
    def shape(self) -> torch.Size:
        return torch.Size(self.size)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        flat = torch.zeros(self.shape.numel(), dtype=self.values.dtype, device=self.values.device)
        return flat.index_copy(0, self.index, self.values).view(self.shape)

    def scaled(self, c: float | Tensor) -> Entries:
        return dataclasses.replace(self, values=self.values * c)

    def _join(self, other: Delta) -> Delta | None:
        if not isinstance(other, Entries):
            return None
        index, values = _union(self.index, self.values, other.index, other.values, 0)
        return Entries(index, values, self.size)
