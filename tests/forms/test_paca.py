from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from rankwise.train.memory import saved_bytes
from tests.forms.helpers import one


def test_gradients_are_the_columns_of_the_dense_one() -> None:
    model, adapter, d = one({"form": "paca", "alpha": 6})
    with torch.no_grad():
        d.V.normal_()
    x = torch.randn(7, 12, requires_grad=True)
    w = torch.randn(7, 10)
    (model(x) * w).sum().backward()
    W = model[0].weight.detach().clone()
    W[:, d.index] += 2.0 * d.V.detach()
    assert torch.allclose(d.V.grad, 2.0 * (w.T @ x)[:, d.index], atol=1e-4)
    assert torch.allclose(x.grad, w @ W, atol=1e-4), "∂x uses the updated columns"
    assert torch.allclose(model(x), F.linear(x, W, model[0].bias), atol=1e-5)
    assert adapter.numel() == 10 * 3


def test_only_the_columns_of_x_are_kept_for_backward() -> None:
    kept = {}
    for form in ("lora", "paca"):
        model, _, _ = one({"form": form, "r": 4}, inp=256, out=64)
        x = torch.randn(100, 256, requires_grad=True)
        h = x * 1.0  # not a leaf: a saved x is an activation
        with saved_bytes(model) as saved:
            model(h)
        kept[form] = saved["bytes"]
    assert kept["paca"] <= 100 * 4 * 4 + 4 * 8 + 64 * 4 * 4 + 64, kept
    assert kept["lora"] >= 100 * 256 * 4


@pytest.mark.parametrize("choose", ["largest", "smallest"])
def test_columns_by_norm(choose: str) -> None:
    model, _, d = one({"form": {"name": "paca", "choose": choose}})
    norms = model[0].weight.norm(dim=0)
    want = norms.topk(3, largest=choose == "largest").indices.sort().values
    assert torch.equal(d.index, want)


def test_as_a_lora_it_selects_columns() -> None:
    _, adapter, d = one({"form": "paca"})
    with torch.no_grad():
        d.V.normal_()
    low, error = adapter.delta("0").to_lowrank()
    assert error == 0 and torch.equal(low.A.sum(0).nonzero().flatten(), d.index) and set(low.A.flatten().tolist()) == {0.0, 1.0}


def test_every_other_column_keeps_its_bits_through_training_and_merge() -> None:
    model, adapter, d = one({"form": "paca"})
    before = model[0].weight.detach().clone()
    session = rw.Session(model, adapter, lr=1e-1, total_steps=5)
    x, want = torch.randn(20, 12), torch.randn(20, 10)
    for _ in range(5):
        session.step_begin()
        (F.mse_loss(model(x), want) + session.penalty(None, {})).backward()
        session.step()
    session.close()
    adapter.merge(probe={"input": x})
    others = [c for c in range(12) if c not in d.index.tolist()]
    assert torch.equal(model[0].weight[:, others], before[:, others])
    assert not torch.isclose(model[0].weight[:, d.index], before[:, d.index]).all(0).any(), "every chosen column moved"
