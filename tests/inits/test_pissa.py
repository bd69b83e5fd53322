"""PiSSA and OLoRA: balanced factors of the top, the tail left in the base."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError
from tests.forms.helpers import one
from tests.models import FAMILIES, batch_for, llama, logits


@pytest.mark.parametrize("alpha", [3, 12])
def test_pissa_is_balanced_and_leaves_the_tail(alpha: int) -> None:
    model, adapter, d = one({"init": "pissa", "alpha": alpha})
    S = torch.linalg.svdvals(model[0].weight)
    top = torch.diag(S[:3]) / d.scale
    assert torch.allclose(d.A @ d.A.T, top, atol=1e-5) and torch.allclose(d.B.T @ d.B, top, atol=1e-5)
    has_frozen_start = model[0].weight - d.delta().dense()
    assert torch.allclose(torch.linalg.svdvals(has_frozen_start)[:7], S[3:], atol=1e-5)
    model(torch.randn(4, 12)).square().sum().backward()
    assert d.A.grad.any() and d.B.grad.any()
    assert adapter.delta("0").exact_rank == 6, "against the untouched W it is an exact LoRA of rank 2r"


def test_randomised_pissa_starts_exactly_too() -> None:
    model, _, d = one({"init": {"name": "pissa", "niter": 4}})
    x = torch.randn(5, 12)
    with rw.view(model, {}):
        base = model(x)
    assert torch.allclose(model(x), base, atol=1e-6)
    _, _, exact = one({"init": "pissa"})
    cosines = torch.linalg.svdvals(torch.linalg.qr(d.B)[0].T @ torch.linalg.qr(exact.B)[0])
    assert cosines.min() > 0.999


def test_two_residual_adapters_share_one_base() -> None:
    model = llama()
    batch = batch_for(model)
    base = logits(model, batch)
    rw.attach(model, {"init": "pissa", "r": 4}, name="a")
    rw.attach(model, {"init": "olora", "r": 2}, name="b")
    for view in ({"a": 1}, {"b": 1}, {"a": 1, "b": 1}, {"a": 0.3}):
        with rw.view(model, view):
            assert torch.allclose(logits(model, batch), base, atol=1e-5), view


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_pissa_on_transposed_and_stacked_weights(family: str) -> None:
    model = FAMILIES[family][0]()
    batch = batch_for(model)
    base = logits(model, batch)
    adapter = rw.attach(model, {"init": "pissa", "r": 2})
    assert torch.allclose(logits(model, batch), base, atol=1e-5)
    assert all(d.A.abs().sum() > 0 and d.B.abs().sum() > 0 for d in adapter.sites.values())


def test_olora_is_orthonormal() -> None:
    model, _, d = one({"init": "olora"})
    assert torch.allclose(d.B.T @ d.B, torch.eye(3), atol=1e-5)
    assert (model[0].weight - d.delta().dense())[:, :3].abs().max() < 1e-5


@pytest.mark.parametrize("options", [{"niter": 0}])
def test_wrong_options_of_pissa(options: dict) -> None:
    with pytest.raises(OptionError, match="'pissa'"):
        one({"init": {"name": "pissa", **options}})
