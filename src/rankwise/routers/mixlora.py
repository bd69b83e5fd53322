"""MixLoRA: a dense frozen MLP becomes a mixture whose experts are that MLP with different LoRAs."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.errors import OptionError, TargetError
from rankwise.forms.base import Plan, SiteDelta
from rankwise.forms.bottleneck import BlockDelta
from rankwise.routers.base import Record, Routed, Router, RouterModule
from rankwise.routers.decision import Decision, execute
from rankwise.routers.losses import switch
from rankwise.sites import block_site
from rankwise.sites.site import Site
from rankwise.view import HERE

_IN_BLOCK = {"gate", "up", "down"}


class Expanded(NamedTuple):
    """Rows of a block's input, repeated for each chosen expert and sorted by expert."""

    decision: Decision  # one expert a row, weight 1
    x: Tensor  # (N·k, in) expanded rows
    h: Tensor  # (N, in) the rows they came from
    rows: Tensor  # (N·k,) indices into h


class TopK(RouterModule):
    """p = softmax(h·W_gᵀ) over E experts, top-k renormalised; the switch loss over its records."""

    def __init__(self, inp: int, experts: int, k: int, weight: float, std: float, g: torch.Generator, device: torch.device):
        super().__init__()
        self.experts, self.k, self.coefficient = experts, k, weight
        self.weight = nn.Parameter((torch.randn(experts, inp, generator=g) * std).to(device))

    def route(self, x: Tensor, z: Tensor | None = None) -> Decision:
        logits = x.float() @ self.weight.float().mT
        probs = logits.softmax(-1)
        top = probs.topk(self.k, dim=-1)
        return Decision(top.values / top.values.sum(-1, keepdim=True), self.experts, index=top.indices, logits=logits, probs=probs)

    def losses(self, records: Sequence[Record]) -> dict[str, Tensor]:
        return {"switch": self.coefficient * switch(records, per="row")}


class ExpertBlock(BlockDelta):
    """The block's forward over (row, expert) pairs; its linears find their Decision through the row context."""

    replaces: ClassVar[bool] = True
    roles: ClassVar[Mapping[str, str]] = {}

    def __init__(self, site: Site, router: TopK, key: str):
        super().__init__(site)
        self.router, self.key = router, key

    def delta(self) -> Any:
        from rankwise.delta import Gated, LowRank

        return Gated(LowRank(torch.zeros(1, self.site.spec.inp), torch.zeros(self.site.spec.out, 1)), None)

    def block(self, base: Callable[..., Any], args: Any, kwargs: Any, y: Tensor | None, strength: Tensor, masked: Any) -> Tensor:
        h = args[0] if args else kwargs["hidden_states"]
        flat = h.reshape(-1, h.shape[-1])
        decision = self.router.route(flat)
        self.router.note(decision)
        assert decision.index is not None
        chosen = decision.index.reshape(-1)
        order = chosen.argsort(stable=True)
        rows = order // self.router.k
        hard = Decision(torch.ones(len(rows), 1, device=h.device), self.router.experts, index=chosen[order][:, None])
        x = flat[rows]
        before = HERE.decisions, HERE.rows
        HERE.decisions = {**(HERE.decisions or {}), self.key: Expanded(hard, x, flat, rows)}
        HERE.rows = rows // max(flat.shape[0] // h.shape[0], 1)
        try:
            out = base(x)
        finally:
            HERE.decisions, HERE.rows = before
        weight = decision.weight.reshape(-1)[order][:, None].to(out.dtype)
        return (
            torch.zeros(len(flat), out.shape[-1], dtype=out.dtype, device=out.device)
            .index_add(0, rows, out * weight)
            .reshape(*h.shape[:-1], -1)
        )


