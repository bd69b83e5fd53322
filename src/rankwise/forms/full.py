"""full: train base weights themselves, as an adapter whose delta is dense."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from rankwise.catalogue import register
from rankwise.delta.dense import Dense
from rankwise.errors import AttachError, OptionError
from rankwise.forms.base import AdapterLayer, Form, Plan

if TYPE_CHECKING:
    from rankwise.delta.base import Delta
    from rankwise.sites.site import Site


class FullLayer(AdapterLayer):
    """Δ = W_now − W_before; W_before is a copy (``original``), acting in views that leave this adapter out."""

    in_place: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {"weight": "weight"}
    original: nn.Parameter | None

    def __init__(self, site: Site, keep: bool):
        super().__init__(site)
        if site.spec.quantised or not site.param.dtype.is_floating_point:
            raise AttachError(f"{site.name!r} is quantised, so its weight has no gradient; train a low-rank form there instead.")
        self.keep = keep
        self.__dict__["original"] = None

    def base_parameters(self) -> dict[str, nn.Parameter]:
        """The base's own parameter, which this adapter trains."""
        return {"weight": self.site.param}

    def on_attach(self, registry: Any, record: Any) -> None:
        key = (self.site.spec.module, self.site.spec.param)
        if key in registry.replaced_weights:
            raise AttachError(
                f"{self.site.name!r} is already moved by adapter {registry.replaced_weights[key][0]!r}; one adapter a weight."
            )
        if self.keep:
            self.__dict__["original"] = nn.Parameter(self.site.param.detach().clone(), requires_grad=False)
            ends = [self.site, *(registry.known[f] for f in record.tied_sites.get(self.site.name, ()))]
            for end in ends:
                place = end.module.__dict__["_rankwise"]
                place.originals.setdefault(record.name, {})[end.spec.param] = self.original
        registry.replaced_weights[key] = (record.name, self.original)
        self.site.param.requires_grad_(True)

    def on_detach(self, registry: Any, record: Any) -> None:
        key = (self.site.spec.module, self.site.spec.param)
        if self.original is None:
            raise AttachError(
                f"{self.site.name!r} was trained in place without a copy (keep='none'), so the base cannot be restored; reload it from its files."
            )
        with torch.no_grad():
            self.site.param.copy_(self.original)
        self.site.param.requires_grad_(False)
        registry.replaced_weights.pop(key, None)

    def delta(self) -> Delta:
        now = self.site.view(self.site.param)
        if self.original is None:
            raise AttachError(
                f"{self.site.name!r} was trained without a copy of the base (keep='none'), so its change is not known."
            )
        return Dense(now.float() - self.site.view(self.original).float())


@register("form", "full", title="full: the base weights themselves, or some of them", mergeable=False)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Form):
    """Train W itself at the targets (any parameter: linears, norms, embeddings); Δ = W_now − W_before is dense.

    The degenerate form for optimisers and budgets over whole weights (GaLore, LISA).  ``keep="copy"`` holds the base's
    bits beside (as many numbers again), so views, detach and files work; ``keep="none"`` holds nothing: views that leave
    the adapter out, detach and save are refused.  One such adapter a weight.  Targets may be ``"all"``.

    Source: plain fine-tuning; no paper's form.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"weight", "constant"})
    kinds: ClassVar[tuple[str, ...]] = ("linear", "conv", "embedding", "experts", "plain")
    reads: ClassVar[tuple[str, ...]] = ("called", "read", "plain")
    ranked: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {"form": "full", "targets": "all"}
    keep: Literal["copy", "none"] = "copy"

    def __post_init__(self) -> None:
        if self.keep not in ("copy", "none"):
            raise OptionError(f"The form 'full' keeps 'copy' or 'none' of the base; it got {self.keep!r}.")

    def plan(self, sites: Sequence[Site], plan: Plan) -> Plan:
        part = next((s for s in sites if s.spec.rows is not None), None)
        if part is not None:
            raise AttachError(
                f"The form 'full' trains whole weights, and {part.name!r} is some rows of one; target "
                f"{part.spec.module.rpartition('.')[2]!r}, or use 'dense' for a part."
            )
        return plan

    def build(self, site: Site, plan: Plan) -> FullLayer:
        return FullLayer(site, self.keep == "copy")
