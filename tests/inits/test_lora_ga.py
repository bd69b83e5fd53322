"""LoRA-GA: the first step of SGD is the best of rank 2r."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError
from tests.contract.test_laws import calibration
from tests.inits.tools import Loss, batches
from tests.models import llama


def test_first_sgd_step_is_the_best_rank_2r_step() -> None:
    model = Loss()
    data = batches()
    for p in model.parameters():
        p.requires_grad_(False)
    adapter = rw.attach(model, {"targets": ["lin"], "init": {"name": "lora_ga", "niter": 30}, "r": 3, "alpha": 6}, calibration=data)
    d = adapter.sites["lin"]
    G = sum(b["labels"].T @ b["x"] for b in data) / len(data)
    zeta = 10**0.25 / 16**0.5
    eye = torch.eye(3)
    assert torch.allclose(d.A @ d.A.T, zeta**2 * eye, atol=1e-5) and torch.allclose(d.B.T @ d.B, zeta**2 * eye, atol=1e-5)
    U, S, Vh = torch.linalg.svd(G.double())
    on = lambda M, basis: (M.double() @ basis).norm(dim=0) > 1e-3
    assert on(d.A, Vh.T)[:10].tolist() == [True] * 3 + [False] * 7, "rows of A are the first r right singular vectors"
    assert on(d.B.T, U).tolist() == [False] * 3 + [True] * 3 + [False] * 4, "columns of B the next r left ones"
    before = d.delta().dense().detach().double()
    gA, gB = d.scale * d.B.T @ G, d.scale * G @ d.A.T
    lr = 1e-4
    with torch.no_grad():
        first_order = -lr * d.scale * (gB.double() @ d.A.double() + d.B.double() @ gA.double())
    best = (U[:, :6] * S[:6]) @ Vh[:6]
    assert torch.allclose(first_order, -lr * d.scale**2 * zeta**2 * best, atol=1e-8)
    assert before.norm() > 0


@pytest.mark.parametrize(
    "options",
    [
        {"direction": "A2rBr"},
        {"direction": "ArBr"},
        {"direction": "random"},
        {"size": "unit"},
        {"size": "gd"},
        {"size": "weight_svd"},
        {"variant": "peft"},
    ],
)
def test_lora_ga_variants_start_at_the_base(options: dict) -> None:
    model = Loss()
    x = batches()[0]
    base = model(**x).logits
    rw.attach(model, {"targets": ["lin"], "init": {"name": "lora_ga", **options}, "r": 2}, calibration=batches())
    assert torch.allclose(model(**x).logits, base, atol=1e-4)


def test_lora_ga_refuses_too_high_a_rank_by_site() -> None:
    with pytest.raises(OptionError, match="2r = 16.*k_proj"):
        rw.attach(llama(hidden=16), {"init": "lora_ga", "r": 8, "targets": ["k"]}, calibration=calibration())
