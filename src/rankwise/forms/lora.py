"""LoRA, and rsLoRA (``rslora``), which differs in its scale alone."""

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
from rankwise.forms.foreign import takes_foreign

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class LoraLayer(AdapterLayer):
    """ΔW = s·B·A of one weight.

    A is PEFT's ``lora_A.weight``, r×in, B its ``lora_B.weight``, out×r; a stack of E experts has E×r×in and E×out×r.  Both are
    trained and stored in fp32.  The forward, dropout and merging are :class:`~rankwise.forms.base.AdapterLayer`'s.

    Args:
        site: the adapted weight.
        r: rank.
        plan: the scale s, the dropout and the random generator.
        dropout: instead of the plan's.
    """

    components: ClassVar[Mapping[str, int]] = {"A": -2, "B": -1}
    fills: ClassVar[tuple[str, ...]] = ("A", "B")
    roles: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B"}

    def __init__(self, site: Site, r: int, plan: Plan, *, dropout: float | None = None):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout if dropout is None else dropout)
        s, g, e = site.spec, plan.generator("A", site.name), lead(site)
        if s.kind == "embedding":  # A = 0 and B ~ N(0, 1), as PEFT and loralib have it
            A, B = torch.zeros(r, s.inp, device=site.device), torch.randn(s.out, r, generator=g).to(site.device)
        else:
            A = factor((*e, r, s.inp), g, fan_in=s.inp, device=site.device)
            B = torch.zeros(*e, s.out, r, device=site.device)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)

    def delta(self) -> LowRank:
        return LowRank(self.A, self.B, self.scale)

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        if "A" in filled and "B" not in filled:  # an init such as EVA sets A alone
            nn.init.zeros_(self.B)

    def fused_factors(self) -> list[tuple[Tensor, Tensor, float]]:
        own: list[tuple[Tensor, Tensor, float]] = [(self.A, self.B, self.scale)]
        if self.has_frozen_start:  # PiSSA and the like: minus the initial s·B·A
            own.append((self.A0, self.B0, -self.start_scale))
        return own


@takes_foreign(A="A", B="B")
@register("form", "lora", title="LoRA: a trained product of two thin matrices", paper="arXiv 2106.09685", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Form):
    """y += s·(drop(x)·Aᵀ)·Bᵀ with A: r×in, B: out×r; s = α/r (``scale="alpha/sqrt_r"`` is the form rslora).

    A is Kaiming-uniform (a = √5), B zero; on an embedding A is zero and B standard normal.  Trains and stores
    r·(in + out) parameters per weight.  Merges exactly as W + s·B·A.

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
    Where no alpha is given it is r, so s = √r.  An export writes the scale as α/r, which every reader understands.

    Source: Kalajdzievski 2023; PEFT's ``use_rslora``.  Errors: another ``scale`` beside it.
    """

    def scaling(self) -> str:
        return "alpha/sqrt_r"


__getattr__ = old_names(__name__, "Pair")
