"""GaLore: five identities of Zhao et al. 2024, Alg. 2, numbered (i)–(v) below."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError
from rankwise.optim import Param, SvdProjector, TransformOptimizer, chain, in_subspace, scale_by_lr
from tests.optim.tools import Wire, make, pair, param, same, tensor, walk, world

ETA, ALPHA, T = 0.03, 0.25, 5


def problem(out: int, inn: int):
    """A least-squares loss of W; returns its gradient as a function of W."""
    x, y = tensor(40, inn, key=1), tensor(40, out, key=2)
    return lambda w: (w @ x.T - y.T) @ x / 40


@pytest.mark.parametrize("out,inn", [(8, 6), (6, 9), (7, 7)])
def test_one_period_is_lora_with_a_frozen_basis(out, inn):
    """(i): Adam on B alone at rate α·η, A = Q; from the left, Adam on A alone with B = P."""
    grad, w0, r = problem(out, inn), tensor(out, inn), 3
    w = param("m.weight", w0, "weight")
    opt = make("galore", [w], ETA, {"r": r, "every": T, "scale": ALPHA, "eps": 1e-6})
    u, _, vh = torch.linalg.svd(grad(w0), full_matrices=False)
    right = out >= inn
    fixed = vh[:r] if right else u[:, :r]
    free = nn.Parameter(torch.zeros(out, r, dtype=torch.float64) if right else torch.zeros(r, inn, dtype=torch.float64))
    m, v = torch.zeros_like(free), torch.zeros_like(free)
    for t in range(1, T + 1):
        w.tensor.grad = grad(w.tensor.detach())
        opt.step()
        now = w0 + (free @ fixed if right else fixed @ free)
        g = (grad(now) @ fixed.T if right else fixed.T @ grad(now)).detach()  # the LoRA chain rule, s = 1
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        step = ALPHA * ETA * (1 - 0.999**t) ** 0.5 / (1 - 0.9**t) * m / (v.sqrt() + 1e-6)
        free.data -= step
        want = w0 + (free @ fixed if right else fixed @ free)
        assert float((w.tensor.detach() - want.detach()).abs().max()) < 1e-12
    assert torch.linalg.matrix_rank(w.tensor.detach() - w0, rtol=1e-10) == r  # (ii)


def test_k_periods_have_rank_at_most_k_r():
    grad, w0 = problem(12, 10), tensor(12, 10)
    w = param("m.weight", w0, "weight")
    opt = make("galore", [w], ETA, {"r": 2, "every": 3})
    for _ in range(9):
        w.tensor.grad = grad(w.tensor.detach())
        opt.step()
    assert torch.linalg.matrix_rank(w.tensor.detach() - w0, rtol=1e-9) == 6


def test_full_rank_with_sgd_inside_is_sgd():
    """(iv), through a real basis: the pass-through is taken away."""

    class Full(SvdProjector):
        def side(self, shape):
            return None if len(shape) not in (2, 3) else "right" if shape[-2] >= shape[-1] else "left"

        def small_shape(self, shape, side):
            return tuple(shape)

    identity = type("Identity", (type(scale_by_lr()).__mro__[1],), {})
    a, b = world(), world()
    walk(TransformOptimizer(Wire(chain(in_subspace(Full(99), identity()), scale_by_lr())), a, 0.1), a, 1, 4)
    walk(make("sgd", b, 0.1), b, 1, 4)
    for x, y in zip(a, b):
        torch.testing.assert_close(x.tensor, y.tensor, rtol=1e-12, atol=1e-12)


def test_state_elements():
    """(v) r·min + 2·r·max, per expert in a stack; everything else as Adam."""
    params = [*world(), param("e.weight", tensor(4, 7, 9, key=3), "weight"), param("n.weight", tensor(6), "weight")]
    opt = make("galore", params, options={"r": 3})
    walk(opt, params, 1, 2)
    got = opt.state_elements()
    assert got["l2.down.weight"] == 3 * 6 + 2 * 3 * 8 and got["l2.out.weight"] == 3 * 6 + 2 * 3 * 10
    assert got["e.weight"] == 4 * (3 * 7 + 2 * 3 * 9) and got["n.weight"] == 12 and got["l0.q.A"] == 2 * 10


def test_decay_comes_after_the_step_and_is_not_scaled():
    w0, g = tensor(8, 6), tensor(8, 6, key=1)
    with_decay, without = param("m.weight", w0, "weight"), param("m.weight", w0, "weight")
    for p, wd in ((with_decay, 0.5), (without, 0.0)):
        p.tensor.grad = g.clone()
        make("galore", [p], 0.1, {"r": 2}, weight_decay=wd).step()
    torch.testing.assert_close(with_decay.tensor.detach(), without.tensor.detach() * (1 - 0.1 * 0.5))


def test_others_take_adamw():
    a, b = pair("s", 5, 4, 2), pair("s", 5, 4, 2)
    head = [param("lm_head.weight", tensor(9, 8), "weight"), param("lm_head.weight", tensor(9, 8), "weight")]
    body = param("m.weight", tensor(8, 6), "weight")
    left, right = [*a, head[0], body], [*b, head[1]]
    walk(make("galore", left, options={"r": 3, "eps": 1e-8}, weight_decay=0.1), left, 1, 4)
    walk(make("adamw", right, weight_decay=0.1), right, 1, 4)
    assert same(left[:3], right)


def test_renewal_happens_at_the_first_step_and_every_t():
    grad, w = problem(8, 6), param("m.weight", tensor(8, 6), "weight")
    opt = make("galore", [w], ETA, {"r": 2, "every": 3})
    bases = []
    for _ in range(7):
        w.tensor.grad = grad(w.tensor.detach())
        opt.step()
        bases.append(opt.tree["/thin"]["/link0"]["/projector"]["m.weight"]["basis"])
    assert [bases[i] is bases[i - 1] for i in range(1, 7)] == [True, True, False, True, True, False]


def test_loss_lies_between_adam_and_a_dead_start():
    grad = problem(16, 12)
    x, y = tensor(40, 12, key=1), tensor(40, 16, key=2)

    def loss_after(opt_name, options, lr):
        w = param("m.weight", torch.zeros(16, 12, dtype=torch.float64), "weight")
        opt = make(opt_name, [w], lr, options)
        for _ in range(300):
            w.tensor.grad = grad(w.tensor.detach())
            opt.step()
        return float((w.tensor.detach() @ x.T - y.T).square().mean())

    full, thin = loss_after("adamw", {}, 0.01), loss_after("galore", {"r": 3, "every": 20, "scale": 1.0}, 0.01)
    assert full <= thin + 1e-9 < float(y.square().mean()) * 0.9


def test_refusals():
    with pytest.raises(RecipeError, match="project nothing"):
        make("galore", world(), options={"r": 64})
    with pytest.raises(RecipeError, match="project nothing"):
        make("galore", pair("s", 9, 9, 8), options={"r": 2})
    with pytest.raises(OptionError, match="rank"):
        catalogue.make("optimizer", "galore", r=0)
    sharded = Param("m.weight", type("DTensor", (nn.Parameter,), {"placements": ()})(tensor(8, 6)), "m", "weight")
    with pytest.raises(RecipeError, match="sharded"):
        make("galore", [sharded], options={"r": 2})
