from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise as rw
from tests.forms.helpers import one
from tests.models import llama


def test_start_gradients_and_counts() -> None:
    model, adapter, d = one({})
    assert not d.B.any() and d.A.abs().max() <= 12**-0.5
    model(torch.randn(4, 12)).square().sum().backward()
    assert not d.A.grad.any() and d.B.grad.any()
    assert adapter.numel() == 3 * (12 + 10)


@pytest.mark.parametrize(("policy", "scale"), [("alpha/r", 16 / 4), ("alpha/sqrt_r", 16 / 2), ("constant", 16.0)])
def test_scale_policies(policy: str, scale: float) -> None:
    _, _, d = one({"r": 4, "alpha": 16, "scale": policy})
    assert d.scale == scale and d.delta().scale == scale


def test_first_step_drop_is_constant_in_r_for_rslora_and_falls_for_lora() -> None:
    """Mean first-order loss drop over draws of A: lr·s²·r·‖G‖²/(3·in)."""
    G = torch.randn(10, 12)
    for policy, by_r in (("alpha/sqrt_r", 1.0), ("alpha/r", 1 / 4)):
        drops = []
        for r in (2, 8):
            total = 0.0
            for seed in range(150):
                _, _, d = one({"r": r, "alpha": 4, "scale": policy, "seed": seed})
                total += float((d.scale * G @ d.A.T).square().sum())  # −ΔL per unit lr: ‖g_B‖²
            drops.append(total / 150)
            assert drops[-1] == pytest.approx(d.scale**2 * r * float(G.square().sum()) / (3 * 12), rel=0.1)
        assert drops[1] / drops[0] == pytest.approx(by_r, rel=0.15)


def test_rank_and_alpha_patterns() -> None:
    model = llama()
    adapter = rw.attach(
        model, {"r": 4, "alpha": 8, "rank_pattern": {"q": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"k_proj": 32}}
    )
    ranks = {n: d.A.shape[0] for n, d in adapter.sites.items()}
    assert (
        ranks["model.layers.0.self_attn.q_proj"] == 2
        and ranks["model.layers.1.mlp.up_proj"] == 6
        and ranks["model.layers.0.mlp.up_proj"] == 4
    )
    assert (
        adapter.sites["model.layers.0.self_attn.k_proj"].scale == 8 and adapter.sites["model.layers.0.self_attn.q_proj"].scale == 4
    )


def test_dropout_acts_in_training_only_and_not_on_the_base() -> None:
    model, _, d = one({"dropout": 0.5})
    x = torch.randn(64, 12)
    nn.init.normal_(d.B)
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    with rw.view(model, {}):
        assert torch.equal(model(x), model(x))


def test_tied_embedding_and_head_share_one_delta() -> None:
    model = llama(tie=True)
    adapter = rw.attach(model, {"targets": ["embed_tokens", "lm_head"], "r": 2})
    assert len(adapter.sites) == 1
    ids = torch.arange(3, 9)[None]
    base = model.model.embed_tokens.weight.detach().clone()
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.normal_(std=0.2)
        moved = model(ids).logits
        change = next(iter(adapter.sites.values())).delta().dense().T
        rw.activate(model, None)
        model.model.embed_tokens.weight.copy_(base + change)
        assert torch.allclose(model(ids).logits, moved, atol=1e-5), "both ends must see the same W + ΔW"
        model.model.embed_tokens.weight.copy_(base)
        rw.activate(model, "default")
    adapter.merge()
    assert torch.allclose(model(ids).logits, moved, atol=1e-5)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    adapter.detach()
    assert torch.equal(model.lm_head.weight, base)


@pytest.mark.parametrize(("r", "reached"), [(1, False), (2, True), (4, True)])
def test_a_teacher_whose_change_has_rank_two_is_reached_from_rank_two_on(r: int, reached: bool) -> None:
    model, adapter, _ = one({"r": r, "alpha": r})
    x, change = torch.randn(200, 12), torch.randn(10, 2) @ torch.randn(2, 12) / 3
    want = (model(x) + x @ change.T).detach()
    session = rw.Session(model, adapter, lr=3e-2, total_steps=400)
    for _ in range(400):
        session.step_begin()
        (nn.functional.mse_loss(model(x), want) + session.penalty(None, {})).backward()
        session.step()
    rest = nn.functional.mse_loss(model(x), want).item()
    least = torch.linalg.svdvals(change)[r:].square().sum().item() / 10  # E‖x·(ΔW − best)ᵀ‖² an output, x white
    assert rest < 1e-4 if reached else rest > least / 2


def _kept(change: torch.Tensor, whole: torch.Tensor, p: float) -> torch.Tensor:
    """Which rows of ``change`` are ``whole``'s over (1 − p); the others must be zero."""
    kept = change.abs().amax(-1) > 0
    assert torch.allclose(change[kept], whole[kept] / (1 - p), atol=1e-5), "a row is dropped whole or scaled"
    return kept


@pytest.mark.parametrize("tied", [False, True])
def test_dropout_at_an_embedding_drops_whole_rows(tied: bool) -> None:
    """A row of a table is looked up by a one-hot x, so dropping x's entries drops Δy's rows."""
    model = llama(tie=tied)
    adapter = rw.attach(model, {"r": 2, "dropout": 0.5, "targets": ["lm_head", "embed_tokens"] if tied else ["embed_tokens"]})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.normal_()
    table, ids = model.model.embed_tokens, torch.arange(3, 63).repeat(20, 1)
    base, whole = nn.functional.embedding(ids, table.weight), table(ids) - nn.functional.embedding(ids, table.weight)
    model.train()
    kept = _kept(table(ids) - base, whole, 0.5)
    assert 0.45 < kept.float().mean() < 0.55
    model.eval()
    assert torch.equal(table(ids) - base, whole)


def test_the_far_end_of_a_tie_has_its_dropout_too() -> None:
    model = llama(tie=True)
    adapter = rw.attach(model, {"r": 2, "dropout": 0.5, "targets": ["embed_tokens", "lm_head"]})
    with torch.no_grad():
        for p in adapter.trainable_parameters():
            p.normal_()
    h = torch.randn(4000, 32)
    plain = h @ model.lm_head.weight.T
    whole = model.lm_head(h) - plain
    model.train()
    first, second = (model.lm_head(h) - plain for _ in range(2))
    assert not torch.equal(first, second), "the head's input is not dropped"
    assert torch.allclose(first.mean(0), whole.mean(0), atol=0.6 * whole.std().item())
    one = torch.zeros(400, 32).index_fill_(1, torch.tensor([5]), 1.0)  # one feature: all of it is kept or dropped
    plain = one @ model.lm_head.weight.T
    dropped = model.lm_head(one) - plain
    model.eval()
    kept = _kept(dropped, model.lm_head(one) - plain, 0.5)
    assert 0.4 < kept.float().mean() < 0.6
