"""Where the changes of an adapter go: the groups of called linears of one base, and each site's place among them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import TYPE_CHECKING

from torch import Tensor, nn

from rankwise.errors import OptionError
from rankwise.serve.ops.base import Group
from rankwise.sites.discover import find_sites

if TYPE_CHECKING:
    from rankwise.sites.site import Site
    from rankwise.sites.spec import SiteSpec


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Spot:
    """Where a site's low-rank pair goes.

    Attributes:
        group, j: the module, by its place in the group; ``module``: its path.
        out: the module's output width; ``rows``: a part of a fused projection's of these (None: all of them).
    """

    group: str
    j: int
    module: str
    out: int
    rows: Tensor | None = None


class Layout:
    """Groups, spots and called modules of one base, found by one walk.

    Attributes:
        sites: every site of the base by name.
        groups: modules that are called with one tensor, in model order; a fused projection is one module.
        spots: site → where its low-rank pair goes; parts of a fused projection lead to the whole module.
        called: module → its whole site, for every module at which a non-LoRA change may stand: those of the groups, the head,
            and the input embedding (whose x are token ids).
    """

    def __init__(self, model: nn.Module, *, head: bool = False):
        """``head``: give the output head a group of its own, so that low-rank changes of it are pairs; each page grows by it."""
        if "rankwise" in model._modules:
            raise OptionError("Adapters are attached to this model; serving needs the plain base: detach() them first.")
        self.sites: dict[str, Site] = find_sites(model)
        table = getattr(model, "get_input_embeddings", lambda: None)()
        self.called: dict[str, Site] = {
            s.spec.module: s
            for s in self.sites.values()
            if _callable(s.spec) and (s.spec.kind == "linear" or table is None or s.module is table)
        }
        members: dict[str, list[SiteSpec]] = defaultdict(list)
        for module, site in self.called.items():
            if site.spec.kind == "linear" and (head or site.spec.role != "head"):
                members[site.spec.input_group or module].append(site.spec)
        self.groups = tuple(
            Group(name, tuple(s.module for s in specs), specs[0].inp, tuple(s.out for s in specs))
            for name, specs in members.items()
        )
        at = {m: (g.name, j, g.outs[j]) for g in self.groups for j, m in enumerate(g.modules)}
        self.spots = {
            n: Spot(at[s.spec.module][0], at[s.spec.module][1], s.spec.module, at[s.spec.module][2], s.spec.row_index())
            for n, s in self.sites.items()
            if s.spec.module in at and s.spec.mode == "called"
        }

    def refusal(self, spec: SiteSpec) -> str:
        """Why a change at this place cannot be served to some rows of a batch and not to others; "" where it can."""
        if spec.mode == "block":
            return "it wraps a whole block, which sees all rows at once"
        if spec.mode == "read":
            return "another forward reads that weight for all rows of a batch at once"
        if spec.routed:
            return "the model routes rows to that expert, so its rows are not the batch's"
        if spec.kind == "conv":
            return "a convolution mixes the tokens of a row"
        if spec.kind == "embedding" and spec.module not in self.called:
            return "of the embeddings only the one of the input ids is looked up token by token"
        if spec.mode == "plain" and not (spec.param == "bias" and spec.module in self.called):
            return "that parameter is used for all rows of a batch at once"
        return ""


def _callable(spec: SiteSpec) -> bool:
    return (
        spec.kind in ("linear", "embedding")
        and spec.mode == "called"
        and spec.rows is None
        and not spec.routed
        and not spec.refusal
    )
