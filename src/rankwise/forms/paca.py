"""PaCA: train a few input columns of W, and keep only those columns of the input for backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import nn

from rankwise.catalogue import register
from rankwise.delta.sparse import Columns
from rankwise.forms.base import AdapterLayer, Form, Plan, index_buffer, lead

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class PacaLayer(AdapterLayer):
    """ΔW[:, index] = s·V; V: out×r, trained from zero."""

    components: ClassVar[Mapping[str, int]] = {"V": -1}
    fills: ClassVar[tuple[str, ...]] = ("V",)
    roles: ClassVar[Mapping[str, str]] = {"V": "other"}
    index: torch.Tensor

    def __init__(self, site: Site, index: torch.Tensor, plan: Plan):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout)
        index_buffer(self, "index", index.to(site.device))
        self.V = nn.Parameter(torch.zeros(*lead(site), site.spec.out, len(index), device=site.device))

    def delta(self) -> Columns:
        return Columns(self.index, self.V * self.scale, self.site.spec.inp)


@register("form", "paca", title="PaCA: partial connection adaptation", paper="arXiv 2503.01905", reference="041")
@dataclasses.dataclass(frozen=True, kw_only=True)
class PaCA(Form):
    """ΔW[:, idx] = s·V with idx ⊂ [in], |idx| = r, V: out×r trained from zero; y += s·x[…, idx]·Vᵀ.

    Backward needs only x[…, idx] (r of in columns); a LoRA keeps all of x.  Trains out·r parameters a weight.  Merges
    exactly; as a LoRA it has exact rank r (A = rows of I at idx, B = s·V).  The published code overwrites W's columns
    in place and refreshes them on a step-count condition; here ΔW is added beside W, so W keeps its bits and
    adapters mix; the maths is the same: ∂V = s·gᵀ·x[…, idx].

    ``choose``: columns at random (by the site's name), or those of largest or smallest norm.
    Source: WooSunghyeon/paca.  Convolutions and embeddings are refused (no cheap columns there).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"fill:V", "components", "constant"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "experts")
    choose: Literal["random", "largest", "smallest"] = "random"

    def build(self, site: Site, plan: Plan) -> PacaLayer:
        r, n = plan.ranks[site.name], site.spec.inp
        if self.choose == "random":
            index = torch.randperm(n, generator=plan.generator("columns", site.name))[:r]
        else:
            norms = site.read().reshape(-1, n).norm(dim=0)
            index = norms.topk(r, largest=self.choose == "largest").indices.cpu()
        return PacaLayer(site, index.sort().values, plan)
