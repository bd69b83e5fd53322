"""Parts and their composition: what one wiring must equal another."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import OptionError
from rankwise.optim import (
    IdentityProjector,
    RandomProjector,
    SvdProjector,
    TransformOptimizer,
    adamw_chain,
    chain,
    clip,
    decoupled_decay,
    in_subspace,
    masked,
    partition,
    ratio_from_subspace,
    reparam,
    scale,
    scale_by_adam,
    scale_by_lr,
    switch,
    trace,
    two_sided,
)  # fmt: skip
from tests.optim.tools import Wire, by_name, context, param, same, tensor, walk, world


def run(transform, steps: int = 6, **kw):
    params = world()
    opt = TransformOptimizer(Wire(transform), params, 1e-2, weight_decay=0.2, **kw)
    walk(opt, params, 1, steps)
    return params


def adam():
    return chain(scale_by_adam(), scale_by_lr(), decoupled_decay())


def test_identity_projector_is_the_inner_transform():
    plain = run(chain(scale_by_adam(), scale_by_lr()))
    assert same(run(chain(in_subspace(IdentityProjector(), scale_by_adam()), scale_by_lr())), plain)
    assert not same(run(chain(in_subspace(IdentityProjector(), scale_by_adam(), 2.0), scale_by_lr())), plain)


def test_a_mask_of_ones_is_the_inner_transform():
    assert same(run(masked(adam(), lambda p, ctx: True)), run(adam()))
    assert same(run(masked(adam(), lambda p, ctx: torch.ones_like(p.tensor))), run(adam()))


def test_masked_elements_keep_their_bits_also_minus_zero():
    def mask(p, ctx):
        return (
            p.tensor.new_ones(p.tensor.shape).index_fill_(p.component_axis, torch.tensor([1]), 0.0)
            if p.role == "A"
            else p.role == "B"
        )

    params, start = world(), world()
    params[0].tensor.data[1, 0] = start[0].tensor.data[1, 0] = -0.0
    opt = TransformOptimizer(Wire(masked(adam(), mask)), params, 1e-2, weight_decay=0.2)
    walk(opt, params, 1, 4)
    for p, q in zip(params, start):
        if p.role == "A":
            kept, moved = (t.index_select(p.component_axis, torch.tensor(i)) for t, i in ((p.tensor, [1]), (p.tensor, [0])))
            was, had = (t.index_select(p.component_axis, torch.tensor(i)) for t, i in ((q.tensor, [1]), (q.tensor, [0])))
            assert torch.equal(kept.view(torch.int64), was.view(torch.int64)) and (moved != had).all()
        else:
            assert torch.equal(p.tensor, q.tensor) == (p.role != "B")


def test_partition_is_each_transform_on_its_own():
    both = run(
        partition(lambda p: "w" if p.role == "weight" else "rest", {"w": chain(trace(), scale_by_lr()), "rest": adamw_chain()})
    )
    left, right = run(chain(trace(), scale_by_lr())), run(adamw_chain())
    for got, w, rest in zip(both, left, right):
        assert torch.equal(got.tensor, w.tensor if got.role == "weight" else rest.tensor)
    with pytest.raises(OptionError, match="'other'"):
        run(partition(lambda p: "other", {"w": scale_by_lr()}))


def test_switch_rests_the_one_that_does_not_run():
    got = run(switch(adamw_chain(), chain(scale(0.0)), lambda ctx: ctx.step in (1, 4)), steps=6)
    want = world()
    opt = TransformOptimizer(Wire(adamw_chain()), want, 1e-2, weight_decay=0.2)
    for t in (1, 4):
        walk(opt, want, t, t)
    assert same(got, want)


def test_the_chain_and_the_fused_adamw_agree():
    for a, b in zip(run(adam()), run(adamw_chain())):
        torch.testing.assert_close(a.tensor, b.tensor, rtol=1e-12, atol=1e-13)


def test_eps_hat_is_the_same_direction_with_a_smaller_floor():
    g, p = tensor(4, 3), param("w", tensor(4, 3))
    one = scale_by_adam(eps=1e-3)
    hat = scale_by_adam(eps=1e-3, eps_hat=True)
    u = one.update({"w": g}, one.init(by_name([p])), by_name([p]), context())["w"]
    v = hat.update({"w": g}, hat.init(by_name([p])), by_name([p]), context())["w"]
    torch.testing.assert_close(u, g / (g.abs() + 1e-3))
    torch.testing.assert_close(v, g / (g.abs() + 1e-3 / 0.001**0.5))


def test_clip():
    grads = {"a": tensor(3, 4), "b": tensor(5, key=1)}
    total = torch.cat([g.reshape(-1) for g in grads.values()]).norm()
    out = clip(0.5).update(grads, {}, {}, context())
    torch.testing.assert_close(torch.cat([g.reshape(-1) for g in out.values()]).norm(), torch.tensor(0.5, dtype=torch.float64))
    torch.testing.assert_close(out["a"] / out["a"].norm(), grads["a"] / grads["a"].norm())
    assert all(torch.equal(x, y) for x, y in zip(clip(float(total) + 1).update(grads, {}, {}, context()).values(), grads.values()))
    each = clip(0.5, over="tensor").update(grads, {}, {}, context())
    assert all(float(g.norm()) == pytest.approx(0.5) for g in each.values())
    assert not clip(1.0).update({"z": torch.zeros(3)}, {}, {}, context())["z"].any()


def test_decay_orders():
    p = param("w", tensor(3))
    ctx = context(lr=0.1, params=[p])
    ctx.decays["w"] = 0.5
    u = tensor(3, key=2)
    before = decoupled_decay().update({"w": u}, {}, by_name([p]), ctx)["w"]
    after = decoupled_decay("after").update({"w": u}, {}, by_name([p]), ctx)["w"]
    torch.testing.assert_close(p.tensor + before, p.tensor * 0.95 + u)
    torch.testing.assert_close(p.tensor + after, (p.tensor + u) * 0.95)


def test_two_sided():
    left, right = tensor(8, 8, key=1), tensor(6, 6, key=2)
    p, g = param("w", tensor(8, 6)), tensor(8, 6, key=3)
    t = two_sided(lambda p, ctx: left, lambda p, ctx: right)
    torch.testing.assert_close(t.update({"w": g}, {}, by_name([p]), context())["w"], left @ g @ right)
    assert same(run(chain(two_sided(lambda p, c: None, lambda p, c: None), adam())), run(adam()))


def test_reparam_identity_and_rotation():
    back = lambda value, u: u["x"]
    assert same(
        run(chain(reparam(lambda v, g: {"x": (v, g)}, back, scale_by_adam()), scale_by_lr())),
        run(chain(scale_by_adam(), scale_by_lr())),
    )
    turn = {n: torch.linalg.qr(tensor(n, n, key=n))[0] for n in range(2, 11)}
    turned = reparam(
        lambda v, g: {"x": (v @ turn[v.shape[-1]], g @ turn[g.shape[-1]])}, lambda v, u: u["x"] @ turn[v.shape[-1]].T, trace(0.9)
    )
    for a, b in zip(run(chain(turned, scale_by_lr())), run(chain(trace(0.9), scale_by_lr()))):
        torch.testing.assert_close(a.tensor, b.tensor, rtol=1e-12, atol=1e-12)  # momentum does not see a rotation


def test_reparam_state_is_owned_by_its_parameter():
    params = world()
    split = reparam(lambda v, g: {"x": (v, g), "y": (v, g)}, lambda v, u: 0.5 * (u["x"] + u["y"]), scale_by_adam())
    opt = TransformOptimizer(Wire(chain(split, scale_by_lr())), params, 1e-2)
    walk(opt, params, 1, 2)
    assert opt.state_elements() == {p.name: 4 * p.tensor.numel() for p in params}
    opt.resync("l0.q.A", None, "zero")
    inner = opt.tree["/link0"]["/inner"]
    assert inner["l0.q.A::x"]["age"] == 0 == inner["l0.q.A::y"]["age"] and inner["l0.q.B::x"]["age"] == 2
    opt.drop(["l0.q.A"])
    assert "l0.q.A" not in opt.state_elements() and "l0.q.B" in opt.state_elements()


@pytest.mark.parametrize("shape", [(8, 6), (6, 10), (2, 8, 6)])
def test_ratio_from_subspace_rescales_the_gradient(shape):
    p, g = param("w", tensor(*shape)), tensor(*shape, key=4)
    for axis in ("channel", "tensor"):
        t = ratio_from_subspace(RandomProjector(2), scale_by_adam(), axis)
        u = t.update({"w": g}, t.init(by_name([p])), by_name([p]), context())["w"]
        f = u / g
        over = {"tensor": (-2, -1), "channel": -1 if shape[-2] >= shape[-1] else -2}[axis]
        torch.testing.assert_close(f, f.mean(over, keepdim=True).expand_as(f))
        if axis == "channel":
            assert f.reshape(-1).unique().numel() > 1
    # at t = 1 Adam's direction has entries ±1, so ‖N_c‖ = √r and f = √r/‖R_c‖
    t = ratio_from_subspace(SvdProjector(2), scale_by_adam(eps=0.0))
    state = t.init(by_name([p]))
    u = t.update({"w": g}, state, by_name([p]), context())["w"]
    s = state["/projector"]["w"]
    small = g @ s["basis"].mT if s["side"] == "right" else s["basis"].mT @ g
    dim = -1 if s["side"] == "right" else -2
    torch.testing.assert_close(u, g * (2**0.5 / (small.norm(dim=dim, keepdim=True) + 1e-8)))


def test_what_reads_values_cannot_run_in_a_subspace():
    with pytest.raises(OptionError, match="reads parameter values"):
        in_subspace(SvdProjector(2), adam())
