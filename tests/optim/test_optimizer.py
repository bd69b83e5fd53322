"""The torch Optimizer around a transformation: groups, events, state, refusals, speed."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from rankwise.errors import ArtefactError, OptionError, RankwiseError, TrainingError, UnknownName
from rankwise.optim import Param, TransformOptimizer
from tests.optim.tools import make, pair, param, tensor, walk, world


def test_groups_are_one_per_multiplier_and_decay():
    opt = make("loraplus", world(), lr=0.01, weight_decay=0.1)
    got = {(round(g["lr"], 6), g["weight_decay"]): set(g["param_names"]) for g in opt.param_groups}
    assert got == {
        (0.01, 0.1): {"l0.q.A", "l1.up.A", "l2.down.weight", "l2.out.weight"},
        (0.01, 0.0): {"l0.q.magnitude"},
        (0.16, 0.1): {"l0.q.B", "l1.up.B"},
    }


def test_events_come_in_order_and_an_observer_can_stop_the_step_untouched():
    params = world()
    opt = make("adamw", params)
    seen = []
    before = params[0].tensor.detach().clone()
    opt.observers.append(lambda ctx, g: seen.append(("observe", ctx.step, torch.equal(params[0].tensor, before), len(g))))
    opt.after.append(lambda ctx: seen.append(("after", ctx.step, torch.equal(params[0].tensor, before))))
    walk(opt, params, 1, 1)
    assert seen == [("observe", 1, True, len(params)), ("after", 1, False)]

    def stop(ctx, grads):
        raise TrainingError("stop")

    opt.observers.append(stop)
    now = [p.tensor.detach().clone() for p in params]
    with pytest.raises(TrainingError):
        walk(opt, params, 2, 2)
    assert opt.steps == 1 and all(torch.equal(p.tensor, q) for p, q in zip(params, now))


def test_closure_and_lr_ratio():
    w = param("w", tensor(3))
    opt = make("sgd", [w], lr=0.1)
    ratios = []
    opt.after.append(lambda ctx: ratios.append((ctx.lr, ctx.lr_ratio)))

    def closure():
        opt.zero_grad()
        loss = w.tensor.square().sum()
        loss.backward()
        return loss

    assert float(opt.step(closure).detach()) == pytest.approx(float(tensor(3).square().sum()))
    torch.testing.assert_close(w.tensor.detach(), 0.8 * tensor(3))
    opt.param_groups[0]["lr"] = 0.05
    opt.step(closure)
    assert ratios == [(0.1, 1.0), (0.05, 0.5)]


def test_a_tensor_put_into_the_group_by_a_wrapper_is_the_one_stepped():
    w = param("w", tensor(3))
    opt = make("sgd", [w], lr=1.0)
    new = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    opt.param_groups[0]["params"][0] = new
    new.grad = torch.ones_like(new)
    opt.step()
    assert torch.equal(new.detach(), -torch.ones(3, dtype=torch.float64)) and opt.params["w"].tensor is new


def test_resync_policies_and_ages():
    params = pair("s", 4, 5, 3)
    opt = make("adamw", params)
    walk(opt, params, 1, 4)
    moments = opt.tree["/link0"]
    mu = moments["s.A"]["mu"].clone()
    opt.resync("s.A", [0, 2], "keep")
    assert torch.equal(moments["s.A"]["mu"], mu) and moments["s.A"]["age"] == 4
    opt.resync("s.A", [0, 2], "zero")
    assert torch.equal(moments["s.A"]["mu"][[0, 2]], mu[[0, 2]]) and not moments["s.A"]["mu"][1].any()
    assert moments["s.A"]["age"].tolist() == [4, 0, 4]
    nu = moments["s.B"]["nu"].clone()
    opt.resync("s.B", [2, -1, 0, -1], "slice")
    assert moments["s.B"]["nu"].shape == (4, 4) and moments["s.B"]["age"].tolist() == [4, 0, 4, 0]
    assert torch.equal(moments["s.B"]["nu"][:, [0, 2]], nu[:, [2, 0]]) and not moments["s.B"]["nu"][:, [1, 3]].any()
    opt.resync("s.A", None, "zero")
    assert moments["s.A"]["age"] == 0 and not moments["s.A"]["mu"].any()
    opt.resync("s.B", None, "drop")
    assert opt.state_elements() == {"s.A": 2 * 15}


def test_a_restarted_component_steps_as_a_new_parameter_does():
    (a, _), (fresh, _) = pair("s", 4, 5, 3), pair("s", 4, 5, 3)
    old, new = make("adamw", [a]), make("adamw", [fresh])
    walk(old, [a], 1, 5)
    old.resync("s.A", [0, 2], "zero")
    fresh.tensor.data.copy_(a.tensor.data)
    for t in (6, 7, 8):
        walk(old, [a], t, t)
        fresh.tensor.grad = a.tensor.grad.clone()
        new.step()
    torch.testing.assert_close(a.tensor[1], fresh.tensor[1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(a.tensor[0], fresh.tensor[0], atol=1e-4)


def test_the_slow_path_with_equal_ages_is_the_fused_path():
    a, b = pair("s", 4, 5, 3)[:1], pair("s", 4, 5, 3)[:1]
    fast, slow = make("adamw", a, weight_decay=0.1), make("adamw", b, weight_decay=0.1)
    walk(fast, a, 1, 3)
    walk(slow, b, 1, 3)
    slow.tree["/link0"]["s.A"]["age"] = torch.full((3,), 3)  # a vector of equal ages takes the chain
    walk(fast, a, 4, 9)
    walk(slow, b, 4, 9)
    torch.testing.assert_close(a[0].tensor, b[0].tensor, rtol=1e-12, atol=1e-13)


def test_a_resize_without_resync_is_an_error_and_with_it_trains_on():
    params = pair("s", 4, 5, 3)
    opt = make("adamw", params)
    walk(opt, params, 1, 2)
    params[0].tensor.grad = None
    params[0].tensor.data = params[0].tensor.data[:2].clone()
    with pytest.raises(TrainingError, match="resync"):
        walk(opt, params, 3, 3)
    opt.resync("s.A", [0, 1], "slice")
    walk(opt, params, 3, 4)
    assert opt.tree["/link0"]["s.A"]["mu"].shape == (2, 5)


def test_refusals():
    opt = make("adamw", world())
    with pytest.raises(RankwiseError, match="all its parameters"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    with pytest.raises(UnknownName, match=r"l0\.q\.A"):
        opt.resync("l0.q.AA")
    with pytest.raises(OptionError, match="policy"):
        opt.resync("l0.q.A", policy="forget")
    with pytest.raises(OptionError, match="whole tensor"):
        opt.resync("l0.q.A", [0], "drop")
    with pytest.raises(OptionError, match="lr is"):
        make("adamw", world(), lr=-1.0)
    with pytest.raises(OptionError, match="no betas"):
        make("sgd", world(), betas=(0.9, 0.99))
    with pytest.raises(OptionError, match="called 'w'"):
        make("adamw", [param("w", tensor(2)), param("w", tensor(2))])
    with pytest.raises(OptionError, match="no parameters"):
        make("adamw", [])
    with pytest.raises(OptionError, match="betas"):
        make("adamw", world(), betas=(0.9, 1.0))
    walk(opt, list(opt.params.values()), 1, 1)
    with pytest.raises(OptionError, match="outside"):
        opt.resync("l0.q.A", [0, 7], "zero")
    with pytest.raises(OptionError, match="component"):
        opt.resync("l2.out.weight", [0], "zero")


def test_a_state_of_something_else_is_refused():
    opt = make("adamw", world())
    for other, match in (
        (make("sgd", world()), "method"),
        (make("adamw", world(), betas=(0.8, 0.9)), "options"),
        (make("adamw", world()[:-1]), "l2.out.weight"),
    ):
        with pytest.raises(ArtefactError, match=match):
            opt.load_state_dict(other.state_dict())
    with pytest.raises(ArtefactError, match="rankwise"):
        opt.load_state_dict(torch.optim.AdamW([nn.Parameter(torch.zeros(2))]).state_dict())


def test_erasing_the_ratio_is_an_error():
    params = world()
    opt = make("loraplus", params)
    for g in opt.param_groups:
        g["lr"] = 1e-3
    with pytest.raises(TrainingError, match="one rate for all"):
        walk(opt, params, 1, 1)


def test_sparse_gradients_are_refused():
    emb = nn.Embedding(4, 3, sparse=True)
    opt = make("adamw", [Param("e", emb.weight)])
    emb(torch.tensor([1])).sum().backward()
    with pytest.raises(TrainingError, match="sparse"):
        opt.step()


def test_gradient_scaling_skips_all_of_a_step():
    w = param("w", tensor(3, dtype=torch.float32))
    opt = make("adamw", [w])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = w.tensor.detach().clone()
    scaler.scale((w.tensor * torch.tensor([float("inf"), 1.0, 1.0])).sum()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(w.tensor, before) and opt.steps == 0 and opt.state_elements() == {}
    opt.zero_grad()
    scaler.scale(w.tensor.sum()).backward()
    scaler.step(opt)
    assert opt.steps == 1
    torch.testing.assert_close(w.tensor.detach(), before - 1e-2, rtol=1e-5, atol=1e-6)


def test_many_small_tensors_step_as_quickly_as_torch_fused():
    shapes = [(8, 64), (64, 8)] * 60

    def median(opt):
        times = []
        for _ in range(25):
            start = time.perf_counter()
            opt.step()
            times.append(time.perf_counter() - start)
        return sorted(times)[12]

    def tensors():
        out = [nn.Parameter(torch.randn(s)) for s in shapes]
        for p in out:
            p.grad = torch.randn_like(p)
        return out

    ours = make("adamw", [Param(f"p{i}", p) for i, p in enumerate(tensors())])
    theirs, plain = torch.optim.AdamW(tensors(), fused=True), torch.optim.AdamW(tensors(), foreach=False)
    quick, fused, slow = median(ours), median(theirs), median(plain)
    assert quick < 2.0 * fused and quick < 0.5 * slow


def test_isinstance_and_scheduler_counting():
    params = world()
    opt = make("adamw", params, lr=1.0)
    assert isinstance(opt, torch.optim.Optimizer) and isinstance(opt, TransformOptimizer)
    sched = torch.optim.lr_scheduler.CosineAnnealingLR(opt, 10)
    for t in range(1, 4):
        walk(opt, params, t, t)
        sched.step()
    assert sched.last_epoch == 3 and opt.param_groups[0]["lr"] < 1.0
