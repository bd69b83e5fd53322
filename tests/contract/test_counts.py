"""Law 5: what a form trains is what its formula says, counted from the model's shapes alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise import catalogue
from tests.forms.helpers import one
from tests.models import llama

#: (out, in, r) → parameters that it trains in a linear layer
COUNTS: dict[str, Callable[[int, int, int], int]] = {
    "lora": lambda m, n, r: r * (m + n),
    "rslora": lambda m, n, r: r * (m + n),
    "dora": lambda m, n, r: r * (m + n) + m,
    "svd": lambda m, n, r: r * (m + n) + r,
    "lora_xs": lambda m, n, r: r * r,
    "paca": lambda m, n, r: m * r,
    "dense": lambda m, n, r: m * n,
    "full": lambda m, n, r: m * n,
}


@pytest.mark.parametrize("form", COUNTS)
def test_trained_parameters_are_as_many_as_the_formula_says(form: str) -> None:
    model = llama()
    targets = ["q_proj", "k_proj", "down_proj"]
    shapes = [m.weight.shape for n, m in model.named_modules() if n.rpartition(".")[2] in targets and isinstance(m, nn.Linear)]
    rank = {"r": 3} if catalogue.find("form", form).cls.ranked else {}  # type: ignore[attr-defined]
    adapter = rw.attach(model, {"form": form, "targets": targets, **rank})
    assert len(shapes) == 6 and adapter.numel() == sum(COUNTS[form](*s, 3) for s in shapes)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapter.numel()


def test_loras_change_has_rank_r_and_one_free_factor() -> None:
    """rank(BA) ≤ r, and (cA, B/c) is the same forward."""
    model, _, site = one({"form": "lora", "r": 3})
    with torch.no_grad():
        site.A.normal_(), site.B.normal_()
    assert torch.linalg.matrix_rank(site.delta().dense().detach().double(), tol=1e-4) == 3
    x = torch.randn(4, 12)
    before = model(x)
    with torch.no_grad():
        site.A.mul_(5.0), site.B.div_(5.0)
    assert torch.allclose(model(x), before, atol=1e-5)
