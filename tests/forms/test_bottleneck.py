from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import MergeError, TargetError
from tests.models import FAMILIES, batch_for, llama, logits, move


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


def _qwen2_moe() -> object:
    import transformers as T

    torch.manual_seed(0)
    config = T.Qwen2MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    return T.Qwen2MoeForCausalLM(config).eval()


@pytest.mark.parametrize("mode", ["after", "parallel"])
@pytest.mark.parametrize(
    ("make", "target"),
    [
        (FAMILIES["mixtral"][0], "mlp"),
        (FAMILIES["qwen3_moe"][0], "mlp"),
        (_qwen2_moe, "mlp"),
        (FAMILIES["gpt2"][0], "mlp"),
        (FAMILIES["gpt2"][0], "attn"),
        (FAMILIES["phi3"][0], "self_attn"),
        (FAMILIES["bert"][0], "attention"),
    ],
    ids=["mixtral", "qwen3 moe", "shared expert", "gpt2 mlp", "gpt2 attention", "fused qkv", "bert"],
)
def test_a_blocks_width_is_its_streams_whatever_its_last_linear(make: Any, target: str, mode: str) -> None:
    """A router or a shared expert's gate is a linear too, but its outputs are not the block's."""
    model = make()
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = rw.attach(model, {"form": {"name": "bottleneck", "mode": mode}, "r": 2, "targets": [target]})
    assert adapter.numel() == 2 * (2 * 64 + 2 + 32)
    assert torch.equal(logits(model, batch), base)
    move(adapter)
    assert (logits(model, batch) - base).abs().max() > 1e-4
