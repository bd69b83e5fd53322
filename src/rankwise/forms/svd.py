"""svd: AdaLoRA's parametrisation P·diag(λ)·Q, whose λ its budget prunes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.forms.base import AdapterLayer, Form, Plan, lead

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class SvdLayer(AdapterLayer):
    """ΔW = s·B·diag(λ)·A, all three trained; a component is a triplet (column of B, λ, row of A).

    Args:
        site: the adapted weight.
        r: initial rank.
        plan: scale, dropout, generators.
        std: of A's and B's initial values.
    """

    components: ClassVar[Mapping[str, int]] = {"A": -2, "core": -1, "B": -1}
    fills: ClassVar[tuple[str, ...]] = ("A", "B", "core")
    roles: ClassVar[Mapping[str, str]] = {"A": "A", "B": "B", "core": "core"}

    def __init__(self, site: Site, r: int, plan: Plan, std: float):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout)
        e, s = lead(site), site.spec
        draw = lambda name, *shape: (torch.randn(*shape, generator=plan.generator(name, site.name)) * std).to(site.device)
        self.A = nn.Parameter(draw("A", *e, r, s.inp))
        self.B = nn.Parameter(draw("B", *e, s.out, r))
        self.core = nn.Parameter(torch.zeros(*e, r, device=site.device))

    def complete(self, filled: Mapping[str, Tensor]) -> None:
        if {"A", "B"} <= set(filled) and "core" not in filled:
            nn.init.ones_(self.core)  # so that ΔW is the init's s·B·A

    def delta(self) -> LowRank:
        return LowRank(self.A, self.B, self.scale, core=self.core)


@register(
    "form",
    "svd",
    title="SVD form: P·diag(λ)·Q with soft orthogonality",
    paper="arXiv 2303.10512",
    reference="203",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SVD(Form):
    """ΔW = s·B·diag(λ)·A with A: r×in and B: out×r drawn N(0, 0.02²), λ: r zero, all trained; r·(in + out + 1) parameters.

    The form of AdaLoRA (with the budget ``adalora`` and the loss ``orthogonality``; together the preset ``adalora``).
    Exports to PEFT as a LoRA of rank nnz(λ).  Source: QingruZhang/AdaLoRA, loralib/adalora.py.
    """

    provides: ClassVar[frozenset[str]] = frozenset(
        {"fill:A", "fill:B", "fill:core", "components", "core:diag", "constant", "lowrank"}
    )
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "experts")
    std: float = 0.02

    def build(self, site: Site, plan: Plan) -> SvdLayer:
        return SvdLayer(site, plan.ranks[site.name], plan, self.std)
