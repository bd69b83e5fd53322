"""Cuts of the base: every family that is served, alone and on devices; the others are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankwise.errors import AttachError, OptionError
from rankwise.serve.adapters.layout import Layout
from rankwise.serve.parallel.experimental.cutting import cut_model
from rankwise.serve.parallel.experimental.shares import heads_of, shares
from tests.models import FAMILIES, llama
from tests.serve.parallel.rig import forward, wide

SERVED = ("llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox")


@pytest.mark.parametrize("heads,kv", [(4, 2), (6, 2), (8, 2), (4, 4), (6, 3), (8, 1), (12, 4)])
def test_each_query_head_finds_its_own_key_head(heads: int, kv: int) -> None:
    for size in range(1, heads + 1):
        held = [heads_of(heads, kv, n, size) for n in range(size)]
        assert [h for q, _ in held for h in q] == list(range(heads))
        for q, k in held:
            assert not len(q) % len(k)
            assert [h // (heads // kv) for h in q] == [k[i // (len(q) // len(k))] for i in range(len(q))]
        if size <= kv:
            assert [h for _, k in held for h in k] == list(range(kv))


@pytest.mark.parametrize("family", SERVED)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_devices_together_give_the_models_logits(family: str, size: int) -> None:
    model = wide(family)
    ids = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = model(input_ids=ids).logits
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = forward(model, ids, size)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_device_holds_its_part_only() -> None:
    model = llama(layers=1, hidden=32)
    layout = Layout(model)
    for n, share in enumerate(shares(model, layout, 2)):
        local: Any = cut_model(model, share)
        attention, mlp = local.model.layers[0].self_attn, local.model.layers[0].mlp
        assert attention.q_proj.weight.shape == (16, 32) and attention.k_proj.weight.shape == (8, 32)
        assert attention.o_proj.weight.shape == (32, 16) and mlp.down_proj.weight.shape == (32, 24)
        assert torch.equal(attention.k_proj.weight, model.model.layers[0].self_attn.k_proj.weight[8 * n : 8 * n + 8])
        assert attention.k_proj.weight.untyped_storage().nbytes() == 8 * 32 * 4, "the whole weight is kept alive"
        assert local.lm_head.weight.shape == ((0, 32) if n else (64, 32)), "the head is the first device's alone"
        assert not n or not local.lm_head.weight.untyped_storage().nbytes()


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "mamba"])
def test_what_cannot_be_cut_is_refused_by_name(family: str) -> None:
    model = FAMILIES[family][0]()
    with pytest.raises(AttachError, match=rf"{type(model).__name__} cannot be cut at .*Llama, Mistral, Qwen2"):
        shares(model, Layout(model), 2)


def test_more_devices_than_heads_and_none_at_all() -> None:
    model = llama()
    with pytest.raises(AttachError, match="has 4 query heads at model.layers.0.self_attn, too few for 5 devices"):
        shares(model, Layout(model), 5)
    with pytest.raises(OptionError, match="0 devices"):
        shares(model, Layout(model), 0)
