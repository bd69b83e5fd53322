"""AdaLoRA's budget: score every triplet, keep the best of all matrices, fewer and fewer of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from rankwise.allocation import Allocation, cubic, top_k
from rankwise.budgets.base import Budget, Run, agreed
from rankwise.catalogue import register
from rankwise.errors import OptionError, RecipeError
from rankwise.recipe import preset


@register(
    "budget",
    "adalora",
    title="AdaLoRA: a global, shrinking budget of triplets",
    paper="arXiv 2303.10512",
    reference="203",
    requires=("core:diag",),
)
@dataclasses.dataclass(kw_only=True)
class AdaLoRA(Budget):
    """Elementwise s = |w·∂w|; Ī ← β₁Ī + (1−β₁)s; Ū ← β₂Ū + (1−β₂)|s − Ī|; score(w) = Ī·Ū.

    Triplet i: S_i = score(λ_i) + mean_j score(A_ij) + mean_j score(B_ji).  The budget b(t) goes from Σ r₀ to
    ``target_r``·(sites) along a cubic between ``warmup`` and ``total − final``; every ``every`` steps, and at every step
    of the final phase, λ_i = 0 for all but the b(t) highest S over all matrices.  Scores stop moving in the final phase.
    A and B are not masked, so λ may grow back before the next mask; its moments are kept (as published), and so is the
    scale α/r₀.

    Scores here read p and its gradient both from before the step; published code takes p from after it.  Steps are
    optimiser steps, whatever the accumulation.

    Args:
        target_r: the mean rank a layer ends with.
        warmup, final: first steps without pruning, last ones with the final budget: counts, or shares of the run below 1.
        every: steps between two masks.
        beta1, beta2: of the running means Ī and Ū.

    Source: QingruZhang/AdaLoRA.  Errors: target_r above r₀; warm-up and final phase longer than the run; sharded parameters (FSDP2).
    """

    example: ClassVar[Mapping[str, Any]] = {
        "form": "svd",
        "r": 4,
        "budget": {"name": "adalora", "target_r": 2, "every": 2},
        "losses": ["orthogonality"],
    }
    target_r: int = 4
    warmup: float = 0.1
    final: float = 0.3
    every: int = 10
    beta1: float = 0.85
    beta2: float = 0.85

    def __post_init__(self) -> None:
        if self.target_r < 1 or self.every < 1 or not (0 < self.beta1 < 1 and 0 < self.beta2 < 1):
            raise OptionError("The budget 'adalora' needs target_r ≥ 1, every ≥ 1 and betas in (0, 1).")
        self._mean: dict[str, Tensor] = {}
        self._spread: dict[str, Tensor] = {}
        self.allocation: Allocation | None = None
        self._now = 0

    def start(self, run: Run) -> None:
        as_steps = lambda v: round(v * run.total_steps) if v < 1 else int(v)
        self._warm, self._final, self._total = as_steps(self.warmup), as_steps(self.final), run.total_steps
        if self._warm + self._final >= self._total:
            raise OptionError(
                f"The budget 'adalora' warms up for {self._warm} steps and fixes the last {self._final}, but the run has {self._total}; shorten them."
            )
        sharded = next((n for n, p in run.adapter.named_parameters().items() if hasattr(p, "placements")), None)
        if sharded is not None:
            raise RecipeError(
                f"The budget 'adalora' scores whole tensors, but {sharded!r} is sharded (DTensor); train it under DDP, or without a budget."
            )
        counts = self._components(run)
        self._first, self._last = sum(counts.values()), self.target_r * len(counts)
        if self._last > self._first:
            raise OptionError(
                f"The budget 'adalora' ends at target_r = {self.target_r}, above the {self._first / len(counts):g} it starts from; raise r."
            )

    def _components(self, run: Run) -> dict[str, int]:
        return {n: core.numel() for n, core in self._cores(run).items()}

    def _cores(self, run: Run) -> dict[str, Tensor]:
        """λ of every site that has triplets."""
        out: dict[str, Tensor] = {}
        for name, d in run.adapter.sites.items():
            if "core" in d.components:
                assert isinstance(d.core, Tensor)
                out[name] = d.core
        return out

    def budget(self, step: int) -> int:
        """Number of triplets at ``step``."""
        return round(cubic(step, self._first, self._last, self._warm, self._final, self._total))

    @torch.no_grad()
    def observe(self, run: Run) -> None:
        if run.step > self._total - self._final:
            return
        for name, p in run.adapter.named_parameters().items():
            if p.grad is None or name.split("::")[-1] not in ("A", "B", "core"):
                continue
            s = (p * p.grad).abs()
            if name not in self._mean:
                self._mean[name], self._spread[name] = torch.zeros_like(s), torch.zeros_like(s)
            mean = self._mean[name].mul_(self.beta1).add_(s, alpha=1 - self.beta1)
            self._spread[name].mul_(self.beta2).add_((s - mean).abs_(), alpha=1 - self.beta2)

    def scores(self, run: Run) -> dict[tuple[str, int], float]:
        """S of every triplet, keyed (site, index); higher is kept."""
        out: dict[tuple[str, int], float] = {}
        for site in self._components(run):
            part = {t: self._mean[k] * self._spread[k] for t in ("A", "B", "core") if (k := f"{site}::{t}") in self._mean}
            if len(part) == 3:
                total = part["core"] + part["A"].mean(-1) + part["B"].mean(-2)
                out |= {(site, i): v for i, v in enumerate(total.flatten().tolist())}
        return out

    @torch.no_grad()
    def after_update(self, run: Run) -> None:
        t = run.step
        settled = t > self._total - self._final
        if t <= self._warm or not (settled or t % self.every == 0 or t == self._total - self._final):
            return
        if not settled or self.allocation is None or t == self._total - self._final:
            kept = set(top_k(self.scores(run), self.budget(t)))
            masks = {site: tuple((site, i) in kept for i in range(n)) for site, n in self._components(run).items()}
            self.allocation = agreed(run, Allocation(masks=masks, ranks={n: sum(m) for n, m in masks.items()}))
        cores = self._cores(run)
        for site, mask in self.allocation.masks.items():
            core = cores[site]
            core.mul_(torch.tensor(mask, dtype=core.dtype, device=core.device).view(core.shape))
        run.logs["budget"] = float(self.budget(t))

    def state_dict(self) -> dict[str, Any]:
        kept = None if self.allocation is None else self.allocation.to_json()
        return {"mean": self._mean, "spread": self._spread, "allocation": kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._mean, self._spread = dict(state["mean"]), dict(state["spread"])
        self.allocation = None if state["allocation"] is None else Allocation.from_json(state["allocation"])

    def check(self, forms: Sequence[Any], recipe: Any) -> None:
        if self.target_r > max(p.r for p in recipe.all_parts()):
            raise OptionError(
                f"The budget 'adalora' ends at target_r = {self.target_r}, above r; raise r (1.5 times the target is usual)."
            )


preset("adalora", "AdaLoRA: SVD form, shrinking budget, soft orthogonality", form="svd", budget="adalora", losses=["orthogonality"])
