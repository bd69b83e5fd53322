"""Bottleneck adapters: a small two-layer network after, or parallel to, a block."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.errors import OptionError, ViewError
from rankwise.forms.base import Form, Plan
from rankwise.forms.block import BlockDelta, Masks

if TYPE_CHECKING:
    from rankwise.sites.site import Site

_ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": nn.functional.gelu,
    "silu": nn.functional.silu,
    "tanh": torch.tanh,
}


class BottleneckLayer(BlockDelta):
    """Δy = s·up(act(down(·))) of the block's output (*after*) or first input (*parallel*).

    Args:
        site: the block.
        r: width of the bottleneck.
        plan: scale, dropout and the generator.
        act: relu, gelu, silu or tanh.
        mode: "after" or "parallel".
    """

    roles: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B", "a": "other", "b": "other"}
    components: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}

    def __init__(self, site: Site, r: int, plan: Plan, act: str, mode: str):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout)
        self.act, self.mode = act, mode
        inp = site.spec.out if mode == "after" else site.spec.inp
        bound = 1 / math.sqrt(inp)
        g = plan.generator("down", site.name)
        self.A = nn.Parameter(torch.empty(r, inp).uniform_(-bound, bound, generator=g).to(site.device))
        self.a = nn.Parameter(torch.zeros(r, device=site.device))
        self.B = nn.Parameter(torch.zeros(site.spec.out, r, device=site.device))
        self.b = nn.Parameter(torch.zeros(site.spec.out, device=site.device))

    def block(self, base: Any, args: Any, kwargs: Any, y: Tensor | None, strength: Tensor, masks: Masks) -> Tensor:
        assert y is not None
        x = y if self.mode == "after" else (args[0] if args else next(v for v in kwargs.values() if isinstance(v, Tensor)))
        if x.shape[-1] != self.A.shape[-1] or y.shape[-1] != len(self.B):
            raise ViewError(
                f"The bottleneck at {self.site.name!r} was made for {self.A.shape[-1]} → {len(self.B)} features, but its block gave "
                f"{x.shape[-1]} → {y.shape[-1]}; wrap another block, or one inside it."
            )
        h = nn.functional.linear(self.drop(x), self.A.to(x.dtype), self.a.to(x.dtype))
        h = (
            _ACTS[self.act](h) * (self.scale * strength).to(x.dtype)
            if isinstance(strength, Tensor)
            else _ACTS[self.act](h) * self.scale
        )
        return nn.functional.linear(h, self.B.to(x.dtype)) + self.b.to(x.dtype) * (self.scale * strength)


@register("form", "bottleneck", title="Bottleneck adapter around a block", paper="arXiv 1902.00751", mergeable=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BottleneckForm(Form):
    """y += s·(act(z·Aᵀ + a)·Bᵀ + b), z the block's own output (``mode="after"``) or its input (``"parallel"``).

    A: r×d Kaiming-uniform, B: d×r and both biases zero, all trained: r·(d_in + d_out) + r + d_out parameters a block.
    Targets name modules (``mlp``, ``self_attn``); "all-linear" means every ``mlp``.  Not a change of weight: it cannot
    be merged or exported.  Source: Houlsby et al. 2019 (serial) and He et al. 2021 (parallel).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"block"})
    kinds: ClassVar[tuple[str, ...]] = ("block",)
    reads: ClassVar[tuple[str, ...]] = ("block",)
    bounded: ClassVar[bool] = False
    default_block: ClassVar[str] = "mlp"
    act: Literal["relu", "gelu", "silu", "tanh"] = "gelu"
    mode: Literal["after", "parallel"] = "after"

    def __post_init__(self) -> None:
        if self.act not in _ACTS or self.mode not in ("after", "parallel"):
            raise OptionError(
                f"The form 'bottleneck' has act in {sorted(_ACTS)} and mode 'after' or 'parallel'; it got {self.act!r}, {self.mode!r}."
            )

    def build(self, site: Site, plan: Plan) -> BottleneckLayer:
        return BottleneckLayer(site, plan.ranks[site.name], plan, self.act, self.mode)
