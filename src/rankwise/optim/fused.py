"""AdamW in one kernel call for many small tensors, which is what an adapter has.

The chain Adam → rate → decay, with a short cut: tensors whose components have all taken the same number of steps go to
torch's fused AdamW, grouped by (steps, rate, decay, device, dtype).  The others take the chain.  Both keep the
same state, so a tensor may change from one to the other at any step.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.optim.combine import Chain
from rankwise.optim.moments import resized, scale_by_adam
from rankwise.optim.transforms import decoupled_decay, scale_by_lr

if TYPE_CHECKING:
    from rankwise.optim.base import Context, Fused, Param, State

DEVICES = ("cpu", "cuda", "mps", "xpu")
DTYPES = (torch.float32, torch.float64)
Key = tuple[int, float, float, torch.device, torch.dtype]
Tensors = list[Tensor]


class AdamWChain(Chain):
    """``chain(scale_by_adam, scale_by_lr, decoupled_decay)``, fused where it can be."""

    def __init__(self, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> None:
        self.adam = scale_by_adam(b1, b2, eps)
        super().__init__(self.adam, scale_by_lr(), decoupled_decay())

    def fuse(self, grads: dict[str, Tensor], state: State, params: Mapping[str, Param], ctx: Context) -> Fused:
        buckets: dict[Key, tuple[list, list, list, list, list]] = {}
        moments, lrs, decays = state["/link0"], ctx.lrs, ctx.decays
        taken = set()
        for name, g in grads.items():
            s, p = moments[name], params[name].tensor
            age, mu = s["age"], s["mu"]
            dtype, device = p.dtype, p.device
            if type(age) is not int or dtype not in DTYPES or device.type not in DEVICES:
                continue
            if not (p.is_contiguous() and g.is_contiguous()):
                continue  # the kernel needs contiguous memory
            if mu.shape != g.shape:
                raise resized(name, mu, g)
            taken.add(name)
            key = (age, lrs[name], decays[name], device, dtype)
            lists = buckets.get(key)
            if lists is None:
                lists = buckets[key] = ([], [], [], [], [])
            for into, value in zip(lists, (p, g, mu, s["nu"], s)):
                into.append(value)
        return taken, [partial(self._kernel, key, *lists) for key, lists in buckets.items()]

    def _kernel(self, key: Key, ps: Tensors, gs: Tensors, mus: Tensors, nus: Tensors, states: list[State]) -> None:
        age, lr, decay, device, _ = key
        for s in states:
            s["age"] = age + 1
        steps = [torch.full((), float(age + 1), device=device)] * len(ps)
        b1, b2, eps = self.adam.b1, self.adam.b2, self.adam.eps
        options = {"weight_decay": decay, "eps": eps, "amsgrad": False, "maximize": False}
        torch._fused_adamw_(ps, gs, mus, nus, [], steps, lr=lr, beta1=b1, beta2=b2, **options)  # type: ignore[call-overload]


def adamw_chain(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> AdamWChain:
    """AdamW's whole step; see :class:`AdamWChain`."""
    return AdamWChain(b1, b2, eps)
