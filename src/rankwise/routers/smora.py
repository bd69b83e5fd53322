"""SMoRA: the rank-one components of one LoRA are the experts; a router turns on k of them for each token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.routers.base import Routed, Router, RouterModule, RoutingRecord
from rankwise.routers.decision import Decision

if TYPE_CHECKING:
    from rankwise.forms.base import AdapterLayer, Plan
    from rankwise.sites.site import Site


class RankRouter(RouterModule):
    """W_g: (R/p)×in trained, b: (R,) a buffer that only the balancing rule changes.

    Args:
        inp: input features.
        r: R, components.
        k: components per token.
        p: components that share a score.
        u: step of the balancing rule.
        bias_in_value: whether b enters the gate's value.
        g: generator of W_g's initial values, on the CPU.
        device: of the tensors.
    """

    bias: Tensor

    def __init__(self, inp: int, r: int, k: int, p: int, u: float, bias_in_value: bool, g: torch.Generator, device: torch.device):
        super().__init__()
        self.r, self.k, self.p, self.u, self.bias_in_value = r, k, p, u, bias_in_value
        bound = 1 / math.sqrt(inp)
        self.weight = nn.Parameter(torch.empty(r // p, inp).uniform_(-bound, bound, generator=g).to(device))
        self.register_buffer("bias", torch.zeros(r, device=device))

    def route(self, x: Tensor, z: Tensor | None = None) -> Decision:
        q = torch.sigmoid(x.float() @ self.weight.float().mT).repeat_interleave(self.p, dim=-1)
        t = q + self.bias
        chosen = t.topk(self.k, dim=-1).indices
        value = (t if self.bias_in_value else q).gather(-1, chosen)
        weight = self.k * value / value.sum(-1, keepdim=True).clamp_min(1e-6)  # b may drift towards −q
        return Decision(weight, self.r, index=chosen)

    def after_step(self, records: Sequence[RoutingRecord]) -> None:
        counts = torch.stack([r.decision.counts(r.mask) for r in records]).sum(0)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(counts)
        self.bias.add_(torch.sign(counts.mean() - counts), alpha=self.u)


@register(
    "router",
    "smora",
    title="SMoRA: rank-wise mixture, balanced by a bias",
    paper="arXiv 2501.15103",
    reference="009",
    requires=("gate",),
    mergeable=False,
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SMoRA(Router):
    """q = σ(x̃·W_gᵀ), t = q + b, I = top-k(t), g_i = k·t_i/Σ_{j∈I} t_j on I, Δy = (α/k)·B(g ⊙ A·x̃); x̃ the dropped x.

    R = the recipe's r components, k of them on for each token; W_g: (R/p)×in, repeated p times (blocks of p share a
    score).  After each optimiser step b_i += u·sign(mean(c) − c_i), c the choices of the step's tokens; no auxiliary loss.
    Trains R(in + out) + (R/p)·in parameters.  The released code updates b inside the forward, which counts recomputed
    forwards twice; here it is updated once a step.

    Args:
        k: components per token.
        p: components that share a score.
        u: step of the balancing rule.
        bias_in_value: b enters the gate's value as well as the choice, as in the released code; False is the usual
            selection-only bias.

    Invariants: Σg = k; k = R, W_g = 0, b = 0 is LoRA at scale α/k.  Source: StyxXuan/smora, tuners/srmole/layer.py.
    Errors: k outside 1…R; p that does not divide R.
    """

    example: ClassVar[Mapping[str, Any]] = {"r": 8, "router": {"name": "smora", "k": 4}}
    k: int = 8
    p: int = 1
    u: float = 1e-5
    bias_in_value: bool = True

    def __post_init__(self) -> None:
        if self.k < 1 or self.p < 1 or self.u < 0:
            raise OptionError(f"The router 'smora' needs k ≥ 1, p ≥ 1 and u ≥ 0; it got {self.k}, {self.p}, {self.u}.")

    def check(self, form: Any, part: Any) -> None:
        for r in {part.r, *part.rank_pattern.values()}:
            if self.k > r or r % self.p:
                raise OptionError(
                    f"The router 'smora' turns on k = {self.k} of r = {r} components in blocks of p = {self.p}; it needs k ≤ r and p to divide r."
                )

    def install(
        self, model: nn.Module, sites: Sequence[Site], made: dict[str, AdapterLayer], plan: Plan
    ) -> dict[str, AdapterLayer]:
        out: dict[str, AdapterLayer] = {}
        for s in sites:
            if s.spec.kind != "linear" or s.spec.mode != "called":
                raise OptionError(
                    f"The router 'smora' gates rows of a linear that is called; {s.name!r} is a {s.spec.mode} {s.spec.kind}; exclude it."
                )
            r = plan.ranks[s.name]
            router = RankRouter(s.spec.inp, r, self.k, self.p, self.u, self.bias_in_value, plan.generator("gate", s.name), s.device)
            out[s.name] = Routed(made[s.name], router, plan.scales[s.name] * r / self.k)
        return out
