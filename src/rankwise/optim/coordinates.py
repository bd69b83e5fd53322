"""Run a transform under a change of variables, or multiply gradients from both sides (preconditioning)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.base import PART, Context, GradTransform, Param, State, work_dtype

Params = Mapping[str, Param]
Factor = Callable[[Param, Context], "Tensor | None"]
To = Callable[[Tensor, Tensor], "dict[str, tuple[Tensor, Tensor]]"]
Back = Callable[[Tensor, "dict[str, Tensor]"], Tensor]


class TwoSided(GradTransform):
    """U = L·G·R with L out×out and R in×in from ``left(param, ctx)`` and ``right(param, ctx)``; None is I.

    Tensors with fewer than two axes pass through.
    """

    reads_params = True

    def __init__(self, left: Factor, right: Factor) -> None:
        self.left, self.right = left, right

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        out = dict(grads)
        for name, g in grads.items():
            if g.ndim >= 2:
                left, right = self.left(params[name], ctx), self.right(params[name], ctx)
                g = g if left is None else left.to(g.dtype) @ g
                out[name] = g if right is None else g @ right.to(g.dtype)
        return out


class Reparam(GradTransform):
    """Run ``inner`` on other variables of the same tensor and bring its step back.

    ``to(value, grad)`` gives {coordinate: (value, gradient)}; ``back(value, {coordinate: update})`` gives the
    update of the tensor itself.  The inner transform sees each coordinate as a parameter ``name::coordinate``.
    """

    reads_params = True

    def __init__(self, to: To, back: Back, inner: GradTransform) -> None:
        self.to, self.back, self.inner = to, back, inner

    def _coordinates(self, p: Param, g: Tensor | None) -> dict[str, tuple[Param, Tensor]]:
        value = p.tensor.detach().to(work_dtype(p.tensor))
        parts = self.to(value, torch.zeros_like(value) if g is None else g)
        return {
            f"{p.name}{PART}{k}": (Param(f"{p.name}{PART}{k}", v, p.site, p.role, p.scale, None, p.decay), d)
            for k, (v, d) in parts.items()
        }

    def init(self, params: Params) -> State:
        views = {n: v for p in params.values() for n, (v, _) in self._coordinates(p, None).items()}
        return {"/inner": self.inner.init(views)}

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        seen = {name: self._coordinates(params[name], g) for name, g in grads.items()}
        flat = {n: pair for parts in seen.values() for n, pair in parts.items()}
        inner = self.inner.update({n: d for n, (_, d) in flat.items()}, state["/inner"], {n: v for n, (v, _) in flat.items()}, ctx)
        out = {}
        for name, parts in seen.items():
            value = params[name].tensor.detach().to(grads[name].dtype)
            out[name] = self.back(value, {n[len(name) + len(PART) :]: inner[n] for n in parts})
        return out

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        if kept is not None and policy != "keep":
            raise OptionError(f"{name!r} is trained in other coordinates; resync it with kept=None.")
        for part in _leaves(state, name):
            self.inner.resync(state["/inner"], part, None, policy)


def _leaves(tree: State, name: str) -> set[str]:
    """The coordinates ``name::…`` that the tree holds."""
    out: set[str] = set()
    for key, value in tree.items():
        if key.startswith(name + PART):
            out.add(key)
        elif isinstance(value, dict):
            out |= _leaves(value, name)
    return out


def two_sided(left: Factor, right: Factor) -> TwoSided:
    """U = L·G·R; see :class:`TwoSided`."""
    return TwoSided(left, right)


def reparam(to: To, back: Back, inner: GradTransform) -> Reparam:
    """``inner`` in other variables; see :class:`Reparam`."""
    return Reparam(to, back, inner)
