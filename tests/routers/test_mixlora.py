"""MixLoRA: the block is the naive sum over its experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import OptionError, RecipeError, TargetError
from tests.models import batch_for, llama, logits, move


def mixlora(**options: Any) -> tuple[Any, Any]:
    model = llama()
    adapter = rw.attach(model, {"r": 2, "router": {"name": "mixlora", "experts": 4, **options}})
    move(adapter, std=0.3)
    return model, adapter


def naive_block(model: Any, adapter: Any, layer: int, h: Tensor) -> Tensor:
    """Σ_e w_e·F_e(h), one expert after the other, from the plain weights."""
    path = f"model.layers.{layer}.mlp"
    mlp, block = model.model.layers[layer].mlp, adapter.sites[path]
    decision = block.router.route(h)
    y = torch.zeros_like(h)

    def weight(name: str, e: int) -> Tensor:
        d = adapter.sites[f"{path}.{name}_proj"]
        A, B = d.inner.A[2 * e : 2 * e + 2], d.inner.B[:, 2 * e : 2 * e + 2]
        return getattr(mlp, f"{name}_proj").weight + d.scale * B @ A

    for e in range(4):
        f = torch.nn.functional.silu(h @ weight("gate", e).T) * (h @ weight("up", e).T) @ weight("down", e).T
        y = y + decision.dense()[:, e : e + 1] * f
    return y


def test_the_block_is_the_naive_sum_over_experts() -> None:
    model, adapter = mixlora()
    h = torch.randn(2, 7, 32)
    got = model.model.layers[1].mlp(h)
    assert torch.allclose(got.reshape(-1, 32), naive_block(model, adapter, 1, h.reshape(-1, 32)), atol=1e-5)


def test_equal_experts_make_the_router_irrelevant() -> None:
    model, adapter = mixlora()
    with torch.no_grad():
        for name, d in adapter.sites.items():
            if hasattr(d, "experts"):
                d.inner.A.copy_(d.inner.A[:2].repeat(4, 1))
                d.inner.B.copy_(d.inner.B[:, :2].repeat(1, 4))
    batch = batch_for(model)
    before = logits(model, batch)
    with torch.no_grad():
        for name, d in adapter.sites.items():
            if name.endswith(".mlp"):
                d.router.weight.normal_()
    assert torch.allclose(logits(model, batch), before, atol=1e-5)


def test_attention_keeps_an_ordinary_pair() -> None:
    _, adapter = mixlora()
    assert adapter.sites["model.layers.0.self_attn.q_proj"].A.shape[0] == 2
    assert adapter.sites["model.layers.0.mlp.up_proj"].inner.A.shape[0] == 8


def test_rows_and_strengths_reach_inside_blocks() -> None:
    model, _ = mixlora()
    batch = batch_for(model)
    with rw.view(model, {"default": 1}, rows=["default", None, "default"]):
        mixed = logits(model, batch)
    with rw.view(model, {}):
        assert torch.allclose(mixed[1], logits(model, batch)[1], atol=1e-5)
    assert torch.allclose(mixed[0], logits(model, batch)[0], atol=1e-5)


def test_mixlora_refuses() -> None:
    with pytest.raises(OptionError, match="'mixlora'"):
        rw.Recipe(router={"name": "mixlora", "k": 9})
    with pytest.raises(TargetError, match="no MLP"):
        rw.attach(llama(), {"r": 2, "targets": ["q"], "router": "mixlora"})
    with pytest.raises(RecipeError, match="gives 'gate'"):
        rw.Recipe(form="paca", router="mixlora")
    with pytest.raises(RecipeError, match="would gate"):
        rw.attach(llama(), {"r": 8, "init": "pissa", "router": {"name": "smora", "k": 2}})


def test_parts_of_a_fused_projection_are_refused_and_down_alone_is_routed() -> None:
    from tests.models import FAMILIES

    with pytest.raises(TargetError, match=r"gate_up_proj\[gate\]' to experts"):
        rw.attach(FAMILIES["phi3"][0](), {"r": 2, "targets": ["gate", "up", "down_proj"], "router": "mixlora"})
    model = FAMILIES["phi3"][0]()
    adapter = rw.attach(model, {"r": 2, "targets": ["down_proj"], "router": {"name": "mixlora", "experts": 3, "k": 2}})
    assert adapter.sites["model.layers.0.mlp"].router.weight.shape == (3, 32)
    assert torch.isfinite(logits(model, batch_for(model))).all()
