"""Decisions: every plan of computation gives the naive sum, and its gradients."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.routers.decision import Decision, execute

D = torch.float64


def sparse(n: int = 9, units: int = 6, k: int = 2, sizes: list[int] | None = None) -> Decision:
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(units, generator=g)[:k] for _ in range(n)])
    return Decision(torch.rand(n, k, dtype=D, generator=g), units, index=index, sizes=sizes)


@pytest.mark.parametrize("sizes", [None, [2, 2, 2, 2, 2, 2], [1, 3, 2, 4, 1, 2]])
def test_all_plans_agree_forward_and_gradients(sizes: list[int] | None) -> None:
    R = sum(sizes) if sizes else 6
    outs = []
    for plan in ("dense", "bag", "segments"):
        torch.manual_seed(0)
        x, A, B = (torch.randn(*s, dtype=D, requires_grad=True) for s in ((9, 8), (R, 8), (5, R)))
        d = sparse(sizes=sizes)
        w = d.weight.clone().requires_grad_(True)
        y = execute(x, A, B, 0.7, Decision(w, 6, d.index, sizes), plan=plan)  # type: ignore[arg-type]
        outs.append([y, *torch.autograd.grad((y * torch.arange(y.numel(), dtype=D).view_as(y)).sum(), [x, A, B, w])])
    naive = 0.7 * torch.stack([B @ (sparse(sizes=sizes).gate()[n] * (A @ x[n])) for n in range(9)])
    assert torch.allclose(outs[0][0], naive, atol=1e-10)
    for other in outs[1:]:
        assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(outs[0], other, strict=True))


def test_constant_decisions_and_their_plan() -> None:
    x, A, B, g = torch.randn(4, 8, dtype=D), torch.randn(3, 8, dtype=D), torch.randn(5, 3, dtype=D), torch.rand(3, dtype=D)
    d = Decision(g, 3)
    assert d.constant and torch.allclose(execute(x, A, B, 2.0, d), 2.0 * x @ (B @ torch.diag(g) @ A).T)
    with pytest.raises(OptionError, match="same for all rows"):
        execute(x, A, B, 1.0, sparse(4, 3), plan="constant")
