"""ΔW that is zero but for a few columns, rows or entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

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
    both = torch.cat([va, vb], axis)
    return index, torch.zeros(shape, dtype=both.dtype, device=both.device).index_add(axis, where, both)


class _Indexed(Delta):
    """Base of the three kinds: indices read from a file are checked (distinct, inside the weight)."""

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
        value = super().from_tensors(tensors, meta)
        index, span = value.index, value._span()  # type: ignore[attr-defined]
        if index.is_floating_point() or index.dim() != 1:
            raise OptionError(f"Indices are a list of integers; these are {tuple(index.shape)} of {index.dtype}.")
        if len(index) and not (int(index.min()) >= 0 and int(index.max()) < span and len(index.unique()) == len(index)):
            raise OptionError(f"{len(index)} indices of {cls.kind} must be distinct and lie in 0…{span - 1}.")
        return value


@dataclasses.dataclass(frozen=True, eq=False)
class Columns(_Indexed):
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

    def _span(self) -> int:
        return self.in_features

    @property
    def exact_rank(self) -> int:
        return len(self.index)

    def _exact(self) -> LowRank:
        A = torch.zeros(len(self.index), self.in_features, dtype=self.values.dtype, device=self.values.device)
        A = A.scatter(1, self.index[:, None], 1.0)
        return LowRank(A.expand(*self.values.shape[:-2], *A.shape), self.values)

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        kept = op.columns(x, self.index)
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
class Rows(_Indexed):
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

    def _span(self) -> int:
        return self.out_features

    @property
    def exact_rank(self) -> int:
        return len(self.index)

    def _exact(self) -> LowRank:
        return self.transposed()._exact().transposed()

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if not op.factors:
            return op.linear(x, self.dense())
        h, axis = op.linear(x, self.values), op.channel_axis
        shape = list(h.shape)
        shape[axis] = self.out_features
        return h.new_zeros(shape).index_copy(axis, self.index, h)

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
class Entries(_Indexed):
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

    def _span(self) -> int:
        return self.shape.numel()

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

    def _inner(self, other: Delta) -> Tensor | None:
        """Only at the stored entries: those that both store, or the products of A's and B's rows there."""
        mine = self.values.double()
        if isinstance(other, Entries):
            found, at = torch.cat([self.index, other.index]).unique(return_inverse=True)
            a, b = (mine.new_zeros(len(found)) for _ in range(2))
            k = len(self.index)
            return a.index_copy(0, at[:k], mine) @ b.index_copy(0, at[k:], other.values.double())
        low = other._exact()
        if low is None:
            return None
        A, B = low._wide().factors()
        out, inp = self.shape[-2:]
        row, column = self.index // inp, self.index % inp
        left, right = B.reshape(-1, B.shape[-1]), A.mT.reshape(-1, A.shape[-2])  # (stack·out)×r, (stack·in)×r
        return ((left[row] * right[row // out * inp + column]).sum(-1) * mine).sum()
