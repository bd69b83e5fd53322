"""Roles by name, blocks by path, and the parts of fused projections, over the names that architectures use."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from rankwise.sites.roles import input_key, layer_of, parts_of, role_of


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.3.mlp", 3),
        ("transformer.h.11.attn.c_attn", 11),
        ("encoder.block.0.layer.1", 0),
        ("lm_head", -1),
        ("players.4.x", -1),
    ],
)
def test_the_block_of_a_path(path: str, layer: int) -> None:
    assert layer_of(path) == layer


@pytest.mark.parametrize(
    ("path", "role"),
    [
        ("model.layers.0.self_attn.q_proj", "q"), ("h.0.attn.c_attn", "qkv"), ("h.0.attn.c_proj", "o"), ("h.0.mlp.c_proj", "down"),
        ("encoder.layer.0.attention.output.dense", "o"), ("encoder.layer.0.intermediate.dense", "up"), ("encoder.layer.0.output.dense", "down"),
        ("block.0.layer.0.SelfAttention.o", "o"), ("block.0.layer.1.DenseReluDense.wo", "down"), ("layers.0.mixer.out_proj", "out"),
        ("lm_head", "head"), ("model.something_else", "something_else"),
    ],
)  # fmt: skip
def test_the_role_of_a_linear_layer(path: str, role: str) -> None:
    assert role_of(path, "linear") == role


def test_the_kind_decides_where_names_do_not() -> None:
    assert role_of("model.embed_tokens", "embedding") == "embed" and role_of("model.embed_tokens", "linear") == "embed_tokens"
    assert role_of("patch.projection", "conv") == "conv" and role_of("attn.q_proj", "conv") == "q"


def fused(
    model_type: str, heads: int, kv: int | None, out: int, role: str = "qkv"
) -> list[tuple[str, tuple[int, int], tuple[int, int]]]:
    config = SimpleNamespace(num_attention_heads=heads, num_key_value_heads=kv, hidden_size=32, model_type=model_type)
    model = nn.Module()
    model.config = config  # type: ignore[assignment]
    return list(parts_of(model, nn.Linear(32, out), role, out))


def test_a_fused_projection_is_cut_as_the_config_says() -> None:
    assert fused("phi3", 4, 2, 64) == [("q", (0, 32), (1, 0)), ("k", (32, 48), (1, 0)), ("v", (48, 64), (1, 0))]
    by_head = [("q", (0, 8), (4, 24)), ("k", (8, 16), (4, 24)), ("v", (16, 24), (4, 24))]
    assert fused("gpt_neox", 4, None, 96) == by_head, "q, k and v of one head stand together"
    assert fused("phi3", 4, 2, 64, "gate_up") == [("gate", (0, 32), (1, 0)), ("up", (32, 64), (1, 0))]


def test_what_does_not_add_up_has_no_parts() -> None:
    """A wrong guess would pair a part with another's rows."""
    assert (
        fused("phi3", 4, 2, 65)
        == []
        == fused("codegen", 4, None, 96)
        == fused("phi3", 0, None, 96)
        == fused("phi3", 4, 2, 65, "gate_up")
    )


def test_a_projection_of_torchs_attention_is_cut_in_three() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert [role for role, *_ in parts_of(nn.Module(), attention, "qkv", 24)] == ["q", "k", "v"]
    assert not list(parts_of(nn.Module(), attention, "qkv", 16))


def test_who_shares_an_input() -> None:
    a = "model.layers.0.self_attn"
    assert (
        input_key(f"{a}.q_proj", "q", 32)
        == input_key(f"{a}.v_proj", "v", 32)
        != input_key("model.layers.1.self_attn.q_proj", "q", 32)
    )
    assert (
        input_key("l.mlp.gate_proj", "gate", 32) == input_key("l.mlp.up_proj", "up", 32)
        and input_key("l.mlp.down_proj", "down", 32) == ""
    )
    cross = "decoder.layers.0.encoder_attn"
    assert input_key(f"{cross}.q_proj", "q", 32) != input_key(f"{cross}.k_proj", "k", 32) == input_key(f"{cross}.v_proj", "v", 32)
