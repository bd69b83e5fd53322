"""Low-rank projections of gradients: from which side, when the basis is renewed, what is stored.

A projector shrinks the *smaller* side of a matrix (out×in, or a stack …×out×in) to ``rank``: with out ≥ in from
the right, R = G·Qᵀ (out×r) with Q r×in; else from the left, R = Pᵀ·G (r×in) with P out×r.  The side is decided
once from the parameter's shape and stored, never guessed again from a small tensor.  A tensor whose smaller
side is ≤ rank, or that is not 2-D or 3-D, passes through unprojected (side None).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.base import Context, Param, choose, refuse_sharded, work_dtype


class Projector:
    """Base: ``rank``, a renewal every ``every`` steps (at t = 1, 1 + every, …), what happens to moments then.

    ``moments``: "keep" leaves them as they are in the old basis (as the authors of GaLore do), "rotate" maps
    the first moment to the new basis (m ← m·Q_old·Q_newᵀ; the second is kept), "zero" starts again.
    """

    def __init__(self, rank: int, every: int = 200, moments: str = "keep") -> None:
        if rank < 1 or every < 1:
            raise OptionError(f"A projector has rank ≥ 1 and every ≥ 1; got rank {rank} and every {every}.")
        self.rank, self.every = int(rank), int(every)
        self.moments = choose("moments", moments, ("keep", "rotate", "zero"))

    def side(self, shape: torch.Size) -> str | None:
        """ "right", "left", or None to pass through."""
        if len(shape) not in (2, 3) or min(shape[-2:]) <= self.rank:
            return None
        return "right" if shape[-2] >= shape[-1] else "left"

    def small_shape(self, shape: torch.Size, side: str | None) -> tuple[int, ...]:
        """The shape of the projected gradient."""
        if side is None:
            return tuple(shape)
        return (*shape[:-1], self.rank) if side == "right" else (*shape[:-2], self.rank, shape[-1])

    def init(self, param: Param) -> dict[str, Any]:
        """The stored state of one parameter, before its first gradient."""
        return {"side": self.side(param.tensor.shape), "basis": None}

    def due(self, state: dict[str, Any], step: int) -> bool:
        """Whether the basis is to be renewed from this step's gradient."""
        return state["basis"] is None or (step - 1) % self.every == 0

    def refresh(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> None:
        """Renew the basis.

        Args:
            g: the parameter's gradient, (…, out, in).
            state: what :meth:`init` returned, changed in place.
            ctx: step and seed.
            name: the parameter.
        """
        raise NotImplementedError

    def basis(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> Tensor:
        """The current basis, r×in (right) or out×r (left).

        Args:
            g: the parameter's gradient, for shape, dtype and device.
            state, ctx, name: as in :meth:`refresh`.
        """
        return state["basis"]


def down(g: Tensor, basis: Tensor, side: str) -> Tensor:
    """The small tensor of ``g``."""
    return g @ basis.mT if side == "right" else basis.mT @ g


def up(small: Tensor, basis: Tensor, side: str) -> Tensor:
    """A small tensor back at full size."""
    return small @ basis if side == "right" else basis @ small


class SvdProjector(Projector):
    """The leading singular vectors of the gradient at hand, solved in fp32 (fp64 for fp64).  Stores r·min(out,in)."""

    def init(self, param: Param) -> dict[str, Any]:
        refuse_sharded(param, "A projection by SVD")
        return super().init(param)

    def refresh(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> None:
        u, _, vh = torch.linalg.svd(g.to(work_dtype(g)), full_matrices=False)
        basis = vh[..., : self.rank, :] if state["side"] == "right" else u[..., : self.rank]
        state["basis"] = basis.to(g.dtype).contiguous()


class RandomProjector(Projector):
    """Gaussian with variance 1/r, so E‖R‖² = ‖G‖².  Stores only the step of its draw: the seed makes the rest."""

    def init(self, param: Param) -> dict[str, Any]:
        refuse_sharded(param, "A random projection")
        return {"side": self.side(param.tensor.shape), "drawn": 0}

    def due(self, state: dict[str, Any], step: int) -> bool:
        return state["drawn"] == 0 or (step - 1) % self.every == 0

    def refresh(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> None:
        state["drawn"] = ctx.step

    def basis(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> Tensor:
        right = state["side"] == "right"
        shape = (*g.shape[:-2], self.rank, g.shape[-1]) if right else (*g.shape[:-1], self.rank)
        draw = torch.randn(shape, generator=ctx.rng(f"projector/{state['drawn']}", name), dtype=torch.float64)
        return (draw / self.rank**0.5).to(dtype=g.dtype, device=g.device)


class IdentityProjector(Projector):
    """Projects nothing away: rank = the smaller side, basis = I.  For tests and as a null choice."""

    def __init__(self) -> None:
        super().__init__(1)

    def side(self, shape: torch.Size) -> str | None:
        return None if len(shape) not in (2, 3) else "right"

    def small_shape(self, shape: torch.Size, side: str | None) -> tuple[int, ...]:
        return tuple(shape)

    def refresh(self, g: Tensor, state: dict[str, Any], ctx: Context, name: str) -> None:
        state["basis"] = torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)
