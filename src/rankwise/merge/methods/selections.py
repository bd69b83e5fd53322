"""Merges that look at all sources at once before they choose: sce by variance, nearswap by distance."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from rankwise.catalogue import register
from rankwise.errors import OptionError
from rankwise.merge.engine.base import share
from rankwise.merge.methods.entries import Entrywise
from rankwise.merge.methods.sparsify import _band

if TYPE_CHECKING:
    from rankwise.merge.engine.stack import Stack


@register(
    "merge", "sce", title="SCE: select by variance, weigh by energy, elect signs", paper="arXiv 2408.07990", exports_to_peft=True
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class SCE(Entrywise):
    """Keep the ``density`` share of entries whose variance across sources is largest; weigh each source by the mean of its kept
    squares; elect signs by Σ v_t; Σ w_t·v_t·[agree] / Σ w_t·[agree].  The given weights are not used.  Where no source differs
    nothing varies, and nothing is kept at a density below 1.

    Source: mergekit, ``sce`` (``select_topk`` is ``density``).  Errors: one source at a density below 1.
    """

    uses_weights: ClassVar[bool] = False
    density: float = 1.0

    def entries(self, stack: Stack, seed: int) -> Tensor:
        keep = None
        if self.density < 1:
            share("sce", "density", self.density)
            if len(stack.weights) < 2:
                raise OptionError("The merge 'sce' selects by variance across sources, and one has none; give two, or density = 1.")
            spread = torch.cat([stack.at(rows).var(0, unbiased=False).flatten() for rows in stack.blocks()])
            keep = _band(spread, 0, max(int(self.density * spread.numel()), 1))
        energy = torch.zeros(len(stack.weights), dtype=torch.float64)
        for rows in stack.blocks():
            energy += torch.linalg.vector_norm(_kept(stack, rows, keep), dim=(1, 2), dtype=torch.float64).square()
        total = energy.sum()
        w = (energy / total if total > 0 else torch.full_like(energy, 1 / len(energy))).to(stack.dtype).view(-1, 1, 1)
        made = torch.empty(stack.shape, dtype=stack.dtype)
        for rows in stack.blocks():
            kept = _kept(stack, rows, keep)
            agree = torch.where(kept.sum(0) >= 0, kept > 0, kept < 0) * w
            made[rows] = (agree * kept).sum(0) / agree.sum(0).clamp_min(1e-30)  # where nobody agrees, 0
        return made


def _kept(stack: Stack, rows: slice, keep: Callable[[Tensor, int], Tensor] | None) -> Tensor:
    x = stack.at(rows)
    return x if keep is None else x * (keep(x.var(0, unbiased=False), rows.start) != 0)


@register("merge", "nearswap", title="Nearswap: move only what is near", exports_to_peft=True)
@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearswap(Entrywise):
    """x_0 + c·(x_1 − x_0) with c = min(t/|x_1 − x_0|, 1): each entry goes at most t towards the second source.

    t = 0 is the first source, t → ∞ the second.  Weights are not used.  Source: mergekit, ``nearswap``.
    Errors: other than two sources; t < 0.
    """

    breaks: ClassVar[frozenset[str]] = frozenset({"one source", "order", "scale"})
    uses_weights: ClassVar[bool] = False
    count: ClassVar[int | None] = 2
    works_on: ClassVar[str] = "weights"
    t: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.t >= 0:
            raise OptionError(f"The merge 'nearswap' moves entries by at most t ≥ 0; it got t = {self.t}.")

    def join(self, kept: Tensor, w: Tensor) -> Tensor:
        step = kept[1] - kept[0]
        return kept[0] + step.clamp(-self.t, self.t)
