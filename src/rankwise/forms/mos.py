"""MoS: all layers of one role build their A and B from the vectors of one shared pool."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.delta.lowrank import LowRank
from rankwise.errors import OptionError
from rankwise.forms.base import AdapterLayer, Form, Plan, SharedTensors, factor, index_buffer

if TYPE_CHECKING:
    from rankwise.sites.site import Site


class Pools(SharedTensors):
    """One role's pools: PA: N×(in/l), PB: N×(out/l)."""

    PA: Tensor
    PB: Tensor


class MosLayer(AdapterLayer):
    """A: r×in and B: out×r gathered from the role's pools by frozen indices.

    Args:
        site: the adapted weight.
        bank: the role's pools.
        index_a, index_b: (r·l,) int64, rows of PA and PB.
        plan: scale and dropout.
        shards: l, pool rows that make one vector of in (or out) features.
    """

    roles: ClassVar[Mapping[str, str]] = {}
    bank: Pools
    index_a: Tensor
    index_b: Tensor

    def __init__(self, site: Site, bank: Pools, index_a: Tensor, index_b: Tensor, plan: Plan, shards: int):
        super().__init__(site, scale=plan.scales[site.name], dropout=plan.dropout)
        self.__dict__["bank"] = bank  # registered once, on the adapter; read through the module at each call
        self.shards = shards
        index_buffer(self, "index_a", index_a)
        index_buffer(self, "index_b", index_b)

    def delta(self) -> LowRank:
        A = self.bank.PA[self.index_a].reshape(-1, self.site.spec.inp)
        B = self.bank.PB[self.index_b].reshape(-1, self.site.spec.out)
        return LowRank(A, B.mT, self.scale)


@register(
    "form",
    "mos",
    title="MoS: mixture of shards from pools shared by a role's layers",
    paper="arXiv 2410.00938",
    reference="034",
    exports_to_peft=True,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoS(Form):
    """Pools PA: N×(in/l), PB: N×(out/l) for each role, N = L·e·l; row j of A is l shards of PA, column j of B l shards of PB.

    L layers have the role (and shape), e is the budget rank (as many parameters as a LoRA of rank e), l the shards a vector,
    p the private rank.  A layer draws (r − p)·l public shards without replacement and takes its own p·l private
    ones; A and B draw apart (``dissociate``).  PA is Kaiming-uniform over the full fan-in, PB zero.  Trains
    Σ_roles L·e·(in + out) parameters; ΔW has exact rank r a layer.  p = e = r with l = 1 is plain LoRA.

    Args:
        budget_rank: e.
        shards: l.
        private: p.
        dissociate: draw the indices of A and of B apart.

    Source: Forence1999/MoS, modules/Tied_LoRA.py.  Errors: l must divide in and out; (r − p) ≤ (e − p)·L; p ≤ min(r, e).
    """

    provides: ClassVar[frozenset[str]] = frozenset({"constant", "lowrank"})
    kinds: ClassVar[tuple[str, ...]] = ("linear",)
    example: ClassVar[Mapping[str, Any]] = {"form": "mos", "r": 3}
    budget_rank: int = 2
    shards: int = 4
    private: int = 1
    dissociate: bool = True

    def plan(self, sites: Sequence[Site], plan: Plan) -> Plan:
        groups: dict[str, list[Site]] = defaultdict(list)
        for s in sites:
            groups[f"{s.spec.role}:{s.spec.out}x{s.spec.inp}"].append(s)
        for key, members in groups.items():
            self._check(key, members, plan)
            n, first = len(members) * self.budget_rank * self.shards, members[0]
            A = factor((n, first.spec.inp // self.shards), plan.generator("PA", key), fan_in=first.spec.inp, device=first.device)
            plan.banks[key] = Pools({"PA": A, "PB": torch.zeros(n, first.spec.out // self.shards, device=first.device)})
            for k, s in enumerate(members):
                plan.notes[s.name] = (key, k, len(members))
        return plan

    def build(self, site: Site, plan: Plan) -> MosLayer:
        key, k, layers = plan.notes[site.name]
        r = plan.ranks[site.name]
        a = self._draw(plan.generator("shards:A", site.name), k, layers, r)
        b = self._draw(plan.generator("shards:B", site.name), k, layers, r) if self.dissociate else a
        bank = plan.banks[key]
        assert isinstance(bank, Pools)
        return MosLayer(site, bank, a.to(site.device), b.to(site.device), plan, self.shards)

    def _draw(self, g: torch.Generator, k: int, layers: int, r: int) -> Tensor:
        """(r·l) indices: a sample without replacement of the public shards, then this layer's private block."""
        public = (self.budget_rank - self.private) * layers * self.shards
        mine = torch.randperm(public, generator=g)[: (r - self.private) * self.shards]
        start = public + k * self.private * self.shards
        return torch.cat([mine, torch.arange(start, start + self.private * self.shards)])

    def _check(self, key: str, members: Sequence[Site], plan: Plan) -> None:
        first, e, p, l = members[0], self.budget_rank, self.private, self.shards
        if min(e, l) < 1 or p < 0:
            raise OptionError(f"The form 'mos' needs budget_rank ≥ 1, shards ≥ 1 and private ≥ 0; it got {e}, {l} and {p}.")
        if first.spec.inp % l or first.spec.out % l:
            raise OptionError(
                f"The form 'mos' cuts vectors into shards = {l} pieces, which must divide {first.spec.out}×{first.spec.inp} ({key}); use 1, 2 or 4."
            )
        for s in members:
            r = plan.ranks[s.name]
            if p > min(r, e) or r - p > (e - p) * len(members):
                raise OptionError(
                    f"The form 'mos' at role {first.spec.role!r}: r = {r}, private = {p}, budget_rank = {e} over {len(members)} layers; "
                    f"it needs private ≤ min(r, budget_rank) and r − private ≤ (budget_rank − private)·layers = {(e - p) * len(members)}."
                )
