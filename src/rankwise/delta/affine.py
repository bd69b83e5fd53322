"""Kinds of ΔW that are computed from the base weight W: gains of rows or columns, block-affine maps, a new weight."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.errors import OptionError


def _needed(weight: Tensor | None, kind: str) -> Tensor:
    if weight is None:
        raise OptionError(f"A {kind} change is computed from the base weight; give weight=W (out×in).")
    return weight


@dataclasses.dataclass(frozen=True, eq=False)
class Scale(Delta):
    """Δ = (diag(gain) − I)·W for ``axis="out"`` (gain: (…, out)), W·(diag(gain) − I) for ``"in"`` (gain: (…, in)).

    ``other`` is the size of the axis that is not scaled, 0 where it is not known; ``+`` and ``add_into`` learn it from the rest.
    """

    gain: Tensor
    axis: Literal["out", "in"] = "out"
    other: int = 0
    kind: ClassVar[str] = "scale"
    needs_weight: bool = dataclasses.field(default=True, init=False, repr=False)
    needs_output: bool = dataclasses.field(default=True, init=False, repr=False)

    @property
    def shape(self) -> torch.Size:
        n = self.gain.shape[-1]
        return torch.Size((*self.gain.shape[:-1], *((n, self.other) if self.axis == "out" else (self.other, n))))

    def _sized(self, shape: torch.Size) -> Scale:
        return self if self.other else dataclasses.replace(self, other=shape[-1] if self.axis == "out" else shape[-2])

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if self.axis == "out" and y is not None and self.gain.dim() == 1:
            return op.scale_out(y, self.gain - 1)
        return op.linear(x, self.dense(weight))

    def dense(self, weight: Tensor | None = None) -> Tensor:
        W = _needed(weight, "scale")
        return (self.gain - 1)[..., :, None] * W if self.axis == "out" else W * (self.gain - 1)[..., None, :]

    def scaled(self, c: float | Tensor) -> Scale:
        return dataclasses.replace(self, gain=1 + (self.gain - 1) * c)

    def transposed(self) -> Scale:
        return dataclasses.replace(self, axis="in" if self.axis == "out" else "out")

    def _join(self, other: Delta) -> Delta | None:
        same = isinstance(other, Scale) and other.axis == self.axis
        return dataclasses.replace(self, gain=self.gain + other.gain - 1) if same else None  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True, eq=False)
class BlockAffine(Delta):
    """Block row a of W in blocks of r×r: Δ_ab = W_ab·B_a + B_a, times ``strength``; blocks: (…, out/r, r, r) (Bone, "Bat")."""

    blocks: Tensor
    in_features: int
    strength: float | Tensor = 1.0
    kind: ClassVar[str] = "block_affine"
    needs_weight: bool = dataclasses.field(default=True, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.blocks.dim() < 3 or self.blocks.shape[-1] != self.blocks.shape[-2]:
            raise OptionError(f"Blocks of {tuple(self.blocks.shape)}; they are (…, out/r, r, r), one square a block row.")
        if self.in_features % self.blocks.shape[-1]:
            raise OptionError(f"Blocks of {self.blocks.shape[-1]} do not divide {self.in_features} inputs.")

    @property
    def shape(self) -> torch.Size:
        *lead, n, r, _ = self.blocks.shape
        return torch.Size((*lead, n * r, self.in_features))

    def dense(self, weight: Tensor | None = None) -> Tensor:
        W = _needed(weight, "block-affine")
        dtype = torch.promote_types(W.dtype, self.dtype)
        n, r = self.blocks.shape[-3:-1]
        cut = W.to(dtype).reshape(*W.shape[:-2], n, r, self.in_features // r, r).transpose(-3, -2)
        blocks = self.blocks.to(dtype).unsqueeze(-3)
        return (cut @ blocks + blocks).transpose(-3, -2).reshape(self.shape) * self.strength

    def scaled(self, c: float | Tensor) -> BlockAffine:
        return dataclasses.replace(self, strength=self.strength * c)


@dataclasses.dataclass(frozen=True, eq=False)
class Replace(Delta):
    """Δ = strength·(new − W)."""

    new: Tensor
    strength: float | Tensor = 1.0
    kind: ClassVar[str] = "replace"
    needs_weight: bool = dataclasses.field(default=True, init=False, repr=False)

    @property
    def shape(self) -> torch.Size:
        return self.new.shape

    def dense(self, weight: Tensor | None = None) -> Tensor:
        return (self.new - _needed(weight, "replace")) * self.strength

    def scaled(self, c: float | Tensor) -> Replace:
        return dataclasses.replace(self, strength=self.strength * c)

    def transposed(self) -> Replace:
        return dataclasses.replace(self, new=self.new.mT)
