"""EVA: rows are the top directions of the input, and ranks sum to the budget."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rankwise as rw
from tests.contract.test_laws import calibration
from tests.models import llama


def test_eva_rows_are_top_directions_and_ranks_sum_to_the_budget() -> None:
    model = llama()
    adapter = rw.attach(model, {"init": "eva", "r": 3}, calibration=calibration())
    ranks = {n: d.A.shape[0] for n, d in adapter.sites.items()}
    assert sum(ranks.values()) == 3 * 14 and len(set(ranks.values())) > 1
    for d in adapter.sites.values():
        assert torch.allclose(d.A @ d.A.T, torch.eye(len(d.A)), atol=1e-4) and not d.B.any()
        assert d.scale == 1.0
    q, k = (adapter.sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    n = min(len(q.A), len(k.A))
    assert torch.equal(q.A[:n], k.A[:n]), "sites fed by one tensor share their leading rows"


def test_eva_ignores_masked_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 24), generator=g)
    noisy = ids.clone()
    noisy[:, 16:] = torch.randint(3, 64, (4, 8), generator=g)
    labels = ids.clone()
    labels[:, 16:] = -100
    got = [
        next(
            iter(
                rw.attach(
                    llama(),
                    {"init": "eva", "r": 2, "targets": ["q"], "layers": [0]},
                    calibration=[{"input_ids": x, "labels": labels}],
                ).sites.values()
            )
        ).A
        for x in (ids, noisy)
    ]
    assert torch.allclose(*got, atol=1e-5)


class Inputs(nn.Module):
    """Two linears, each with inputs of its own: x: n×12 and z: n×8."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(12, 10), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor, z: torch.Tensor) -> Any:
        return self.one(x), self.two(z)


def gaussian(values: torch.Tensor, n: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n rows of a Gaussian with that spectrum in a random basis and a mean of its own, the basis as rows)."""
    g = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(len(values), len(values), generator=g))[0]
    return torch.randn(n, len(values), generator=g) * values.sqrt() @ basis + 3 * torch.randn(len(values), generator=g), basis


def test_rows_are_the_eigenvectors_of_a_known_covariance_and_ranks_go_where_they_explain_more() -> None:
    steep = torch.tensor([400.0, 100, 25] + [1.0] * 9)
    (x, basis), (z, _) = gaussian(steep, 6000, 1), gaussian(torch.ones(8), 6000, 2)
    data = [{"x": a, "z": b} for a, b in zip(x.split(500), z.split(500), strict=True)]
    adapter = rw.attach(Inputs(), {"targets": ["one", "two"], "init": {"name": "eva", "tau": 1.0}, "r": 2}, calibration=data)
    ranks = {n: len(d.A) for n, d in adapter.sites.items()}
    assert ranks == {"one": 2, "two": 2}, "e = .74, .19, .05 at the steep place, .13 each at the flat one"
    A = adapter.sites["one"].A
    assert torch.allclose((A * basis[:2]).sum(1).abs(), torch.ones(2), atol=2e-3), "not the covariance's eigenvectors"
    alone = rw.attach(
        Inputs(), {"targets": ["one", "two"], "init": {"name": "eva", "rho": 1.0, "tau": 1.0}, "r": 3}, calibration=data
    )
    assert {n: len(d.A) for n, d in alone.sites.items()} == {"one": 3, "two": 3}, "rho = 1 moves no rank"
    sharp = [
        {"x": a, "z": 0.1 * torch.ones(8) + b * torch.tensor([30.0] + [1e-3] * 7)}
        for a, b in zip(x.split(500), z.split(500), strict=True)
    ]
    moved = rw.attach(Inputs(), {"targets": ["one", "two"], "init": {"name": "eva", "tau": 1.0}, "r": 2}, calibration=sharp)
    assert {n: len(d.A) for n, d in moved.sites.items()} == {"one": 3, "two": 1}, "one direction explains all of the second's input"


def test_no_other_rows_leave_a_smaller_remainder() -> None:
    x, _ = gaussian(torch.linspace(1, 4, 12).square(), 600, 3)
    data = [{"x": a, "z": torch.randn(len(a), 8)} for a in x.split(150)]
    adapter = rw.attach(Inputs(), {"targets": ["one"], "init": {"name": "eva", "rho": 4, "tau": 1.0}, "r": 3}, calibration=data)
    A, centred = adapter.sites["one"].A.detach(), x - x.mean(0)
    left = lambda Q: (centred - centred @ Q.T @ Q).square().sum()
    best = (torch.linalg.svdvals(centred)[3:] ** 2).sum()
    assert torch.allclose(left(A), best, rtol=1e-4)
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        near = torch.linalg.qr((A + 0.3 * torch.randn(3, 12, generator=g)).T)[0].T
        assert left(near) > left(A)


def test_whitened_rows_are_divided_by_the_root_of_their_spread() -> None:
    x, _ = gaussian(torch.linspace(1, 4, 12).square(), 600, 3)
    data = [{"x": x, "z": torch.randn(len(x), 8)}]
    plain, white = (
        rw.attach(Inputs(), {"targets": ["one"], "init": {"name": "eva", "rho": 4, "whiten": w}, "r": 3}, calibration=data)
        for w in (False, True)
    )
    sigma = torch.linalg.svdvals(x - x.mean(0))[:3]
    assert torch.allclose(white.sites["one"].A, plain.sites["one"].A / sigma.sqrt()[:, None], rtol=1e-3)
