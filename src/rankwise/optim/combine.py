"""Transforms made of transforms: one after the other (chain), by label (partition), by mask, by a condition (switch)."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from rankwise.errors import OptionError
from rankwise.optim.base import Context, Fused, GradTransform, Param, State

Params = Mapping[str, Param]
Mask = Callable[[Param, Context | None], "bool | Tensor"]


class _Several(GradTransform):
    """Children whose states lie under their keys; what concerns one parameter goes to every child that holds it."""

    children: dict[str, GradTransform]

    @property
    def reads_params(self) -> bool:  # type: ignore[override]
        return any(t.reads_params for t in self.children.values())

    def init(self, params: Params) -> State:
        return {key: t.init(params) for key, t in self.children.items()}

    def after_update(self, params: Params, state: State, ctx: Context) -> None:
        for key, t in self.children.items():
            t.after_update(params, state[key], ctx)

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        for key, t in self.children.items():
            t.resync(state[key], name, kept, policy)

    def rotate(self, state: State, name: str, change: Callable[[Tensor], Tensor]) -> None:
        for key, t in self.children.items():
            t.rotate(state[key], name, change)


class Chain(_Several):
    """One transform after the other."""

    def __init__(self, *links: GradTransform) -> None:
        self.children = {f"/link{i}": t for i, t in enumerate(links)}

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        for key, t in self.children.items():
            grads = t.update(grads, state[key], params, ctx)
        return grads


class Partition(_Several):
    """Each parameter goes to the transform of its label; no transform sees another's parameters.

    Raises:
        OptionError: a label that has no transform.
    """

    def __init__(self, label_fn: Callable[[Param], str], transforms: Mapping[str, GradTransform]) -> None:
        self.label_fn = label_fn
        self.children = {f"/{label}": t for label, t in transforms.items()}
        self._known: dict[str, str] = {}  # a label is decided once, so a later change of shape cannot change it

    def _label(self, param: Param) -> str:
        if param.name in self._known:
            return self._known[param.name]
        label = f"/{self.label_fn(param)}"
        if label not in self.children:
            known = ", ".join(repr(k[1:]) for k in self.children)
            raise OptionError(f"partition labels {param.name!r} as {label[1:]!r}; its transforms are {known}.")
        self._known[param.name] = label
        return label

    def _split(self, names: Mapping[str, object], params: Params) -> dict[str, list[str]]:
        out: dict[str, list[str]] = {key: [] for key in self.children}
        for name in names:
            out[self._label(params[name])].append(name)
        return out

    def init(self, params: Params) -> State:
        split = self._split(params, params)
        return {key: t.init({n: params[n] for n in split[key]}) for key, t in self.children.items()}

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        out: dict[str, Tensor] = {}
        for key, names in self._split(grads, params).items():
            if names:
                out.update(self.children[key].update({n: grads[n] for n in names}, state[key], params, ctx))
        return out

    def fuse(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> Fused:
        taken: set[str] = set()
        calls: list[Callable[[], None]] = []
        for key, names in self._split(grads, params).items():
            if names:
                some, later = self.children[key].fuse({n: grads[n] for n in names}, state[key], params, ctx)
                taken |= some
                calls += later
        return taken, calls

    def after_update(self, params: Params, state: State, ctx: Context) -> None:
        for key, names in self._split(params, params).items():
            self.children[key].after_update({n: params[n] for n in names}, state[key], ctx)

    def resync(self, state: State, name: str, kept: Tensor | None, policy: str) -> None:
        for key, t in self.children.items():  # a name's state lies in one child only; the others find nothing
            t.resync(state[key], name, kept, policy)


class Masked(_Several):
    """``inner`` where the mask is true; elsewhere nothing is updated, by weight decay neither.

    ``mask(param, ctx)`` gives a bool for a whole tensor (False: its moments stay as well, as if its gradient
    were None) or a tensor of zeros and ones that broadcasts (the inner transform sees zero gradients there).
    """

    def __init__(self, inner: GradTransform, mask: Mask) -> None:
        self.mask = mask
        self.children = {"/inner": inner}

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        masks = {name: self.mask(params[name], ctx) for name in grads}
        seen = {
            name: g * masks[name] if isinstance(masks[name], Tensor) else g
            for name, g in grads.items()
            if isinstance(masks[name], Tensor) or masks[name]
        }
        updates = self.children["/inner"].update(seen, state["/inner"], params, ctx)
        for name, u in updates.items():
            mask = masks[name]
            if isinstance(mask, Tensor):
                updates[name] = torch.where(mask.bool(), u, -0.0)  # x + (−0) is x bit for bit, also for x = −0
        return updates


class Switch(_Several):
    """``a`` while ``predicate(ctx)`` holds, else ``b``; the one that does not run keeps its state as it is."""

    def __init__(self, a: GradTransform, b: GradTransform, predicate: Callable[[Context], bool]) -> None:
        self.predicate = predicate
        self.children = {"/a": a, "/b": b}

    def _key(self, ctx: Context) -> str:
        return "/a" if self.predicate(ctx) else "/b"

    def update(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> dict[str, Tensor]:
        key = self._key(ctx)
        return self.children[key].update(grads, state[key], params, ctx)

    def fuse(self, grads: dict[str, Tensor], state: State, params: Params, ctx: Context) -> Fused:
        key = self._key(ctx)
        return self.children[key].fuse(grads, state[key], params, ctx)

    def after_update(self, params: Params, state: State, ctx: Context) -> None:
        key = self._key(ctx)
        self.children[key].after_update(params, state[key], ctx)


def chain(*links: GradTransform) -> Chain:
    """One transform after the other; the updates of the last are added to the parameters, so it includes the minus sign.

    >>> from rankwise.optim import Context, Param, clip, scale_by_lr
    >>> step = chain(clip(1.0), scale_by_lr())
    >>> params = {"w": Param("w", torch.zeros(2))}
    >>> step.update({"w": torch.tensor([3.0, 4.0])}, step.init(params), params, Context(step=1, lr=0.5))
    {'w': tensor([-0.3000, -0.4000])}
    """
    return Chain(*links)


def partition(label_fn: Callable[[Param], str], transforms: Mapping[str, GradTransform]) -> Partition:
    """Each parameter to the transform of its label; see :class:`Partition`.

    >>> from rankwise.optim import Context, Param, scale
    >>> params = {n: Param(n, torch.zeros(1), role=n) for n in "AB"}
    >>> step = partition(lambda p: p.role, {"A": scale(-0.1), "B": scale(-1.6)})
    >>> step.update({n: torch.ones(1) for n in "AB"}, step.init(params), params, Context(step=1, lr=0.1))
    {'A': tensor([-0.1000]), 'B': tensor([-1.6000])}
    """
    return Partition(label_fn, transforms)


def masked(inner: GradTransform, mask: Mask) -> Masked:
    """``inner`` where the mask is true; see :class:`Masked`."""
    return Masked(inner, mask)


def switch(a: GradTransform, b: GradTransform, predicate: Callable[[Context], bool]) -> Switch:
    """``a`` or ``b`` by a condition on the step; see :class:`Switch`."""
    return Switch(a, b, predicate)
