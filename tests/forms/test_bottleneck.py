from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import MergeError, TargetError
from tests.models import batch_for, llama, logits, move


@pytest.mark.parametrize("mode", ["after", "parallel"])
def test_it_is_the_two_layer_network_of_its_block(mode: str) -> None:
    model = llama()
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    y0 = mlp(x)
    adapter = rw.attach(
        model, {"form": {"name": "bottleneck", "mode": mode}, "r": 4, "alpha": 8, "targets": ["mlp"], "layers": [0]}
    )
    move(adapter)
    d = adapter.sites["model.layers.0.mlp"]
    z = y0 if mode == "after" else x
    want = y0 + 2.0 * (torch.nn.functional.gelu(z @ d.A.T + d.a) @ d.B.T + d.b)
    assert torch.allclose(mlp(x), want, atol=1e-5)
    with rw.view(model, {"default": 0.5}):
        assert torch.allclose(mlp(x), y0 + 0.5 * (want - y0), atol=1e-5)
    assert adapter.numel() == 4 * 64 + 4 + 32


def test_attention_returns_a_tuple_and_keeps_the_rest() -> None:
    model = llama()
    adapter = rw.attach(model, {"form": "bottleneck", "r": 2, "targets": ["self_attn"]})
    before = logits(model, batch_for(model))
    move(adapter)
    assert (logits(model, batch_for(model)) - before).abs().max() > 1e-3


def test_refusals() -> None:
    model = llama()
    with pytest.raises(TargetError, match="did you mean 'mlp'"):
        rw.attach(model, {"form": "bottleneck", "targets": ["mpl"]})
    adapter = rw.attach(model, {"form": "bottleneck", "r": 2})
    with pytest.raises(MergeError, match="cannot be merged"):
        adapter.merge()
    with pytest.raises(MergeError, match="the format 'peft'"):
        adapter.export("/nonexistent")
