"""A linear whose loss has a known gradient, and batches for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class Loss(nn.Module):
    """A linear whose loss has a known weight gradient."""

    def __init__(self, inp: int = 12, out: int = 10):
        super().__init__()
        self.lin = nn.Linear(inp, out)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
        y = self.lin(x)
        return type("Out", (), {"loss": (y * labels).sum(), "logits": y})()


def batches(n: int = 3) -> list[dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, 12, generator=g), "labels": torch.randn(6, 10, generator=g)} for _ in range(n)]
