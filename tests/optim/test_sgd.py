"""SGD is torch's SGD; its decay is decoupled."""

from __future__ import annotations

import pytest
import torch

from rankwise import catalogue
from rankwise.errors import OptionError
from tests.optim.tools import grads_at, make, walk, world


@pytest.mark.parametrize("momentum,nesterov", [(0.0, False), (0.9, False), (0.9, True)])
def test_equals_torch(momentum, nesterov):
    ours, theirs = world(), world()
    opt = make("sgd", ours, lr=0.05, options={"momentum": momentum, "nesterov": nesterov})
    ref = torch.optim.SGD([p.tensor for p in theirs], lr=0.05, momentum=momentum, nesterov=nesterov)
    for t in range(1, 8):
        grads_at(ours, t)
        grads_at(theirs, t)
        opt.step()
        ref.step()
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a.tensor, b.tensor, rtol=1e-13, atol=1e-13)


def test_plain_sgd_with_decay_equals_torch_and_holds_no_state():
    ours, theirs = world()[:2], world()[:2]
    opt = make("sgd", ours, lr=0.05, weight_decay=0.3)
    ref = torch.optim.SGD([p.tensor for p in theirs], lr=0.05, weight_decay=0.3)
    grads_at(ours, 1)
    grads_at(theirs, 1)
    opt.step()
    ref.step()
    assert all(torch.allclose(a.tensor, b.tensor, rtol=1e-14) for a, b in zip(ours, theirs))
    assert opt.state_elements() == {}


def test_momentum_holds_one_element_per_element():
    params = world()
    opt = make("sgd", params, options={"momentum": 0.5})
    walk(opt, params, 1, 1)
    assert opt.state_elements() == {p.name: p.tensor.numel() for p in params}
    with pytest.raises(OptionError, match="momentum"):
        catalogue.make("optimizer", "sgd", momentum=1.0)
