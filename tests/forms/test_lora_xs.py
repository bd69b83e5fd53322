from __future__ import annotations

import pytest
import torch

from tests.forms.helpers import one


def test_factors_are_singular_vectors_and_only_the_core_trains() -> None:
    model, adapter, d = one({"form": "lora_xs"})
    S = torch.linalg.svdvals(model[0].weight)[:3]
    eye = torch.eye(3)
    assert torch.allclose(d.B.T @ d.B, eye, atol=1e-5)
    assert torch.allclose(d.A @ d.A.T, torch.diag(S**2), atol=1e-4)
    assert adapter.numel() == 9 and list(adapter.named_parameters()) == ["0::core"]
    with torch.no_grad():
        d.core.normal_()
    W = d.delta().dense()
    assert torch.allclose(W - d.B @ d.B.T @ W, torch.zeros_like(W), atol=1e-5), "ΔW left the span of U_r"


def test_gradient_of_the_core() -> None:
    model, _, d = one({"form": "lora_xs"})
    x, w = torch.randn(7, 12), torch.randn(7, 10)
    (model(x) * w).sum().backward()
    assert torch.allclose(d.core.grad, d.scale * d.B.T @ (w.T @ x) @ d.A.T, atol=1e-4)


def test_it_starts_a_hundred_thousandth_from_the_base_whatever_the_width() -> None:
    for wide in (64, 256):
        model, adapter, d = one({"form": "lora_xs", "r": 8}, inp=wide, out=wide)
        assert adapter.numel() == 64 and d.core.std().item() == pytest.approx(1e-5, rel=0.4)
        S = torch.linalg.svdvals(model[0].weight)[0]
        assert 0 < d.delta().dense().norm() < 1e-5 * 3 * 8 * S * d.scale
