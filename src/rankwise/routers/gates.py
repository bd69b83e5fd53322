"""Gates of routed blocks: p = softmax(x̃·W_gᵀ) over the experts, and three ways to choose from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rankwise.routers.base import RouterModule, RoutingRecord, row_mask
from rankwise.routers.decision import Decision
from rankwise.routers.losses import switch, z_loss
from rankwise.seeds import seed_of


class Common(NamedTuple):
    """Arguments that every gate takes: W_g (E×in), the weight of its balance loss, the noise, and the noise's seed and name."""

    weight: Tensor
    balance: float
    jitter: float
    seed: int
    name: str


class Gate(RouterModule):
    """W_g: E×in, fp32.  In training x̃ = x ⊙ U(1 − jitter, 1 + jitter), for the gate alone; x itself is never written to.

    The noise is drawn from (seed, name, steps taken), so a recomputed forward draws the same; ``steps`` is counted by
    ``after_step``, so micro-batches of one step share the noise; a loop without a Session draws the same at each step.
    """

    sums_to_one = True  # whether a row's weights do; else the block's first output is not the base's
    steps: Tensor

    def __init__(self, common: Common):
        super().__init__()
        weight, self.balance, self.jitter, self.seed, self.name = common
        self.weight, self.experts = nn.Parameter(weight), len(weight)
        if self.jitter:
            self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device=weight.device))

    def route(self, x: Tensor, z: Tensor | None = None) -> Decision:
        """The decision for x (…, T, in), its rows in order; a capacity is per sequence of T."""
        rows = self._jittered(x.reshape(-1, x.shape[-1]).float())
        logits = rows @ self.weight.float().mT
        return self.select(logits, logits.softmax(-1), x.shape[-2])

    def _jittered(self, rows: Tensor) -> Tensor:
        if not (self.jitter and self.training):
            return rows
        g = torch.Generator(rows.device).manual_seed(seed_of(self.seed, "jitter", f"{self.name}:{int(self.steps)}"))
        noise = torch.empty(rows.shape, device=rows.device).uniform_(1 - self.jitter, 1 + self.jitter, generator=g)
        return rows * noise

    def select(self, logits: Tensor, probs: Tensor, length: int) -> Decision:
        """The decision for (N, E) logits and their softmax; each ``length`` rows are one sequence."""
        raise NotImplementedError(f"{type(self).__name__} must choose.")

    def losses(self, records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
        return {"switch": self.balance * switch(records, per="row")}

    @torch.no_grad()
    def after_step(self, records: Sequence[RoutingRecord]) -> None:
        if self.jitter:
            self.steps.add_(1)


class TopK(Gate):
    """The k likeliest experts, their p renormalised."""

    def __init__(self, k: int, common: Common):
        super().__init__(common)
        self.k = k

    def select(self, logits: Tensor, probs: Tensor, length: int) -> Decision:
        top = probs.topk(self.k, dim=-1)
        return Decision(top.values / top.values.sum(-1, keepdim=True), self.experts, index=top.indices, logits=logits, probs=probs)


class Cumulative(Gate):
    """The likeliest experts until their p sum to more than ``top_p``, the one that crosses it included; weights are p."""

    sums_to_one = False

    def __init__(self, top_p: float, common: Common):
        super().__init__(common)
        self.top_p = top_p

    def select(self, logits: Tensor, probs: Tensor, length: int) -> Decision:
        order = probs.argsort(dim=-1, descending=True, stable=True)
        ranked = probs.gather(-1, order)
        before = nn.functional.pad(ranked.detach().cumsum(-1)[:, :-1], (1, 0))
        weight = torch.zeros_like(probs).scatter(-1, order, ranked * (before <= self.top_p))
        return Decision(weight, self.experts, logits=logits, probs=probs)


class Capped(Gate):
    """The likeliest expert, weighted by its p, for the first ``capacity`` rows of a sequence that want it; none for the rest.

    Padding takes no capacity.  The balance loss counts what rows want, so that a crowded expert is told so.
    """

    sums_to_one = False

    def __init__(self, capacity: int, z: float, common: Common):
        super().__init__(common)
        self.capacity, self.z = capacity, z

    def select(self, logits: Tensor, probs: Tensor, length: int) -> Decision:
        best = probs.max(-1, keepdim=True)
        wanted = torch.zeros_like(probs, dtype=torch.int64).scatter_(-1, best.indices, 1)
        real = row_mask(len(probs), probs.device)
        counted = wanted if real is None else wanted * real[:, None]
        position = counted.view(-1, length, self.experts).cumsum(1).view_as(wanted)
        inside = (wanted * (position <= self.capacity)).to(probs.dtype)
        return Decision(best.values * inside, self.experts, logits=logits, probs=probs)

    def losses(self, records: Sequence[RoutingRecord]) -> dict[str, Tensor]:
        return {**super().losses([_wanted(r) for r in records]), "z": self.z * z_loss(records)}


def _wanted(record: RoutingRecord) -> RoutingRecord:
    """The record as if no expert had a capacity."""
    probs = record.decision.probs
    assert probs is not None
    index = probs.argmax(-1, keepdim=True)
    return RoutingRecord(dataclasses.replace(record.decision, weight=probs.gather(-1, index), index=index), record.mask)
