"""ΔW as a full out×in matrix, and a sum of different kinds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from rankwise.delta.base import Delta, rebuild
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.errors import OptionError

if TYPE_CHECKING:
    from rankwise.delta.lowrank import LowRank


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Delta):
    """Δ = value: (…, out, in)."""

    value: Tensor
    kind: ClassVar[str] = "dense"

    @property
    def shape(self) -> torch.Size:
        return self.value.shape

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return self.value

    def scaled(self, c: float | Tensor) -> Dense:
        return Dense(self.value * c)

    def transposed(self) -> Dense:
        return Dense(self.value.mT)

    def _join(self, other: Delta) -> Delta | None:
        return None if other.needs_weight or not other.constant else Dense(self.value + other.dense())


def _joined(parts: list[Delta]) -> list[Delta]:
    """The parts, each merged into an earlier one of its own kind where that kind can."""
    out: list[Delta] = []
    for p in parts:
        for i, q in enumerate(out):
            one = q._join(p) if type(q) is type(p) and q.shape == p.shape else None
            if one is not None:
                out[i] = one
                break
        else:
            out.append(p)
    return out


@dataclasses.dataclass(frozen=True, eq=False)
class Sum(Delta):
    """Σ parts; nested sums are flattened, parts of one kind joined; exact low rank where every part has one."""

    parts: tuple[Delta, ...]
    kind: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        flat: list[Delta] = []
        for p in self.parts:
            flat += p.parts if isinstance(p, Sum) else [p]
        known = next((p.shape for p in flat if 0 not in p.shape), None)
        flat = _joined([p if known is None else p._sized(known) for p in flat])
        if not flat or len({p.shape for p in flat}) > 1:
            raise OptionError(f"A sum needs parts of one shape; it got {[tuple(p.shape) for p in flat]}.")
        object.__setattr__(self, "parts", tuple(flat))
        object.__setattr__(self, "needs_weight", any(p.needs_weight for p in flat))
        object.__setattr__(self, "needs_output", any(p.needs_output for p in flat))

    @property
    def shape(self) -> torch.Size:
        return self.parts[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        return self.parts[0].device

    @property
    def constant(self) -> bool:
        return all(p.constant for p in self.parts)

    @property
    def exact_rank(self) -> int | None:
        ranks = [p.exact_rank for p in self.parts]
        return None if None in ranks else sum(r for r in ranks if r is not None)

    def _exact(self) -> LowRank | None:
        lows = [p._exact() for p in self.parts]
        if any(low is None for low in lows):
            return None
        total = lows[0]
        for low in lows[1:]:
            total = total + low  # type: ignore[operator,assignment]
        return total

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        total = self.parts[0].apply(x, y, op=op, weight=weight)
        for p in self.parts[1:]:
            total = total + p.apply(x, y, op=op, weight=weight)
        return total

    def dense(self, weight: Tensor | None = None) -> Tensor:
        total = self.parts[0].dense(weight)
        for p in self.parts[1:]:
            total = total + p.dense(weight)
        return total

    def scaled(self, c: float | Tensor) -> Sum:
        return Sum(tuple(p.scaled(c) for p in self.parts))

    def transposed(self) -> Sum:
        return Sum(tuple(p.transposed() for p in self.parts))

    def _join(self, other: Delta) -> Delta | None:
        return Sum((*self.parts, other))

    def tensors(self) -> dict[str, Tensor]:
        return {f"{i}.{n}": t for i, p in enumerate(self.parts) for n, t in p.tensors().items()}

    def meta(self) -> dict[str, Any]:
        return {"parts": [{"kind": p.kind, "meta": p.meta()} for p in self.parts]}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
        def mine(i: int) -> dict[str, Tensor]:
            return {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == str(i)}

        return cls(tuple(rebuild(p["kind"], mine(i), p["meta"]) for i, p in enumerate(meta["parts"])))

    def map(self, fn: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(self, parts=tuple(p.map(fn) for p in self.parts))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Self:
        return dataclasses.replace(self, parts=tuple(p.to(dtype, device) for p in self.parts))

    def numel(self, *, indices: bool = False) -> int:
        return sum(p.numel(indices=indices) for p in self.parts)
