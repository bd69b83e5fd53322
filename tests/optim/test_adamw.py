"""AdamW is torch's AdamW."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.optim.tools import grads_at, make, tensor, walk, world


def against_torch(dtype: torch.dtype, **how):
    ours, theirs = world(dtype), world(dtype)
    opt = make("adamw", ours, lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    groups = [
        {"params": [p.tensor for p in theirs if p.decay], "weight_decay": 0.1},
        {"params": [p.tensor for p in theirs if not p.decay], "weight_decay": 0.0},
    ]
    ref = torch.optim.AdamW(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, **how)
    for t in range(1, 21):
        only = {p.name for p in ours} if t % 3 else {p.name for p in ours[2:]}  # ages come apart
        grads_at(ours, t, only)
        grads_at(theirs, t, only)
        opt.step()
        ref.step()
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_bits_as_fused(dtype):
    assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(*against_torch(dtype, fused=True)))


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}])
def test_the_other_forms_to_rounding(how):
    for a, b in zip(*against_torch(torch.float32, **how)):
        torch.testing.assert_close(a.tensor, b.tensor, rtol=1e-6, atol=1e-6)


def test_noncontiguous_parameters_and_gradients():
    base = tensor(5, 4)
    p, q = nn.Parameter(base.t()), nn.Parameter(base.t().contiguous())
    from rankwise.optim import Param

    opt, ref = make("adamw", [Param("p", p)]), torch.optim.AdamW([q], lr=1e-2, weight_decay=0.0)
    for t in range(3):
        g = tensor(4, 5, key=t)
        p.grad, q.grad = g, g.clone()
        opt.step()
        ref.step()
    torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


def test_state_is_two_elements_per_element():
    params = world()
    opt = make("adamw", params)
    walk(opt, params, 1, 2)
    assert opt.state_elements() == {p.name: 2 * p.tensor.numel() for p in params}
