"""Running averages of the gradient: Adam's two moments and momentum's one, with an age per component.

An *age* is the number of steps a moment has seen; it drives the bias correction.  It is one number while all
components of a tensor are equally old, and becomes a vector along the component axis when an allocation
restarts some of them (``resync``), so a grown or revived component is corrected as a new one is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import OptionError, TrainingError
from rankwise.optim.base import Context, GradTransform, Param, State, check_betas, work_dtype


class _Moments(GradTransform):
    """State {name: {each key of ``keys``: like the tensor, "age", "axis"}} and its resync."""

    keys: tuple[str, ...]
    linear: tuple[str, ...]

    def init(self, params: Mapping[str, Param]) -> State:
        return {name: self._fresh(p) for name, p in params.items()}

    def _fresh(self, p: Param) -> dict[str, Any]:
        zeros = {k: torch.zeros_like(p.tensor, dtype=work_dtype(p.tensor), requires_grad=False) for k in self.keys}
        return {**zeros, "age": 0, "axis": p.component_axis}

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        s = state.get(name)
        if s is None or policy == "keep":
            return
        if policy == "zero" and kept is None:
            s.update({k: torch.zeros_like(s[k]) for k in self.keys}, age=0)
            return
        if s["axis"] is None or kept is None:
            raise OptionError(
                f"resync({name!r}, policy={policy!r}) needs the kept components of a tensor that has a component "
                "axis; for a whole tensor use policy 'zero' or 'drop'."
            )
        _reindex(s, self.keys, kept, policy)

    def rotate(self, state: State, name: str, change: Callable[[Tensor], Tensor]) -> None:
        for key in self.linear:
            state[name][key] = change(state[name][key])


def _reindex(s: dict[str, Any], keys: tuple[str, ...], kept: Tensor, policy: str) -> None:
    """``zero``: restart the components not in ``kept``.  ``slice``: component i is the old kept[i], or new (−1)."""
    axis, old = s["axis"], s[keys[0]]
    count = old.shape[axis]
    kept = kept.to(device=old.device, dtype=torch.long).reshape(-1)
    if kept.numel() and (int(kept.max()) >= count or int(kept.min()) < (-1 if policy == "slice" else 0)):
        raise OptionError(f"Kept components {kept.tolist()} are outside the {count} that the state holds.")
    age = s["age"] if isinstance(s["age"], Tensor) else torch.full((count,), s["age"], device=old.device)
    source = kept
    if policy == "zero":
        source = torch.full((count,), -1, dtype=torch.long, device=old.device)
        source[kept] = kept
    live = source >= 0
    for key in keys:
        taken = s[key].index_select(axis, source.clamp(min=0))
        s[key] = torch.where(_along(live, axis, taken), taken, torch.zeros_like(taken))
    age = torch.where(live, age.index_select(0, source.clamp(min=0)), torch.zeros_like(source))
    same = age.numel() == 0 or bool((age == age[0]).all())
    s["age"] = (int(age[0]) if age.numel() else 0) if same else age


def _along(vector: Tensor, axis: int, like: Tensor) -> Tensor:
    shape = [1] * like.ndim
    shape[axis] = -1
    return vector.reshape(shape)


class ScaleByAdam(_Moments):
    """u = m̂ / (√v̂ + ε), m and v the running means of g and g² (Kingma & Ba 2015).

    State: 2 elements per element, fp32 (fp64 for fp64).

    Args:
        b1, b2: β1 and β2, in [0, 1).
        eps: ε.
        eps_hat: add ε before the bias correction, u = (m/(√v + ε))·√(1−β2ᵗ)/(1−β1ᵗ), as GaLore's and older libraries' code does.
    """

    keys = ("mu", "nu")
    linear = ("mu",)

    def __init__(self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_hat: bool = False) -> None:
        self.b1, self.b2 = check_betas((b1, b2), eps)
        self.eps, self.eps_hat = float(eps), eps_hat

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        return {name: self._one(name, g, state[name]) for name, g in grads.items()}

    def _one(self, name: str, g: Tensor, s: dict[str, Any]) -> Tensor:
        if s["mu"].shape != g.shape:
            raise resized(name, s["mu"], g)
        s["age"] = s["age"] + 1
        mu, nu = s["mu"], s["nu"]
        mu.lerp_(g, 1.0 - self.b1)
        nu.mul_(self.b2).addcmul_(g, g, value=1.0 - self.b2)
        c1, c2 = _correction(self.b1, s, mu), _correction(self.b2, s, mu)
        if self.eps_hat:
            return mu / nu.sqrt().add_(self.eps) * (c2**0.5 / c1)
        return mu / (nu.sqrt() / c2**0.5).add_(self.eps).mul_(c1)


def _correction(beta: float, s: dict[str, Any], like: Tensor) -> Any:
    """1 − βᵗ, a number, or a tensor that broadcasts along the component axis."""
    age = s["age"]
    if not isinstance(age, Tensor):
        return 1.0 - beta**age
    if beta == 0.0:
        return torch.ones((), dtype=like.dtype, device=like.device)
    return _along(-torch.expm1(age.to(like.dtype) * math.log(beta)), s["axis"], like)


def resized(name: str, moment: Tensor, g: Tensor) -> TrainingError:
    """The error for a tensor whose shape changed without a :meth:`resync`."""
    return TrainingError(
        f"{name!r} has shape {tuple(g.shape)} but its optimiser state has {tuple(moment.shape)}; "
        "call optimizer.resync(name, kept, 'slice') when a budget resizes a tensor."
    )


class Trace(_Moments):
    """Momentum: buf ← decay·buf + g; u = buf, or g + decay·buf with ``nesterov``.  As torch's SGD without dampening."""

    keys = ("trace",)
    linear = ("trace",)

    def __init__(self, decay: float = 0.9, nesterov: bool = False) -> None:
        if not 0.0 <= decay < 1.0:
            raise OptionError(f"The momentum is {decay!r}; expected a number in [0, 1).")
        self.decay, self.nesterov = float(decay), nesterov

    def update(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> dict[str, Tensor]:
        out = {}
        for name, g in grads.items():
            s = state[name]
            if s["trace"].shape != g.shape:
                raise resized(name, s["trace"], g)
            s["age"] = s["age"] + 1
            s["trace"].mul_(self.decay).add_(g)
            out[name] = g + self.decay * s["trace"] if self.nesterov else s["trace"].clone()
        return out


def scale_by_adam(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, eps_hat: bool = False) -> ScaleByAdam:
    """Adam's direction, without rate and sign; see :class:`ScaleByAdam`.

    Args:
        b1, b2, eps, eps_hat: as there.
    """
    return ScaleByAdam(b1, b2, eps, eps_hat)


def trace(decay: float = 0.9, nesterov: bool = False) -> Trace:
    """Momentum; see :class:`Trace`."""
    return Trace(decay, nesterov)
