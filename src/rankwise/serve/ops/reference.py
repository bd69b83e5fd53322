"""Segment after segment, two plain products in fp32 or above: slow, and what all other operators are held to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.serve.ops.step import Op

if TYPE_CHECKING:
    from rankwise.serve.ops.base import Group


class ReferenceOp(Op):
    """y[segment] += (x[segment] Aᵀ) Bᵀ with A and B read out of the pages."""

    name = "reference"

    def shrink(self, group: Group, x: Tensor) -> Tensor:
        return x

    def expand(self, group: Group, j: int, v: Tensor, y: Tensor) -> None:
        for run in self.step.runs(group):
            A, B = (t.to(torch.promote_types(t.dtype, torch.float32)) for t in self.pages.read(run.pages, group.name, j))
            change = v[run.start : run.end].to(A.dtype) @ A.t() @ B.t()
            y[run.start : run.end] += change.to(y.dtype)
