"""Transforms without moments: learning rate, weight decay, constants, clipping."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.base import Context, GradTransform, Param, State, choose


class ScaleByLr(GradTransform):
    """u = −η·g with η the rate of the parameter's group: the transform that brings the minus sign."""

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        return {name: g * -ctx.lr_of(name) for name, g in grads.items()}


class DecoupledDecay(GradTransform):
    """Weight decay beside the step (Loshchilov & Hutter 2019); comes after ``scale_by_lr`` in a chain.

    With u the step and λ the group's decay: ``before`` gives u − η·λ·p (AdamW: decay, then step), ``after``
    gives u − η·λ·(p + u) (GaLore: step, then decay).
    """

    reads_params = True

    def __init__(self, order: str = "before") -> None:
        self.order = choose("order", order, ("before", "after"))

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        out = dict(grads)
        for name, u in grads.items():
            rate = ctx.lr_of(name) * ctx.decay_of(name)
            if rate:
                p = params[name].tensor.to(u.dtype)
                out[name] = u - rate * (p + u if self.order == "after" else p)
        return out


class ScaleBy(GradTransform):
    """u = c·g."""

    def __init__(self, factor: float) -> None:
        self.factor = float(factor)

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        return {name: g * self.factor for name, g in grads.items()}


class Clip(GradTransform):
    """Bound the 2-norm: of all gradients together (``global``), or of each tensor (``tensor``).

    The norms are summed by name order in exact arithmetic, so the order of parameters does not matter.
    """

    def __init__(self, max_norm: float, over: str = "global") -> None:
        if not max_norm > 0:
            raise OptionError(f"max_norm is {max_norm!r}; expected a number > 0.")
        self.max_norm, self.over = float(max_norm), choose("over", over, ("global", "tensor"))

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        norms = {name: float(g.norm()) for name, g in grads.items()}
        if self.over == "global":
            total = math.sqrt(math.fsum(n * n for n in norms.values()))
            norms = dict.fromkeys(norms, total)
        return {name: g * min(1.0, self.max_norm / n) if (n := norms[name]) else g for name, g in grads.items()}


def scale_by_lr() -> ScaleByLr:
    """u = −η·g; see :class:`ScaleByLr`."""
    return ScaleByLr()


def decoupled_decay(order: str = "before") -> DecoupledDecay:
    """Weight decay beside the step; see :class:`DecoupledDecay`."""
    return DecoupledDecay(order)


def scale(factor: float) -> ScaleBy:
    """u = c·g."""
    return ScaleBy(factor)


def clip(max_norm: float, over: str = "global") -> Clip:
    """Bound the 2-norm; see :class:`Clip`."""
    return Clip(max_norm, over)
