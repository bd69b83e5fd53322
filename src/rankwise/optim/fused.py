"""AdamW in one kernel call for many small tensors: what an adapter's step is made of.

The chain Adam → rate → decay, with a short cut: tensors whose components are all equally old are handed to
torch's fused AdamW, grouped by (age, rate, decay, device, dtype).  The others take the chain.  Both keep the
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
                continue  # the kernel walks memory, not indices
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

    def _kernel(
        self, key: Key,
        ps: list[Tensor], gs: list[Tensor], mus: list[Tensor], nus: list[Tensor], states: list[State],
    ) -> None:  # fmt: skip
        age, lr, decay, device, _ = key
        for s in states:
            s["age"] = age + 1
        steps = [torch.full((), float(age + 1), device=device)] * len(ps)
        torch._fused_adamw_(
            ps, gs, mus, nus, [], steps, lr=lr, beta1=self.adam.b1, beta2=self.adam.b2, weight_decay=decay,
            eps=self.adam.eps, amsgrad=False, maximize=False,
        )  # fmt: skip


def adamw_chain(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> AdamWChain:
    """AdamW's whole step; see :class:`AdamWChain`."""
    return AdamWChain(b1, b2, eps)
