"""A low-rank change whose components a decision gates for each row: no single weight, unless the decision is constant."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.delta.lowrank import LowRank
from rankwise.errors import MergeError


@dataclasses.dataclass(frozen=True, eq=False)
class Gated(Delta):
    """Δy_n = B·(g_n ⊙ A·x_n), g from ``decision`` (anything with ``gate() -> (N, r) or (r,)`` and ``constant``), or x decides."""

    inner_value: LowRank
    decision: Any = None
    kind: ClassVar[str] = "gated"

    @property
    def shape(self) -> torch.Size:
        return self.inner_value.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.inner_value.dtype

    @property
    def constant(self) -> bool:
        return self.decision is not None and bool(self.decision.constant)

    @property
    def exact_rank(self) -> int | None:
        return self.inner_value.r if self.constant else None

    def _exact(self) -> LowRank | None:
        if not self.constant:
            return None
        A, B = self.inner_value.factors()
        return LowRank(A, B * self.decision.gate())

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if self.decision is None:
            raise MergeError("This change depends on x through a router; call the module that holds the router.")
        A, B = self.inner_value.factors()
        return op.pointwise(op.linear(x, A) * self.decision.gate().to(x.dtype), B)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        exact = self._exact()
        if exact is None:
            raise MergeError(
                "This change depends on x, so it is no single weight; collapse() it to the best constant one, or export its experts."
            )
        return exact.dense()

    def scaled(self, c: float | Tensor) -> Gated:
        return dataclasses.replace(self, inner_value=self.inner_value.scaled(c))

    def norm(self) -> Tensor:
        """‖·‖ of the ungated change."""
        return self.inner_value.norm()

    def tensors(self) -> dict[str, Tensor]:
        return self.inner_value.tensors()

    def map(self, fn: Any) -> Gated:  # type: ignore[override]
        return dataclasses.replace(self, inner_value=self.inner_value.map(fn))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Gated:  # type: ignore[override]
        return dataclasses.replace(self, inner_value=self.inner_value.to(dtype, device))

    def collapse(self, second: Tensor, cross: Tensor) -> tuple[LowRank, Tensor]:
        """The constant core that fits best: M = G·S⁺ with S = E[z·zᵀ], G = E[(g⊙z)·zᵀ], both r×r; ΔW ≈ B·M·A.

        Returns the value and what is left of E‖(g⊙z)‖² unexplained is the caller's to report from its own moments.
        """
        M = cross.double() @ torch.linalg.pinv(second.double(), hermitian=True)
        A, B = self.inner_value.factors()
        return LowRank(A, (B.double() @ M).to(B.dtype)), M
