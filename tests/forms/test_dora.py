from __future__ import annotations

import pytest
import torch

from rankwise.errors import RecipeError
from tests.forms.helpers import one


def test_rows_of_the_adapted_weight_have_norm_m() -> None:
    model, adapter, d = one({"form": "dora", "alpha": 6})
    with torch.no_grad():
        d.inner.B.normal_()
        d.m.mul_(1.5)
    W = model[0].weight
    value = adapter.delta("0").dense(W)
    assert torch.allclose((W + value).norm(dim=1), d.m, atol=1e-5)
    V = W + 2.0 * d.inner.B @ d.inner.A
    assert torch.allclose(W + value, d.m[:, None] * V / V.norm(dim=1, keepdim=True), atol=1e-5)
    assert adapter.numel() == 3 * 22 + 10


def test_gradients_with_a_constant_norm() -> None:
    model, _, d = one({"form": "dora"})
    with torch.no_grad():
        d.inner.B.normal_()
    x, w = torch.randn(7, 12), torch.randn(7, 10)
    (model(x) * w).sum().backward()
    G = w.T @ x
    V = model[0].weight + d.inner.B @ d.inner.A
    n = V.norm(dim=1)
    assert torch.allclose(d.m.grad, (G * V).sum(1) / n, atol=1e-4)
    assert torch.allclose(d.inner.B.grad, (d.m / n)[:, None] * G @ d.inner.A.T, atol=1e-4)


def test_bias_is_never_rescaled() -> None:
    model, _, d = one({"form": "dora"})
    with torch.no_grad():
        d.m.mul_(3)
    assert torch.allclose(model(torch.zeros(1, 12)), model[0].bias[None], atol=1e-6)


def test_inner_must_be_low_rank() -> None:
    with pytest.raises(RecipeError, match="inner form with a low-rank delta"):
        one({"form": {"name": "dora", "inner": "paca"}})


def test_over_other_inner_forms() -> None:
    for inner in ("lora_xs", "svd"):
        model, adapter, d = one({"form": {"name": "dora", "inner": inner}})
        x = torch.randn(3, 12)
        assert torch.allclose(model(x), torch.nn.functional.linear(x, model[0].weight, model[0].bias), atol=1e-3)
