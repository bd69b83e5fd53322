"""Values for the tiny Llama, and the model with a value written into its weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from rankwise.delta import AdapterState, LowRank
from tests.models import llama

SITES = tuple(f"model.layers.{i}.{m}" for i in range(2) for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj"))


def value(seed: int, r: int = 2, size: float = 0.15, sites: tuple[str, ...] = SITES) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    net = llama()
    made = {}
    for n in sites:
        out, inp = net.get_submodule(n).weight.shape
        made[n] = LowRank(size * torch.randn(r, inp, generator=g), torch.randn(out, r, generator=g), 0.8)
    return AdapterState(made)


def copy_with(state: AdapterState) -> Any:
    """A fresh model whose weights are W + ΔW."""
    net = llama()
    with torch.no_grad():
        for n, d in state.sites.items():
            w = net.get_submodule(n).weight
            w.copy_(w + d.dense().to(w.dtype))
    return net


class Net(torch.nn.Module):
    """Three linears and two tanh, in whatever precision it is cast to throughout (a Llama's norms and loss are fp32)."""

    def __init__(self, inner: int = 12) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(8, inner)
        self.inner = torch.nn.Linear(inner, inner)
        self.head = torch.nn.Linear(inner, 5)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        logits = self.head(torch.tanh(self.inner(torch.tanh(self.first(x)))))
        loss = None if labels is None else torch.nn.functional.cross_entropy(logits, labels)
        return SimpleNamespace(logits=logits, loss=loss)


def net_batch(seed: int = 1, rows: int = 16) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 8, generator=g), "labels": torch.randint(0, 5, (rows,), generator=g)}


def net_value(seed: int, r: int = 2, size: float = 0.3) -> AdapterState:
    g = torch.Generator().manual_seed(seed)
    shapes = {n: m.weight.shape for n, m in Net().named_children()}
    return AdapterState(
        {n: LowRank(size * torch.randn(r, i, generator=g), torch.randn(o, r, generator=g)) for n, (o, i) in shapes.items()}
    )
