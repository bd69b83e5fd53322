"""Sources that others combine wrongly without a word: unlike ranks, alphas, rank-stabilised and DoRA, heads, ties; against PEFT's own merges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import MergeError
from rankwise.merge import attach_state, merge_states, read_state
from rankwise.merge.engine.folders import open_folders
from tests.models import batch_for, llama, logits, move

TARGETS = ["q_proj", "v_proj", "down_proj"]


def saved_by_peft(to: Path, seed: int, **config: Any) -> dict[str, torch.Tensor]:
    """An adapter that PEFT made, moved and saved; ΔW by parameter, from its own merge into the base."""
    peft = pytest.importorskip("peft")
    base = llama()
    before = {n: p.detach().clone() for n, p in base.named_parameters()}
    net = peft.get_peft_model(base, peft.LoraConfig(**{"target_modules": TARGETS, **config}))
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in net.named_parameters():
            if "lora_" in n:
                p.add_(0.2 * torch.randn(p.shape, generator=g))
    net.save_pretrained(to)
    merged = net.merge_and_unload()
    return {n: p.detach() - before[n] for n, p in merged.named_parameters()}


def test_unlike_ranks_alphas_and_scales_add_up_to_peft_s_own_merges(tmp_path: Path) -> None:
    configs = {
        "plain": {"r": 2, "lora_alpha": 8},
        "stabilised": {"r": 4, "lora_alpha": 6, "use_rslora": True},
        "patterns": {"r": 3, "lora_alpha": 3, "rank_pattern": {"v_proj": 5}, "alpha_pattern": {"q_proj": 12}},
        "some": {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]},
    }
    weights = [0.7, -0.4, 0.5, 1.2]
    changes = [saved_by_peft(tmp_path / n, i, **c) for i, (n, c) in enumerate(configs.items())]
    merged = merge_states(open_folders([tmp_path / n for n in configs]), weights)
    for n, d in merged.sites.items():
        want = sum(w * c[f"{n}.weight"] for w, c in zip(weights, changes, strict=True))
        assert torch.allclose(d.dense(), want, atol=1e-5) and float(want.norm()) > 0.1, n
    assert max(merged.meta["errors"].values()) < 1e-6
    one = merge_states(open_folders([tmp_path / "stabilised"]), [1.0])  # identity for every scaling rule
    assert all(torch.allclose(d.dense(), changes[1][f"{n}.weight"], atol=1e-6) for n, d in one.sites.items())


def test_dora_is_refused_without_its_model_and_exact_with_it(tmp_path: Path) -> None:
    dora = saved_by_peft(tmp_path / "dora", 0, r=2, lora_alpha=4, use_dora=True)
    lora = saved_by_peft(tmp_path / "lora", 1, r=3, lora_alpha=6)
    with pytest.raises(MergeError, match=r"magnitudes \(DoRA\).*depends? on W"):
        open_folders([tmp_path / "dora", tmp_path / "lora"])
    model = llama()
    with pytest.raises(MergeError, match="exact"):
        read_state(model, tmp_path / "dora")
    states = [read_state(model, tmp_path / n, rank=32) for n in ("dora", "lora")]
    merged = merge_states(states, [0.6, 0.4])
    for n, d in merged.sites.items():
        assert torch.allclose(d.dense(), 0.6 * dora[f"{n}.weight"] + 0.4 * lora[f"{n}.weight"], atol=1e-5), n
    cut = read_state(model, tmp_path / "dora", rank=2)
    assert 0 < max(cut.meta["errors"].values()) < 1, "what the cut loses is told"


def test_heads_saved_whole_are_carried_by_one_and_refused_by_two(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    for i, name in enumerate(("one", "two")):
        net = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=TARGETS, modules_to_save=["lm_head"]))
        with torch.no_grad():
            for n, p in net.named_parameters():
                if "lora_B" in n or "modules_to_save" in n:
                    p.add_(0.1 * (i + 1))
        net.save_pretrained(tmp_path / name)
    saved_by_peft(tmp_path / "plain", 3, r=2)
    with pytest.raises(MergeError, match=r"both hold 'lm_head\.weight' whole and differ"):
        merge_states(open_folders([tmp_path / "one", tmp_path / "two"]))
    kept = merge_states(open_folders([tmp_path / "one", tmp_path / "plain"]))
    model = llama()
    adapter = attach_state(model, kept)
    net = peft.PeftModel.from_pretrained(llama(), tmp_path / "one")
    head = net.base_model.model.lm_head.modules_to_save["default"].weight
    hidden = model.model(**{k: v for k, v in batch_for(model).items() if k != "labels"}).last_hidden_state
    assert torch.allclose(logits(model, batch_for(model)), hidden @ head.T, atol=1e-5)
    adapter.detach()


def test_tied_embeddings_are_merged_once(tmp_path: Path) -> None:
    """Two adapters at a tied embedding: the merged change acts at both ends, once, and folds into the one tensor."""
    states = []
    model = llama(tie=True)
    for seed in (0, 1):
        adapter = rw.attach(model, {"r": 2, "targets": ["embed_tokens"]}, name=str(seed))
        move(adapter, seed=seed)
        states.append(adapter.lower())
        adapter.detach()
    before = model.model.embed_tokens.weight.detach().clone()
    merged = merge_states(states, [0.5, 0.25])
    (name,) = merged.sites
    change = 0.5 * states[0].sites[name].dense() + 0.25 * states[1].sites[name].dense()
    adapter = attach_state(model, merged)
    batch = batch_for(model)
    acting = logits(model, batch)
    by_hand = llama(tie=True)
    with torch.no_grad():
        weight = by_hand.model.embed_tokens.weight
        weight.add_(change if change.shape == weight.shape else change.T)
    assert torch.allclose(acting, logits(by_hand, batch), atol=1e-5)
    adapter.merge()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.allclose(logits(model, batch), acting, atol=1e-5)
    adapter.detach()
    assert torch.equal(model.model.embed_tokens.weight, before)
