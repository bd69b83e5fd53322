"""dense: ΔW of the weight's own shape, trained from zero; what ``modules_to_save`` uses (heads, norms)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from rankwise.catalogue import register
from rankwise.delta.dense import Dense
from rankwise.forms.base import AdapterLayer, Form, Plan
from rankwise.forms.foreign import takes_foreign

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class DenseLayer(AdapterLayer):
    """Δ = D, of the weight's own shape, trained from zero."""

    fills: ClassVar[tuple[str, ...]] = ("D",)
    roles: ClassVar[Mapping[str, str]] = {"D": "other"}

    def __init__(self, site: Site):
        super().__init__(site)
        self.D = nn.Parameter(torch.zeros(site.spec.shape, device=site.device))

    def delta(self) -> Dense:
        return Dense(self.D)


@takes_foreign(difference="D")
@register("form", "dense", title="dense: a full-size trained difference (modules_to_save)")
@dataclasses.dataclass(frozen=True, kw_only=True)
class DenseForm(Form):
    """y += x·Dᵀ with D: out×in trained from zero; at plain parameters (bias, norm) the parameter reads as p + D.

    What ``modules_to_save`` uses: every parameter of the named modules gets its own D, so two adapters can each have
    their own head on one base, which ``full`` cannot.  Trains as many parameters as the module has.  Weight decay pulls
    towards the base, not towards zero.  Merges exactly; leaves in PEFT's format as a saved module (W + D).

    Source: PEFT's ``modules_to_save``, which keeps a copy of the module where this keeps a difference.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"fill:D", "constant"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "plain")
    reads: ClassVar[tuple[str, ...]] = ("called", "read", "plain")
    ranked: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"form": "dense", "targets": ["lm_head", "norm"]}

    def build(self, site: Site, plan: Plan) -> DenseLayer:
        return DenseLayer(site)
