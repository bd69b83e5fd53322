"""Laws that hold for every registered optimiser: a newcomer is a new row of METHODS."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from rankwise.optim import pairs
from tests.optim.tools import METHODS, grads_at, make, same, walk, world

every_method = pytest.mark.parametrize(
    "name,options", METHODS, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values()))
)


@every_method
def test_resume_is_bit_equal(name, options):
    straight, other = world(torch.float32), world(torch.float32)
    a = make(name, straight, options=options, weight_decay=0.1, seed=3)
    walk(a, straight, 1, 3)
    file = io.BytesIO()
    torch.save(a.state_dict(), file)
    for x, y in zip(other, straight):
        x.tensor.data.copy_(y.tensor.data)
    b = make(name, other, lr=0.5, options=options, weight_decay=0.7, seed=99)  # all of it is restored from the file
    file.seek(0)
    b.load_state_dict(torch.load(file, weights_only=True))
    assert (b.steps, b.seed, b.peak) == (3, 3, a.peak)
    assert [g["lr"] for g in b.param_groups] == [g["lr"] for g in a.param_groups]
    walk(a, straight, 4, 8)
    walk(b, other, 4, 8)
    assert same(straight, other)


@every_method
def test_order_of_parameters_changes_nothing(name, options):
    first, second = world(torch.float32), world(torch.float32)
    walk(make(name, first, options=options), first, 1, 5)
    walk(make(name, second[::-1], options=options), second, 1, 5)
    assert same(first, second)


@every_method
def test_frozen_means_frozen(name, options):
    params, before = world(), world()
    frozen = {p.name for p in params if p.name.startswith(("l1", "l2.out"))}
    opt = make(name, params, options=options, weight_decay=0.5)
    for p in params:
        p.tensor.requires_grad_(p.name not in frozen)
    walk(opt, params, 1, 4, only={p.name for p in params} - frozen)
    for p, q in zip(params, before):
        assert torch.equal(p.tensor, q.tensor) == (p.name in frozen), p.name
    assert not frozen & opt.state_elements().keys()


@every_method
def test_frozen_set_is_as_no_gradient(name, options):
    masked, without = world(), world()
    a, b = make(name, masked, options=options, weight_decay=0.5), make(name, without, options=options, weight_decay=0.5)
    a.frozen = {p.name for p in masked if p.name.startswith("l1")}
    walk(a, masked, 1, 4)
    walk(b, without, 1, 4, only={p.name for p in without} - a.frozen)
    assert same(masked, without)


@every_method
def test_gradients_are_left_as_they_are(name, options):
    params = world()
    opt = make(name, params, options=options)
    grads_at(params, 1)
    before = [p.tensor.grad.clone() for p in params]
    opt.step()
    assert all(torch.equal(p.tensor.grad, g) for p, g in zip(params, before))


@every_method
def test_low_precision_parameters_have_fp32_state_that_loads_uncast(name, options):
    params = world(torch.bfloat16)
    opt = make(name, params, options=options)
    walk(opt, params, 1, 3)
    again = world(torch.bfloat16)
    other = make(name, again, options=options)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    found = list(_leaves(other.tree))
    assert all(t.dtype in (torch.float32, torch.float64) for t in found)
    assert all(torch.equal(x, y) for x, y in zip(found, _leaves(opt.tree)))
    assert all(p.tensor.dtype == torch.bfloat16 and p.tensor.isfinite().all() for p in params)


@every_method
def test_drop_frees_and_starts_anew(name, options):
    params = world()
    opt = make(name, params, options=options)
    walk(opt, params, 1, 3)
    gone = {p.name for p in params if p.name.startswith(("l1", "l2.down"))}
    opt.drop(gone)
    assert not gone & opt.state_elements().keys()
    assert not any(key in gone for key in _keys(opt.tree))
    fresh = world()
    for x, y in zip(fresh, params):
        x.tensor.data.copy_(y.tensor.data)
    other = make(name, fresh, options=options)
    other.steps = 3  # same t, no history
    walk(opt, params, 4, 5, only=gone)
    walk(other, fresh, 4, 5, only=gone)
    assert all(torch.equal(x.tensor, y.tensor) for x, y in zip(params, fresh) if x.name in gone)


@every_method
def test_deepcopy_goes_on_alike(name, options):
    params = world()
    opt = make(name, params, options=options)
    opt.after.append(lambda ctx: None)
    walk(opt, params, 1, 2)
    twin = copy.deepcopy(opt)
    twins = [twin.params[p.name] for p in params]
    assert twin.after == [] and twins[0].tensor is not params[0].tensor
    walk(opt, params, 3, 4)
    walk(twin, twins, 3, 4)
    assert same(params, twins)


@every_method
def test_it_descends(name, options):
    """Matrix regression: ½‖s·B·A − target‖² for pairs, ½‖p‖² for the rest."""
    params = world()
    opt = make(name, params, lr=2e-3 if name == "sgd" else 2e-2, options=options)
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = sum(0.5 * p.tensor.square().sum() for p in params if p.role not in "AB")
        for _, a, b, s in pairs(opt.params):
            loss = loss + 0.5 * (s * b.tensor @ a.tensor - 2.0).square().sum()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def _leaves(tree):
    for v in tree.values():
        yield from _leaves(v) if isinstance(v, dict) else [v] if isinstance(v, torch.Tensor) else []


def _keys(tree):
    for k, v in tree.items():
        yield k
        if isinstance(v, dict):
            yield from _keys(v)
