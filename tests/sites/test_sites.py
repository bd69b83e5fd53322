"""Sites: found by role, read and written through one door, named by targets that must match."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.errors import TargetError
from rankwise.sites import find_sites, resolve
from rankwise.sites.spec import SiteSpec
from tests.models import FAMILIES, VOCAB, llama


def test_roles_of_a_llama() -> None:
    sites = find_sites(llama(tie=True))
    roles = {s.spec.role for s in sites.values() if s.spec.layer == 0 and s.spec.mode == "called"}
    assert roles == {"q", "k", "v", "o", "gate", "up", "down"}
    assert (
        sites["lm_head"].spec.role == "head" and sites["lm_head"].spec.tie_group == sites["model.embed_tokens"].spec.tie_group != ""
    )
    q, k = (sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    assert q.spec.input_group == k.spec.input_group != "" and q.spec.out == 2 * k.spec.out


@pytest.mark.parametrize("family", list(FAMILIES))
def test_read_write_restore_keep_bits(family: str) -> None:
    model = FAMILIES[family][0]()
    for site in find_sites(model).values():
        before = site.param.detach().clone()
        W = site.read().clone()
        assert W.shape == site.spec.shape
        snapshot = site.snapshot()
        stored = site.write(W + 1)
        assert torch.equal(stored, W + 1), site.name
        if site.spec.rows is not None:  # only this part's rows moved
            moved = (site.view(site.param) - site.view(before)).abs().sum()
            assert torch.isclose((site.param - before).abs().sum(), moved)
        site.restore(snapshot)
        assert torch.equal(site.param, before)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "gpt_neox"])
def test_parts_of_a_fused_projection_cover_it_once(family: str) -> None:
    model = FAMILIES[family][0]()
    sites = find_sites(model)
    whole = next(s for s in sites.values() if s.spec.role == "qkv")
    parts = [sites[f"{whole.name}[{p}]"] for p in "qkv"]
    rows = torch.cat([p.spec.row_index() for p in parts])
    assert sorted(rows.tolist()) == list(range(whole.spec.out))
    x = torch.randn(3, whole.spec.inp)
    full = whole.base_out(x)
    assert all(torch.allclose(p.base_out(x), full[:, p.spec.row_index()]) for p in parts)


def test_neox_keeps_each_heads_q_k_v_together() -> None:
    site = find_sites(FAMILIES["gpt_neox"][0]())["gpt_neox.layers.0.attention.query_key_value[k]"]
    assert site.spec.row_index().tolist()[:9] == [8, 9, 10, 11, 12, 13, 14, 15, 32]


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.mark.parametrize(
    ("family", "options", "parts"),
    [
        ("Bloom", {"vocab_size": VOCAB, "hidden_size": 32, "n_layer": 1, "n_head": 4}, 3),
        ("Falcon", {**SMALL, "multi_query": False}, 3),
        ("Falcon", {**SMALL, "num_kv_heads": 2, "new_decoder_architecture": True}, 0),
        ("Persimmon", {**SMALL, "intermediate_size": 48}, 3),
        ("GPTBigCode", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "multi_query": False}, 3),
        ("GPTBigCode", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4}, 3),
        ("CodeGen", {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 1, "n_head": 4, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2}, 0),
        ("Mpt", {"vocab_size": VOCAB, "d_model": 32, "n_layers": 1, "n_heads": 4}, 3),
    ],
)  # fmt: skip
def test_the_values_of_a_fused_projection_are_its_values(family: str, options: dict, parts: int) -> None:
    """With every value zero, attention gives nothing; a layout that is not known has no parts rather than wrong ones."""
    import transformers as T

    torch.manual_seed(0)
    model = getattr(T, f"{family}ForCausalLM")(getattr(T, f"{family}Config")(**options)).eval()
    sites = find_sites(model)
    found = {s.spec.role: s for s in sites.values() if s.spec.rows is not None}
    assert len(found) == parts and {"q", "k", "v"} >= found.keys()
    seen: list[float] = []
    (out,) = (
        s.module for s in sites.values() if s.spec.name.endswith(("attention.dense", "attn.dense", "attn.c_proj", "out_proj"))
    )
    out.register_forward_pre_hook(lambda _, args: seen.append(args[0].abs().max().item()))
    for role in found:
        site = found[role]
        whole = site.snapshot()
        site.write(torch.zeros(site.spec.shape))
        if site.bias is not None:
            site.module.bias.data[site.spec.row_index()] = 0
        with torch.no_grad():
            model(input_ids=torch.arange(3, 12)[None])
        assert (seen.pop() == 0) == (role == "v"), role
        site.restore(whole)


def test_expert_stacks_are_one_site_with_a_leading_axis() -> None:
    site = find_sites(FAMILIES["mixtral"][0]())["model.layers.0.mlp.experts.gate_up_proj"]
    assert site.spec.shape == (4, 96, 32) and site.spec.mode == "read"


def test_specs_survive_json() -> None:
    for site in find_sites(FAMILIES["gpt_neox"][0]()).values():
        assert SiteSpec.from_json(site.spec.to_json()) == site.spec


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj", "v_proj"], 4),
        (["q", "gate"], 4),
        (r".*\.1\..*proj", 7),
        (["model.layers.[01].mlp.*"], 6),
        (["lm_head"], 1),
    ],
)
def test_targets(targets: object, count: int) -> None:
    assert len(resolve(find_sites(llama()), targets)) == count  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"targets": ["q_proj", "v_porj"]}, "'v_porj'.*did you mean 'v_proj'"),
        ({"targets": "nothing.*"}, "matches no module"),
        ({"targets": "("}, "valid pattern"),
        ({"targets": []}, "empty"),
        ({"targets": ["q_proj"], "exclude": ["k_porj"]}, "exclusion 'k_porj'"),
        ({"targets": ["q_proj"], "exclude": ["q_proj"]}, "No module is left"),
        ({"targets": ["q_proj"], "layers": [7]}, "block 7"),
        ({"targets": ["embed_tokens"], "kinds": ("linear",)}, "cannot adapt"),
    ],
)
def test_a_target_that_matches_nothing_is_refused(options: dict, says: str) -> None:
    with pytest.raises(TargetError, match=says):
        resolve(find_sites(llama()), **options)


def test_whole_and_part_together_are_refused() -> None:
    with pytest.raises(TargetError, match="both"):
        resolve(find_sites(FAMILIES["phi3"][0]()), ["qkv_proj", "q"])


def test_weights_that_another_forward_reads() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True))
    sites = find_sites(model)
    assert (
        sites["0.in_proj_weight"].spec.mode == "read"
        and sites["0.out_proj"].spec.mode == "read"
        and sites["1.linear1"].spec.mode == "read"
    )
    assert sites["0.in_proj_weight[k]"].spec.rows == (8, 16)
