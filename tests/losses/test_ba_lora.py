"""BA-LoRA: each term against its definition, the original model as teacher."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from rankwise.errors import DataError, OptionError
from rankwise.losses.ba_lora import BALoRA, concentration, consistency, decorrelation
from tests.models import batch_for, llama, move


def out(z: torch.Tensor) -> Any:
    return type("Out", (), {"logits": z})()


def test_parts_of_ba_lora() -> None:
    Z = torch.randn(6, 5, dtype=torch.float64)
    assert consistency(Z, 3 * Z) == pytest.approx(0.0, abs=1e-12)
    assert consistency(Z, -Z) == pytest.approx(4 / 5)
    C = torch.cov(Z.T)
    assert decorrelation(Z) == pytest.approx(((C**2).sum() - (C.diagonal() ** 2).sum()).item() / 5)
    S = torch.linalg.svdvals(Z)
    assert concentration(Z, 3).item() == pytest.approx(-(S[:3].sum() / S.sum()).item(), abs=1e-3)
    assert concentration(torch.outer(torch.randn(6), torch.randn(9)), 3) == pytest.approx(-1.0, abs=2e-2)
    assert decorrelation(Z[:1]) is None and concentration(Z[:1], 3) is None


def test_each_term_stays_within_its_bounds() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        Z, Z0 = (torch.randn(8, 5, dtype=torch.float64, generator=g) for _ in range(2))
        assert 0 <= consistency(Z, Z0) <= 4 / 5
        assert consistency(7 * Z, Z0 / 3).item() == pytest.approx(consistency(Z, Z0).item()), "positive scaling says nothing"
        assert -1 <= concentration(Z, 3) <= -3 / 5
    flat = torch.linalg.qr(torch.randn(8, 5, dtype=torch.float64))[0]
    assert concentration(flat, 3).item() == pytest.approx(-3 / 5, abs=1e-3), "equal singular values"
    alone = torch.eye(4, dtype=torch.float64).repeat(2, 1)[:, :1] @ torch.tensor([[1.0, 0, 0]], dtype=torch.float64)
    assert decorrelation(alone).item() == pytest.approx(0.0), "a diagonal covariance"


def test_generation_terms_mask_padding_and_are_per_token() -> None:
    Z, Z0 = torch.randn(2, 4, 7), torch.randn(2, 4, 7)
    labels = torch.tensor([[1, 2, -100, -100], [3, 4, 5, -100]])
    got = BALoRA(consistency=1, diversity=1, spectrum=1).term(out(Z), out(Z0), {"labels": labels}, None, 1)  # type: ignore[arg-type]
    keep = labels != -100
    p, p0 = F.log_softmax(Z[keep], -1), F.log_softmax(Z0[keep], -1)
    assert got["ba_consistency"] == pytest.approx(F.kl_div(p, p0, log_target=True, reduction="sum").item() / 5, abs=1e-5)
    assert got["ba_diversity"] == pytest.approx((p.exp() * p).sum(-1).mean().item(), abs=1e-5)
    noisy = Z.clone()
    noisy[~keep] = 1e3
    again = BALoRA(consistency=1, diversity=1, spectrum=1).term(out(noisy), out(Z0), {"labels": labels}, None, 1)  # type: ignore[arg-type]
    assert all(torch.allclose(got[k], again[k], atol=1e-4) for k in got)
    batch = BALoRA(consistency=1, per="batch").term(out(Z), out(Z0), {"labels": labels}, None, 1)  # type: ignore[arg-type]
    assert batch["ba_consistency"] == pytest.approx(got["ba_consistency"].item() * 5 / 2, rel=1e-4)


def test_the_reference_is_the_original_model_also_after_pissa() -> None:
    """At step 0 the consistency and its gradient vanish; a "residual base" as teacher would give neither."""
    model = llama()
    batch = batch_for(model)
    original = model(**batch).logits.detach()
    adapter = rw.attach(model, {"preset": "ba_lora", "r": 4})
    session = rw.Session(model, adapter, lr=1e-3, total_steps=2)
    session.step_begin()
    model.train()
    outputs = model(**batch)
    assert torch.allclose(session.reference(batch).logits, original, atol=1e-6)
    session.losses = [BALoRA(consistency=1.0, diversity=0.0, spectrum=0.0)]
    session.penalty(outputs, batch).backward()
    assert session.logs["ba_consistency"] == pytest.approx(0.0, abs=1e-6)
    assert max(p.grad.abs().max() for p in adapter.trainable_parameters() if p.grad is not None) < 1e-5
    move(adapter)
    model.zero_grad()
    session.penalty(model(**batch), batch)
    assert session.logs["ba_consistency"] > 1e-3
    assert model.training and torch.allclose(session.reference(batch).logits, original, atol=1e-6)


def test_zero_weights_are_plain_training() -> None:
    runs = []
    for losses in ([], [{"name": "ba_lora", "consistency": 0.0, "diversity": 0.0, "spectrum": 0.0}]):
        model = llama()
        adapter = rw.attach(model, {"r": 2, "losses": losses})
        session = rw.Session(model, adapter, lr=1e-2, total_steps=4)
        batch = batch_for(model)
        for _ in range(4):
            session.step_begin()
            o = model(**batch)
            (o.loss + session.penalty(o, batch)).backward()
            session.step()
        runs.append({k: t.clone() for k, t in adapter.tensors().items()})
    assert all(torch.equal(runs[0][k], runs[1][k]) for k in runs[0])


def test_refusals() -> None:
    with pytest.raises(OptionError, match="'ba_lora'"):
        BALoRA(consistency=-1)
    with pytest.raises(OptionError, match="'generation' or"):
        BALoRA(task="x")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="3 axes"):
        BALoRA().term(out(torch.randn(2, 3)), out(torch.randn(2, 3)), {}, None, 1)  # type: ignore[arg-type]
    assert math.isfinite(BALoRA().consistency)
