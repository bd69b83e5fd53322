"""LoRA: the plain pair, and the workhorse that other forms build on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise._renamed import old_names
from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.forms.base import AdapterLayer, Form, Plan, factor, lead

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class LoraLayer(AdapterLayer):
    """Δ = s·B·A with A: r×in and B: out×r (E×… for a stack), both trained, stored in fp32."""

    components: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}
    fills: ClassVar[tuple[str, ...]] = ("A", "B")
    roles: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site, r: int, plan: Plan, *, dropout: float | None = None):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout if dropout is None else dropout)
        s, g, e = site.spec, plan.generator("A", site.name), lead(site)
        if s.kind == "embedding":  # a table's rows are looked up: A starts at zero, B is drawn (as PEFT and loralib do)
            A, B = torch.zeros(r, s.inp, device=site.device), torch.randn(s.out, r, generator=g).to(site.device)
        else:
            A = factor((*e, r, s.inp), g, fan_in=s.inp, device=site.device)
            B = torch.zeros(*e, s.out, r, device=site.device)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def delta(self) -> LowRank:
        return LowRank(self.A, self.B, self.scale)

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        if "A" in filled and "B" not in filled:
            nn.init.zeros_(self.B)

    def fused_factors(self) -> list[tuple[Tensor, Tensor, float]]:
        own: list[tuple[Tensor, Tensor, float]] = [(self.A, self.B, self.scale)]
        return [*own, (self.A0, self.B0, -self.start_scale)] if self.has_frozen_start else own


@register("form", "lora", title="LoRA: a trained product of two thin matrices", paper="arXiv 2106.09685", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Form):
    """y += s·(drop(x)·Aᵀ)·Bᵀ with A: r×in, B: out×r; s = α/r (``scale="alpha/sqrt_r"`` is the form rslora).

    A is Kaiming-uniform (a = √5), B zero; at an embedding A is zero and B standard normal.  Trains and stores
    r·(in + out) numbers a site.  Merges exactly as W + s·B·A.

    Source: microsoft/LoRA, loralib/layers.py.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"fill:A", "fill:B", "pair", "components", "gate", "constant", "lowrank"})
    peft_fields: ClassVar[Mapping[str, Any] | None] = {}

    def build(self, site: Site, plan: Plan) -> LoraLayer:
        return LoraLayer(site, plan.ranks[site.name], plan)


@register(
    "form",
    "rslora",
    title="rsLoRA: LoRA whose scale keeps a high rank learning",
    paper="arXiv 2312.03732",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class RankStabilised(LoRA):
    """LoRA with s = α/√r in place of α/r; A: r×in, B: out×r, counts, start and merging are LoRA's.

    The first step's loss drop is lr·s²·r·‖G‖²/(3·in) in the mean over A: constant in r here, and falling as 1/r in LoRA.
    Where no alpha is given it is r, so s = √r.  Exported, the scale is said as α/r, which every reader takes alike.

    Source: Kalajdzievski 2023; PEFT's ``use_rslora``.  Errors: another ``scale`` beside it.
    """

    def scaling(self) -> str:
        return "alpha/sqrt_r"


__getattr__ = old_names(__name__, "Pair")
