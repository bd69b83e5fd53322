"""A low-rank ΔW whose rank-one components a router gates for each input row; a single weight only where the gate is constant."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.delta.base import Delta
from rankwise.delta.geometry import LINEAR, Geometry
from rankwise.delta.lowrank import LowRank
from rankwise.errors import MergeError


@dataclasses.dataclass(frozen=True, eq=False)
class ConstantGate:
    """A gate that does not depend on x: one weight per component, (…, r); what a constant gate is loaded as."""

    weight: Tensor
    constant: ClassVar[bool] = True

    def dense(self, n: int | None = None, u: int | None = None) -> Tensor:
        return self.weight

    def gate(self) -> Tensor:
        return self.weight


@dataclasses.dataclass(frozen=True, eq=False)
class Gated(Delta):
    """Δy_n = B·(g_n ⊙ A·x_n) with gates g from ``decision``; None: a router computes them from x in its module's forward.

    ``decision`` has ``constant`` and ``dense(N, U)``, or ``gate()`` where one weight gates a group of components: (r,) or (N, r).
    Only a constant gate is saved; one that depends on x belongs to its batch.
    """

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
        return LowRank(A, B * self._gate().to(B)[..., None, :])

    def _gate(self) -> Tensor:
        d = self.decision
        return d.gate() if hasattr(d, "gate") else d.dense(None, self.inner_value.r)

    def apply(self, x: Tensor, y: Tensor | None = None, *, op: Geometry = LINEAR, weight: Tensor | None = None) -> Tensor:
        if self.decision is None:
            raise MergeError("This change depends on x through a router; call the module that holds the router.")
        exact = self._exact()
        if exact is not None:
            return exact.apply(x, y, op=op)
        if op.channel_axis != -1:
            raise MergeError(
                "A gate for each row of a convolution has no rows to act on here; call the module that holds the router."
            )
        A, B = self.inner_value.factors()
        h = op.linear(x, A)
        return op.pointwise(h * self._gate().to(h.dtype), B)

    def dense(self, weight: Tensor | None = None) -> Tensor:
        exact = self._exact()
        if exact is None:
            raise MergeError(
                "This change depends on x, so it is no single weight; collapse() it to the best constant one, or export its experts."
            )
        return exact.dense()

    def scaled(self, c: float | Tensor) -> Gated:
        return dataclasses.replace(self, inner_value=self.inner_value.scaled(c))

    def to_lowrank(
        self, rank: int | None = None, energy: float | None = None, weight: Tensor | None = None
    ) -> tuple[LowRank, float]:
        if not self.constant:
            self.dense()  # says what to do instead
        return super().to_lowrank(rank, energy, weight)

    def norm(self, weight: Tensor | None = None) -> Tensor:
        """‖ΔW‖ under a constant gate; else of the ungated B·A."""
        exact = self._exact()
        return self.inner_value.norm() if exact is None else exact.norm()

    def tensors(self) -> dict[str, Tensor]:
        gate = {"gate": self._gate()} if self.constant else {}
        return {**self.inner_value.tensors(), **gate}

    def meta(self) -> dict[str, Any]:
        return {"inner_value": self.inner_value.meta()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> Delta:
        pair = {n: t for n, t in tensors.items() if n != "gate"}
        decision = ConstantGate(tensors["gate"]) if "gate" in tensors else None
        return cls(LowRank(**{**meta["inner_value"], **pair}), decision)

    def map(self, fn: Any) -> Gated:  # type: ignore[override]
        return dataclasses.replace(self, inner_value=self.inner_value.map(fn))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Gated:  # type: ignore[override]
        return dataclasses.replace(self, inner_value=self.inner_value.to(dtype, device))

    def collapse(self, second: Tensor, cross: Tensor, gated: Tensor | None = None) -> tuple[LowRank, Tensor | None]:
        """The best constant approximation ΔW ≈ B·M·A with z = A·x and M = G·S⁺, and its error E‖B·(g⊙z − M·z)‖².

        Exact where the gate is constant.  The error needs the third moment and is None without it.

        Args:
            second: S = E[z·zᵀ], r×r.
            cross: G = E[(g⊙z)·zᵀ], r×r.
            gated: H = E[(g⊙z)·(g⊙z)ᵀ], r×r.
        """
        S, G = second.double(), cross.double()
        M = G @ torch.linalg.pinv(S, hermitian=True)
        A, B = self.inner_value.factors()
        wide, residual = self.inner_value._wide().factors()[1], None
        if gated is not None:
            left = gated.double() - M @ G.mT - G @ M.mT + M @ S @ M.mT
            residual = ((wide.mT @ wide) * left).sum().clamp_min(0)
        return LowRank(A, (wide @ M).to(B.dtype)), residual