class ExpertSite(Routed):
    """E LoRAs at one linear of an expert block: each expanded row meets its own expert's."""

    def __init__(self, inner: SiteDelta, key: str, experts: int, scale: float):
        super().__init__(inner, RouterModule(), scale)
        self.key, self.experts = key, experts

    def forward(self, x: Tensor, y: Tensor, strength: Tensor | None = None) -> Tensor:
        context = (HERE.decisions or {}).get(self.key)
        if context is None:
            raise TargetError(
                f"{self.site.name!r} holds experts of the block {self.key.split('::')[1]!r}, but was called outside it."
            )
        d = self.low_rank()
        A, B = (t.to(y.dtype) for t in d.factors())
        decision = dataclasses.replace(context.decision, sizes=[A.shape[0] // self.experts] * self.experts)
        rows = self.inner.drop(x).reshape(-1, x.shape[-1]).to(y.dtype)
        return execute(rows, A, B, 1.0 if strength is None else strength, decision, plan="segments").reshape(*x.shape[:-1], -1)


@register(
    "router",
    "mixlora",
    title="MixLoRA: top-k experts over a whole MLP block",
    paper="arXiv 2404.15159",
    reference="065",
    needs=("gate",),
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixLoRA(Router):
    """p = softmax(h·W_gᵀ) at the MLP's input h, top-k renormalised to w; y = Σ_{e∈I} w_e·F_e(h), F_e the MLP with ΔW_e.

    The activation stands between the linears, so mixing happens after the block.  The recipe's r is each expert's rank:
    sites gate, up and down hold E·r components, sites outside an MLP an ordinary pair of rank r.  The block runs on the
    N·k (row, expert) pairs sorted by expert; base products of gate and up are made once for N rows and gathered.
    Loss: ``balance``·switch, counted per row as in the public code (least k).  W_g: E×in ~ N(0, 0.02²), fp32.

    Invariants: equal ΔW_e make the router irrelevant; B = 0 is the base; path ≡ naive per-expert sum.
    Source: TUDB-Labs/MoE-PEFT, adapters/mixlora.  Errors: no MLP of gate/up/down linears among the targets; k > E.
    """

    example: ClassVar[Mapping[str, Any]] = {"r": 2, "router": {"name": "mixlora", "experts": 4}}
    experts: int = 8
    k: int = 2
    balance: float = 0.001
    std: float = 0.02

    def __post_init__(self) -> None:
        if not 1 <= self.k <= self.experts or self.balance < 0:
            raise OptionError(
                f"The router 'mixlora' needs 1 ≤ k ≤ experts and balance ≥ 0; it got k = {self.k}, experts = {self.experts}, balance = {self.balance}."
            )

    def ranks(self, model: nn.Module, sites: Sequence[Site], ranks: Mapping[str, int]) -> dict[str, int]:
        inside = {s.name for members in self._blocks(sites).values() for s in members}
        return {n: r * self.experts if n in inside else r for n, r in ranks.items()}

    def _blocks(self, sites: Sequence[Site]) -> dict[str, list[Site]]:
        blocks: dict[str, list[Site]] = defaultdict(list)
        fused = next((s.name for s in sites if s.spec.rows is not None and s.spec.role in _IN_BLOCK), None)
        if fused is not None:
            raise TargetError(
                f"The router 'mixlora' cannot give {fused!r} to experts: it is a part of a fused projection. Leave it out of the targets."
            )
        for s in sites:
            if s.spec.kind == "linear" and s.spec.mode == "called" and s.spec.role in _IN_BLOCK and s.spec.rows is None:
                blocks[s.spec.module.rpartition(".")[0]].append(s)
        if not blocks:
            raise TargetError(
                "The router 'mixlora' found no MLP among the targets: it needs linears of role gate, up or down; add them to targets."
            )
        return blocks

    def install(self, model: nn.Module, sites: Sequence[Site], made: dict[str, SiteDelta], plan: Plan) -> dict[str, SiteDelta]:
        out = dict(made)
        for path, members in self._blocks(sites).items():
            key = f"{id(plan)}::{path}"
            site = block_site(model, path)
            inp = next((s.spec.inp for s in members if s.spec.role != "down"), site.spec.inp)
            router = TopK(inp, self.experts, self.k, self.balance, self.std, plan.generator("gate", path), site.device)
            for s in members:
                out[s.name] = ExpertSite(made[s.name], key, self.experts, plan.scales[s.name])
            out[path] = ExpertBlock(site, router, key)
        return out
