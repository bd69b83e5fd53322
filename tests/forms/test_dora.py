from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import RecipeError
from rankwise.forms.base import AdapterLayer
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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("init", [None, "pissa"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strength", [None, 0.5, torch.tensor(0.3)])
def test_its_own_forward_is_the_reference(
    dtype: torch.dtype, init: str | None, bias: bool, strength: float | torch.Tensor | None
) -> None:
    """Values and gradients of the short way against those by way of :meth:`delta`, at a site where both run."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 10, bias=bias)).to(dtype)
    adapter = rw.attach(model, {"form": "dora", "r": 3, "alpha": 6, "targets": ["0"], "init": init})
    (layer,) = adapter.sites.values()
    with torch.no_grad():
        layer.m.mul_(1.3)
        layer.inner.B.add_(0.3 * torch.randn(10, 3))
    x = torch.randn(2, 5, 12, dtype=dtype, requires_grad=True)
    w = torch.randn(2, 5, 10, dtype=dtype)
    found = []
    for forward in (type(layer).forward, AdapterLayer.forward):
        y = torch.nn.functional.linear(x, model[0].weight, model[0].bias).detach()
        out = forward(layer, x, y, strength)
        grads = torch.autograd.grad((out * w).sum(), [x, *layer.parameters()])
        found.append([out, *grads])
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]  # factors are fp32 masters
    for own, reference in zip(*found):
        torch.testing.assert_close(own, reference, rtol=tolerance, atol=tolerance * float(reference.abs().max()))


def test_its_own_forward_runs_where_nothing_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, adapter, d = one({"form": "dora"})
    monkeypatch.setattr(AdapterLayer, "forward", lambda *a: pytest.fail("the reference ran at a plain linear"))
    model(torch.zeros(1, 12))
    with torch.no_grad():
        d.m.mul_(1.5)
    adapter.merge()
    adapter.unmerge()
    model(torch.zeros(1, 12))
