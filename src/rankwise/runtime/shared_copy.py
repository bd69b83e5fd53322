"""A copy of a module tree over the very same tensors: attach to it, cut it or hook it, and the original stays as it is."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn


def shared_copy(model: nn.Module, *, keep_forward: bool = True) -> Any:
    """Module objects of its own around the parameters, buffers and quantisation constants of ``model``.

    Plain parameters are frozen :class:`torch.nn.Parameter` objects of the copy's own over the same memory, tied ones tied;
    parameters of other classes (quantised ones) are the very same objects.

    Args:
        keep_forward: False leaves out a ``forward`` set on a module itself (serving's hooks), so that the class's own runs.
    """
    memo: dict[int, Any] = {id(b): b for b in model.buffers()}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False) if type(p) is nn.Parameter else p
    for module in model.modules():
        for value in vars(module).values():
            held = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, (nn.Module, type)) else ()
            for t in (value, *held):
                if isinstance(t, Tensor):
                    memo.setdefault(id(t), t)
        if not keep_forward and "forward" in vars(module):  # not copied: a hook holds the packed weights of its siblings
            memo[id(vars(module)["forward"])] = vars(module)["forward"]
    made = copy.deepcopy(model, memo)
    if not keep_forward:
        for module in made.modules():
            vars(module).pop("forward", None)
    return made
