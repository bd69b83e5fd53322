"""MixLoRA: a dense frozen MLP becomes a mixture whose experts are that MLP with different LoRAs."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import nn

from rankwise.catalogue import register
from rankwise.errors import OptionError, TargetError
from rankwise.routers.base import Router
from rankwise.routers.blocks import ExpertBlock, ExpertSite
from rankwise.routers.gates import Capped, Common, Cumulative, Gate, TopK
from rankwise.sites.discover import block_site

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer, Plan
    from rankwise.sites.site import Site

_IN_BLOCK = {"gate", "up", "down"}


#: variant → its options and their defaults
VARIANTS: dict[str, dict[str, Any]] = {
    "topk": {"k": 2, "jitter": 0.0, "std": 0.02},
    "dynamic": {"top_p": 0.8, "jitter": 0.0, "std": 0.02},
    "switch": {"capacity": 32, "z": 0.001, "jitter": 0.01, "std": 1.0},
}
#: option → (whether a value holds beside E experts, what is wanted)
RANGES: dict[str, tuple[Callable[[Any, int], bool], str]] = {
    "experts": (lambda v, E: v >= 1, "≥ 1"),
    "k": (lambda v, E: 1 <= v <= E, "from 1 to experts"),
    "top_p": (lambda v, E: 0 < v <= 1, "in (0, 1]"),
    "capacity": (lambda v, E: v >= 1, "≥ 1"),
    "z": (lambda v, E: 0 <= v < math.inf, "≥ 0 and finite"),
    "balance": (lambda v, E: 0 <= v < math.inf, "≥ 0 and finite"),
    "jitter": (lambda v, E: 0 <= v < 1, "in [0, 1)"),
    "std": (lambda v, E: 0 <= v < math.inf, "≥ 0 and finite"),
}


@register(
    "router",
    "mixlora",
    title="MixLoRA: top-k experts over a whole MLP block",
    paper="arXiv 2404.15159",
    reference="065",
    requires=("gate",),
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class MixLoRA(Router):
    """p = softmax(h·W_gᵀ) at the MLP's input h, a few experts I with weights w; y = Σ_{e∈I} w_e·F_e(h), F_e the MLP with ΔW_e.

    The activation stands between the linears, so mixing happens after the block.  The recipe's r is each expert's rank:
    gate, up and down hold E·r components, layers outside an MLP an ordinary LoRA of rank r.  The block runs on the
    (row, expert) pairs sorted by expert; base products of gate and up are made once for N rows and gathered.

    Args:
        experts: E.
        variant: how experts are chosen; options that it does not use are refused.
            topk: the ``k`` of largest p, w = p renormalised.
            dynamic: those of largest p until their sum exceeds ``top_p``, the crossing one included; w = p, not renormalised.
            switch: the one of largest p, w = p, for the first ``capacity`` rows of each sequence that choose it (padding takes
            none); later rows pass the block unchanged, y = h.  Adds ``z``·mean logsumexp².
        k: of topk (2).
        top_p: of dynamic (0.8).
        capacity: of switch (32).
        z: of switch (0.001).
        balance: weight of the balance loss, over the rows of all blocks together, counted per row as in the public code (topk: least k).
        jitter: in training the gate reads h ⊙ U(1 ± jitter) (0; switch 0.01).
        std: W_g: E×in ~ N(0, std²), fp32 (0.02; switch 1).

    Invariants: with equal ΔW_e topk's router does not matter; B = 0 is Σw times the base (topk: the base); the fast path equals the naive sum.
    Source: TUDB-Labs/MoE-PEFT, adapters/mixlora.  There topk and dynamic write the noise into the residual stream in place;
    switch multiplies rows that pass by p as well, and returns its input at inference: none of these was built.
    Errors: no MLP of gate/up/down linears among the targets; k > E; an option of another variant.
    """

    example: ClassVar[Mapping[str, Any]] = {"r": 2, "router": {"name": "mixlora", "experts": 4}}
    experts: int = 8
    variant: Literal["topk", "dynamic", "switch"] = "topk"
    k: int | None = None
    top_p: float | None = None
    capacity: int | None = None
    z: float | None = None
    balance: float = 0.001
    jitter: float | None = None
    std: float | None = None

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise OptionError(f"The router 'mixlora' has the variants {', '.join(VARIANTS)}; it got {self.variant!r}.")
        own = VARIANTS[self.variant]
        for option in ("k", "top_p", "capacity", "z", "jitter", "std"):
            if getattr(self, option) is None:
                object.__setattr__(self, option, own.get(option))
            elif option not in own:
                user = next(v for v, o in VARIANTS.items() if option in o)
                raise OptionError(
                    f"{option} = {getattr(self, option)} is an option of the variant {user!r} of 'mixlora', not of {self.variant!r}; drop it, or set variant."
                )
        for option, (holds, want) in RANGES.items():
            value = getattr(self, option)
            if value is not None and not holds(value, self.experts):
                raise OptionError(f"The router 'mixlora' needs {option} {want}; it got {value} with experts = {self.experts}.")

    def _gate(self, inp: int, path: str, plan: Plan, device: torch.device) -> Gate:
        own: Any = self  # every option of the variant is a number by now
        weight = torch.randn(self.experts, inp, generator=plan.generator("gate", path)) * own.std
        common = Common(weight.to(device), self.balance, own.jitter, plan.seed, path)
        if self.variant == "topk":
            gate: Gate = TopK(own.k, common)
        elif self.variant == "dynamic":
            gate = Cumulative(own.top_p, common)
        else:
            gate = Capped(own.capacity, own.z, common)
        gate.pool = repr(self)
        return gate

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

    def install(
        self, model: nn.Module, sites: Sequence[Site], made: dict[str, AdapterLayer], plan: Plan
    ) -> dict[str, AdapterLayer]:
        out = dict(made)
        for path, members in self._blocks(sites).items():
            key = f"{id(plan)}::{path}"
            site = block_site(model, path)
            inp = next((s.spec.inp for s in members if s.spec.role != "down"), site.spec.inp)
            if self.variant == "switch" and site.spec.inp != site.spec.out:
                raise TargetError(
                    f"The variant 'switch' lets rows pass {path!r} unchanged, but it takes {site.spec.inp} features and gives {site.spec.out}; use another variant."
                )
            router = self._gate(inp, path, plan, site.device)
            for s in members:
                out[s.name] = ExpertSite(made[s.name], key, self.experts, plan.scales[s.name])
            out[path] = ExpertBlock(site, router, key)
        return out
