"""Models whose every part shows in the logits, adapters at every linear, and a forward on simulated devices."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.serve.adapters.layout import Layout
from rankwise.serve.ops.base import Pairs
from rankwise.serve.parallel.experimental.cutting import cut_model
from rankwise.serve.parallel.experimental.shares import Share, shares
from rankwise.serve.simulate.reference import install
from rankwise.serve.simulate.ring import Ring
from tests.models import _IDS, _LLAMA, FAMILIES, _text

MAKERS = {k: m for k, (m, _) in FAMILIES.items()} | {"qwen2": _text("Qwen2ForCausalLM", "Qwen2Config", **_LLAMA, **_IDS)}


def wide(family: str) -> Any:
    """A small model with weights and biases large enough that a wrong one shows."""
    model = MAKERS[family]()
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() == 2:
                p.mul_(3)
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=g) * 0.3)
    return model


def pairs_for(model: Any, rank: int, seed: int = 0, size: float = 0.15) -> dict[str, Pairs]:
    """One adapter of this rank at every linear but the head."""
    g = torch.Generator().manual_seed(seed)
    return {
        group.name: tuple(
            (torch.randn(rank, group.inp, generator=g) * size, torch.randn(out, rank, generator=g) * size) for out in group.outs
        )
        for group in Layout(model).groups
    }


def merge(model: Any, pairs: Mapping[str, Pairs]) -> None:
    """Fold an adapter into the weights."""
    modules = {g.name: g.modules for g in Layout(model).groups}
    with torch.no_grad():
        for name, those in pairs.items():
            for path, pair in zip(modules[name], those, strict=True):
                if pair is not None:
                    model.get_submodule(path).weight += pair[1] @ pair[0]


def forward(
    model: Any, ids: Tensor, size: int, pairs: Mapping[str, Pairs] | None = None, split: bool = True, ring: Ring | None = None
) -> Tensor:
    """The first device's logits of ``model`` on ``size`` devices, by the definition."""
    ring = ring or Ring(size)
    made = shares(model, Layout(model), size)

    @torch.no_grad()
    def program(share: Share, comm: Any) -> Tensor:
        local: Any = cut_model(model, share)
        install(local, share, comm, pairs or {}, split)
        return local(input_ids=ids, use_cache=False).logits

    return ring.run([lambda comm, share=share: program(share, comm) for share in made])[0]
