"""LoftQ: nearer to W than quantisation alone, and W comes back."""

from __future__ import annotations

import torch
from torch import nn

import rankwise as rw


def test_loftq_is_closer_than_plain_quantisation_and_detaches_exactly() -> None:
    from rankwise.catalogue import make

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 1) * 3)
    W = model[0].weight.detach().clone()
    codec = make("codec", "nf4")
    plain = (W - codec.decode(codec.encode(W))).norm()
    errors = []
    for r in (2, 8, 16):
        adapter = rw.attach(model, {"targets": ["0"], "init": "loftq", "r": r, "alpha": 2 * r})
        Q = model[0].weight.detach().clone()
        d = adapter.sites["0"]
        errors.append((W - Q - d.delta().dense()).norm())
        gap = torch.linalg.svdvals(W - Q)[r:].norm()
        assert torch.allclose(errors[-1], gap, atol=1e-3)
        adapter.detach()
        assert torch.equal(model[0].weight, W)
    assert plain > errors[0] > errors[1] > errors[2]


def test_full_rank_leaves_no_residual() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 48))
    W = model[0].weight.detach().clone()
    adapter = rw.attach(model, {"targets": ["0"], "init": "loftq", "r": 48})
    Q = model[0].weight.detach()
    assert (W - Q).norm() > 1e-2 and (W - Q - adapter.sites["0"].delta().dense().detach()).norm() < 1e-4 * W.norm()
