"""Run a transform on a low-rank projection of the gradient: for its step, or only for its norm ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.base import Context, GradTransform, Param, State, choose, work_dtype
from rankwise.optim.projectors import Projector, down, up

Params = Mapping[str, Param]


class _Projected(GradTransform):
    """Bases under "/projector", the inner transform's state of the small tensors under "/inner"."""

    def __init__(self, projector: Projector, inner: GradTransform) -> None:
        if inner.reads_params:
            raise OptionError(
                "The inner transform of a projection reads parameter values, which a subspace does not have; "
                "put weight decay after the projection, not inside."
            )
        self.projector, self.inner = projector, inner

    def _small(self, param: Param, side: str | None) -> Param:
        """A stand-in with the projected shape and no memory, from which the inner transform learns its shapes."""
        t = param.tensor
        shape = self.projector.small_shape(t.shape, side)
        tensor = torch.zeros((), dtype=work_dtype(t), device=t.device).expand(shape)
        axis = param.component_axis if side is None else None
        return Param(param.name, tensor, param.site, param.role, param.scale, axis, param.decay)

    def init(self, params: Params) -> State:
        bases = {name: self.projector.init(p) for name, p in params.items()}
        small = {name: self._small(p, bases[name]["side"]) for name, p in params.items()}
        return {"/projector": bases, "/inner": self.inner.init(small)}

    def _down(self, grads: dict[str, Tensor], state: State, ctx: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(small gradients, bases of the projected ones); renews the bases that are due."""
        small, bases = {}, {}
        for name, g in grads.items():
            s = state["/projector"][name]
            if s["side"] is None:
                small[name] = g
                continue
            if self.projector.due(s, ctx.step):
                self._refresh(name, g, s, state, ctx)
            bases[name] = self.projector.basis(g, s, ctx, name)
            small[name] = down(g, bases[name], s["side"])
        return small, bases

    def _refresh(self, name: str, g: Tensor, s: State, state: State, ctx: Context) -> None:
        first = s.get("basis") is None and not s.get("drawn")
        old = None if first or self.projector.moments != "rotate" else self.projector.basis(g, s, ctx, name)
        self.projector.refresh(g, s, ctx, name)
        if self.projector.moments == "zero" and not first:
            self.inner.resync(state["/inner"], name, None, "zero")
        if old is not None:
            new = self.projector.basis(g, s, ctx, name)
            self.inner.rotate(state["/inner"], name, lambda m: down(up(m, old, s["side"]), new, s["side"]))

    def _inner(self, small: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        views = {name: self._small(params[name], state["/projector"][name]["side"]) for name in small}
        return self.inner.update(small, state["/inner"], views, ctx)

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        s = state["/projector"].get(name)
        if s is not None and s["side"] is not None and kept is not None and policy != "keep":
            raise OptionError(f"{name!r} is trained in a subspace, whose moments have no components; resync it with kept=None.")
        self.inner.resync(state["/inner"], name, kept, policy)

    def rotate(self, state: State, name: str, change: Callable[[Tensor], Tensor]) -> None:
        raise OptionError("A projection inside a projection cannot rotate its moments; use moments='keep' or 'zero'.")


class InSubspace(_Projected):
    """U = scale · up(inner(down(G))).  A tensor that passes through takes the inner step as it is, unscaled."""

    def __init__(self, projector: Projector, inner: GradTransform, scale: float = 1.0) -> None:
        super().__init__(projector, inner)
        self.scale = float(scale)

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        small, bases = self._down(grads, state, ctx)
        updates = self._inner(small, state, params, ctx)
        for name, basis in bases.items():
            if name not in updates:
                continue  # the inner transform left it out
            updates[name] = up(updates[name], basis, state["/projector"][name]["side"]) * self.scale
        return updates


class RatioFromSubspace(_Projected):
    """U = f ⊙ G with f = ‖N_c‖ / (‖R_c‖ + 1e-8), N = inner(R), R = down(G).

    ``axis`` "channel": one f per channel, which lies along the larger side; "tensor": one f per matrix.
    """

    def __init__(self, projector: Projector, inner: GradTransform, axis: str = "channel") -> None:
        super().__init__(projector, inner)
        self.axis = choose("axis", axis, ("channel", "tensor"))

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        small, bases = self._down(grads, state, ctx)
        updates = self._inner(small, state, params, ctx)
        for name in bases:
            if name not in updates:
                continue
            over: int | tuple[int, int] = (-2, -1)
            if self.axis == "channel":
                over = -1 if state["/projector"][name]["side"] == "right" else -2
            n, r = (torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (updates[name], small[name]))
            updates[name] = grads[name] * (n / (r + 1e-8))
        return updates


def in_subspace(projector: Projector, inner: GradTransform, scale: float = 1.0) -> InSubspace:
    """``inner`` on the projected gradient, its step brought back; see :class:`InSubspace`."""
    return InSubspace(projector, inner, scale)


def ratio_from_subspace(projector: Projector, inner: GradTransform, axis: str = "channel") -> RatioFromSubspace:
    """The full gradient rescaled by norm ratios seen in a subspace; see :class:`RatioFromSubspace`."""
    return RatioFromSubspace(projector, inner, axis)
