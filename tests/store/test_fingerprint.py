"""The fingerprint knows a base again, and says what differs in another."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn

from rankwise.store.fingerprint import base_tensors, compare, fingerprint
from tests.store import store_models as models


def test_equal_for_the_same_base_and_small() -> None:
    a, b = fingerprint(models.llama()), fingerprint(copy.deepcopy(models.llama()))
    assert a == b and compare(a, b) == [] and json.loads(json.dumps(a)) == a
    deep = fingerprint(models.llama(num_hidden_layers=2))
    assert len(json.dumps(deep)) < 3000 and deep["shapes"]["model.layers.#.self_attn.q_proj.weight"] == [[32, 32], "float32", 2]


def test_an_attached_adapter_does_not_change_it() -> None:
    model = models.llama()
    before = fingerprint(model)
    child = nn.Module()
    child.extra = nn.Parameter(torch.ones(3))
    model.rankwise = child
    layer = model.model.layers[0].self_attn.q_proj
    layer.__class__ = type("Adapted", (type(layer),), {"__module__": "rankwise.place"})
    model.__class__ = type("LlamaForCausalLM_", (type(model),), {"__module__": "rankwise.place"})
    assert fingerprint(model) == before
    assert fingerprint(model, base_tensors(models.llama())) == before


def test_tied_weights_count_once() -> None:
    tied = models.llama(tie_word_embeddings=True)
    assert "lm_head.weight" not in fingerprint(tied)["shapes"]
    assert any("lm_head.weight" in d and "new" in d for d in compare(fingerprint(tied), fingerprint(models.llama())))


def test_differences_are_named() -> None:
    base = fingerprint(models.llama())
    wider = compare(base, fingerprint(models.llama(intermediate_size=64)))
    assert "model.layers.#.mlp.down_proj.weight is 2× 32×64 float32, not 2× 32×48 float32" in wider
    assert any("is 3×" in d for d in compare(base, fingerprint(models.llama(num_hidden_layers=3))))
    assert compare(base, fingerprint(models.gpt2()))[0] == "the class is 'GPT2LMHeadModel', not 'LlamaForCausalLM'"
    half = compare(base, fingerprint(models.llama().bfloat16()))
    assert any("bfloat16" in d for d in half)


def test_other_values_or_settings_are_content() -> None:
    base, other = fingerprint(models.llama()), models.llama()
    other.model.layers[1].mlp.up_proj.weight.data[-1, -1] += 1e-3
    difference = compare(base, fingerprint(other))
    assert len(difference) == 1 and difference[0].startswith("content: the weights")
    assert compare(base, fingerprint(other, content=False)) == []
    assert compare(base, fingerprint(models.llama(rope_parameters={"rope_type": "default", "rope_theta": 7.0})))[0].startswith(
        "content: the config"
    )


def test_layers_of_unequal_shape() -> None:
    a = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4), nn.Linear(4, 4))
    shapes = fingerprint(a)["shapes"]
    assert shapes["#.weight"] == [[3, 2], "float32", 1] and shapes["#.weight (2)"] == [[4, 3], "float32", 1]
    b = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5), nn.Linear(5, 4))
    assert compare(fingerprint(a), fingerprint(b))


def test_four_bit_codes_and_their_scales_both_count() -> None:
    """Two NF4 weights with equal codes and other scales are other bases."""
    bnb = pytest.importorskip("bitsandbytes")

    def quantised(scale: float) -> nn.Module:
        torch.manual_seed(0)
        linear = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32)
        linear.weight = bnb.nn.Params4bit(scale * torch.randn(64, 64), requires_grad=False, quant_type="nf4")
        return nn.Sequential(linear.to("cpu"))

    assert fingerprint(quantised(1.0)) == fingerprint(quantised(1.0))
    a, b = quantised(1.0), quantised(2.0)
    assert torch.equal(a[0].weight.data, b[0].weight.data)
    assert [d[:7] for d in compare(fingerprint(a), fingerprint(b))] == ["content"]


def test_one_changed_weight_anywhere_counts() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(70, 300))
    before = fingerprint(model)
    with torch.no_grad():
        model[0].weight[137, 41] += 1e-6
    after = fingerprint(model)
    assert before["content"] == after["content"], "the sample must not see it, or the test is void"
    assert compare(before, after)[0].startswith("content: the weights")
    with torch.no_grad():
        model[0].weight.copy_(model[0].weight.flip(0))
    assert compare(after, fingerprint(model))
    old = {k: v for k, v in before.items() if k not in ("whole", "buffers", "version")}
    assert compare(old, after) == [], "a file written before compares by what it has"


def test_swapped_weights_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64, bias=False))
    before = fingerprint(model)
    flat = model[0].weight.data.view(-1)
    for i, j in ((100, 101), (100, 1124)):
        flat[[i, j]] = flat[[j, i]]
        assert fingerprint(model)["whole"] != before["whole"]
        flat[[i, j]] = flat[[j, i]]
    assert fingerprint(model) == before


def test_persistent_buffers_count_and_others_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.register_buffer("cache", torch.zeros(3), persistent=False)
    before = fingerprint(model)
    model.cache += 1
    assert fingerprint(model) == before
    model[1].running_mean += 0.1
    assert [d[:20] for d in compare(before, fingerprint(model))] == ["content: the buffers"]


def test_odd_sizes_offsets_and_strides() -> None:
    store = torch.arange(9001, dtype=torch.float32).bfloat16()
    linear = nn.Module()
    linear.w = nn.Parameter(store[1:])
    other = nn.Module()
    other.w = nn.Parameter(store[1:].clone())
    assert fingerprint(linear)["whole"] == fingerprint(other)["whole"]
    other.w.data[-1] = 0
    assert fingerprint(linear)["whole"] != fingerprint(other)["whole"]
