"""Head groups and channels: a permutation of units at every site that holds a part of them changes nothing."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from rankwise.sites import Site, find_sites
from tests.models import FAMILIES, batch_for, logits

#: places of a family → groups it must tell (attention and MLP of each block); T5's heads have a bias elsewhere
GROUPS = {"llama": 4, "qwen3": 4, "gemma3": 4, "gpt2": 4, "gpt_neox": 4, "phi3": 4, "mixtral": 4, "qwen3_moe": 4, "bert": 4,
          "t5": 4, "vit": 4, "clip": 8, "whisper": 10, "mamba": 0}  # fmt: skip


def groups(model: Any) -> dict[str, list[Site]]:
    out: dict[str, list[Site]] = defaultdict(list)
    for site in find_sites(model).values():
        for axis in site.coupled_axes:
            out[axis.group].append(site)
    return out


def permute(site: Site, order: torch.Tensor) -> None:
    """Put the site's units in another order, its bias with its rows."""
    (axis,) = site.coupled_axes
    index = axis.index(order)
    site.write(site.read().index_select(-2 if axis.dim == 0 else -1, index))
    if axis.dim == 0 and site.bias is not None:
        rows = site.spec.row_index()
        rows = torch.arange(site.spec.out) if rows is None else rows
        site.module.bias.data[rows] = site.module.bias.data[rows[index]]


@pytest.mark.parametrize("family", list(FAMILIES))
def test_units_permuted_at_every_site_change_nothing_and_at_some_do(family: str) -> None:
    model = FAMILIES[family][0]()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2)
    batch = batch_for(model)
    before = logits(model, batch)
    found = groups(model)
    assert len(found) == GROUPS[family]
    for members in found.values():
        order = torch.arange(members[0].coupled_axes[0].units).roll(1)
        for site in members:
            permute(site, order)
    assert torch.allclose(logits(model, batch), before, atol=2e-4, rtol=1e-4)
    for group, members in found.items():
        snapshot = members[-1].snapshot()
        permute(members[-1], torch.arange(members[-1].coupled_axes[0].units).roll(1))
        assert (logits(model, batch) - before).abs().max() > 1e-3, group
        members[-1].restore(snapshot)


def test_query_heads_go_with_their_key_value_head() -> None:
    sites = find_sites(FAMILIES["llama"][0]())  # 4 query heads of 8 channels, 2 key/value heads
    q, k, v, o = (sites[f"model.layers.1.self_attn.{n}_proj"].coupled_axes[0] for n in "qkvo")
    assert {a.group for a in (q, k, v, o)} == {q.group} and [a.dim for a in (q, k, v, o)] == [0, 0, 0, 1]
    assert {a.units for a in (q, k, v, o)} == {2}
    assert q.index(1).tolist() == o.index(1).tolist() == list(range(16, 32))
    assert k.index(1).tolist() == v.index(1).tolist() == list(range(8, 16))
    assert not sites["lm_head"].coupled_axes and not sites["model.norm.weight"].coupled_axes


def test_a_layout_that_does_not_add_up_has_no_heads() -> None:
    mlps = ["model.layers.0.mlp#channels", "model.layers.1.mlp#channels"]
    wide = FAMILIES["llama"][0]()
    wide.model.layers[0].self_attn.v_proj = torch.nn.Linear(32, 24)
    assert sorted(groups(wide)) == sorted([*mlps, "model.layers.1.self_attn#heads"])
    odd = FAMILIES["llama"][0]()
    odd.config.num_attention_heads = 6
    assert sorted(groups(odd)) == mlps


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 1, "n_head": 4}),
        ("Olmo2", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}),
        ("GptOss", {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
                    "intermediate_size": 48, "num_local_experts": 2}),
    ],
)  # fmt: skip
def test_heads_that_something_else_tells_apart_are_not_coupled(family: str, options: dict) -> None:
    """Slopes by head, norms over all heads, sinks: a permutation of the sites alone would not be the same model."""
    import transformers as T

    model = getattr(T, f"{family}ForCausalLM")(getattr(T, f"{family}Config")(vocab_size=64, pad_token_id=0, **options))
    assert not any(g.endswith("#heads") for g in groups(model))
