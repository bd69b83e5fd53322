"""All adapters of the step side by side as one of rank Σr, and a mask that leaves each row its own components."""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.serve.ops.base import WIDTH, Group
from rankwise.serve.ops.grouped import stacked_A, stacked_B
from rankwise.serve.ops.step import Op, RowRun

Kept = tuple[list[int], Tensor, int, int]


class ConcatOp(Op):
    """Stacked factors and a mask: work and memory grow with rows times adapters, so for few adapters on many short segments."""

    name = "cat"

    def shrink(self, group: Group, x: Tensor) -> tuple[Kept, Tensor] | None:
        """Masked v: (rows, m, pages, WIDTH)."""
        if not self.step.runs(group):
            return None
        kept = self.step.kept(group, self._kept)
        pages, mask, lo, hi = kept
        v = torch.matmul(x[lo:hi].to(self.pages.dtype), stacked_A(self.pages, group, pages))
        v = torch.where(mask, v.view(len(pages), hi - lo, -1, WIDTH), 0)
        return kept, v.permute(1, 2, 0, 3).contiguous()

    def expand(self, group: Group, j: int, v: tuple[Kept, Tensor] | None, y: Tensor) -> None:
        if v is None:
            return
        (pages, _, lo, hi), masked = v
        B = stacked_B(self.pages, group, j, pages).reshape(-1, group.outs[j])
        y[lo:hi] += (masked[:, j].flatten(1) @ B).to(y.dtype)

    def _kept(self, group: Group, runs: tuple[RowRun, ...]) -> Kept:
        lo, hi = runs[0].start, runs[-1].end
        pages = list(dict.fromkeys(c for run in runs for c in run.pages))
        mask = torch.zeros(len(pages), hi - lo, 1, 1, dtype=torch.bool)
        for run in runs:
            for c in run.pages:
                mask[pages.index(c), run.start - lo : run.end - lo] = True
        return pages, mask, lo, hi
