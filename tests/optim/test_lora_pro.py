"""LoRA-Pro (Wang et al. 2024): the invariants of its closed-form steps, in fp64, for single pairs and stacks."""

from __future__ import annotations

import pytest
import torch

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError, TrainingError
from rankwise.optim.lora_pro import PairSolver
from tests.optim.tools import make, pair, param, tensor, walk, world

S = 1.7
shapes = pytest.mark.parametrize("lead,out,inn,r", [((), 9, 7, 3), ((2,), 5, 8, 2), ((), 6, 6, 1)])


def setting(lead, out, inn, r):
    a, b, g = tensor(*lead, r, inn, key=1), tensor(*lead, out, r, key=2), tensor(*lead, out, inn, key=3)
    solver = PairSolver(a, b, S)
    return a, b, g, solver, *solver.factor_gradients(g)


def projections(a, b):
    return b @ torch.linalg.inv(b.mT @ b) @ b.mT, a.mT @ torch.linalg.inv(a @ a.mT) @ a


@shapes
def test_the_effect_is_the_gradient_less_what_no_step_can_reach(lead, out, inn, r):
    a, b, g, solver, g_a, g_b = setting(lead, out, inn, r)
    p_b, p_a = projections(a, b)
    want = g - (torch.eye(out) - p_b) @ g @ (torch.eye(inn) - p_a)
    for free in (True, False):  # whatever X is
        torch.testing.assert_close(solver.effect(*solver.steps(g_a, g_b, free)), want, rtol=1e-11, atol=1e-12)


@shapes
def test_descent_and_closeness(lead, out, inn, r):
    _, _, g, solver, g_a, g_b = setting(lead, out, inn, r)
    e = solver.effect(*solver.steps(g_a, g_b))
    torch.testing.assert_close((g * e).sum(), e.square().sum())
    own = solver.effect(g_a, g_b)  # LoRA's own product gradient, at its best scaling
    best = (own * g).sum((-2, -1), keepdim=True) / own.square().sum((-2, -1), keepdim=True)
    assert ((e - g).square().sum((-2, -1)) <= (best * own - g).square().sum((-2, -1)) + 1e-12).all()


@shapes
def test_no_other_x_is_closer_to_the_gradients(lead, out, inn, r):
    a, b, _, solver, g_a, g_b = setting(lead, out, inn, r)
    d_a, d_b = solver.steps(g_a, g_b)
    far = (d_a - g_a).square().sum() + (d_b - g_b).square().sum()
    for i in range(200):
        x = 10.0 ** (-i % 5) * tensor(*lead, r, r, key=100 + i)
        assert (d_a + x @ a - g_a).square().sum() + (d_b - b @ x - g_b).square().sum() > far


@shapes
def test_sylvester(lead, out, inn, r):
    _, _, _, solver, _, _ = setting(lead, out, inn, r)
    c = tensor(*lead, r, r, key=9)
    x = solver.sylvester(c)
    torch.testing.assert_close(solver.btb @ x + x @ solver.aat, c, rtol=1e-11, atol=1e-11)


@shapes
def test_gauge(lead, out, inn, r):
    a, b, g, solver, g_a, g_b = setting(lead, out, inn, r)
    t = tensor(*lead, r, r, key=8) + 3 * torch.eye(r)
    other = PairSolver(torch.linalg.inv(t) @ a, b @ t, S)
    torch.testing.assert_close(
        other.effect(*other.steps(*other.factor_gradients(g))), solver.effect(*solver.steps(g_a, g_b)), rtol=1e-9, atol=1e-10
    )


def test_full_rank_factors_reach_the_gradient():
    _, _, g, solver, g_a, g_b = setting((), 6, 9, 6)
    torch.testing.assert_close(solver.effect(*solver.steps(g_a, g_b)), g, rtol=1e-9, atol=1e-9)


def test_first_step_from_zero():
    a, g = tensor(3, 7, key=1), tensor(9, 7, key=3)
    solver = PairSolver(a, torch.zeros(9, 3), S)
    g_a, g_b = solver.factor_gradients(g)
    d_a, d_b = solver.steps(g_a, g_b)
    assert torch.equal(d_a, g_a)  # both zero
    torch.testing.assert_close(d_b, g_b @ torch.linalg.inv(a @ a.T) / S**2)


def test_rank_deficient_factors_stay_finite_and_exact():
    a, b, g = tensor(3, 7, key=1), tensor(9, 3, key=2), tensor(9, 7, key=3)
    b[:, 2] = b[:, 0]
    solver = PairSolver(a, b, S)
    e = solver.effect(*solver.steps(*solver.factor_gradients(g)))
    p_b, p_a = b @ torch.linalg.pinv(b), torch.linalg.pinv(a) @ a
    torch.testing.assert_close(e, g - (torch.eye(9) - p_b) @ g @ (torch.eye(7) - p_a), rtol=1e-9, atol=1e-9)


def test_damping_bounds_the_inverse():
    tiny = 1e-7 * tensor(9, 3, key=2)
    g = tensor(9, 7, key=3)
    damped, bare = PairSolver(tensor(3, 7), tiny, S, damping=1e-8), PairSolver(tensor(3, 7), tiny, S)
    steps = [s.steps(*s.factor_gradients(g), free=False)[0].norm() for s in (damped, bare)]
    assert steps[0] <= g.norm() / (2 * S * 1e-4) and steps[1] > 100 * steps[0]


def naive(a, b, g_of, variant, lr, steps):
    """Published algorithm on dense matrices with explicit inverses."""
    state = {}

    def adam(key, g, t):
        m, v = state.get(key, (torch.zeros_like(g), torch.zeros_like(g)))
        state[key] = m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    for t in range(1, steps + 1):
        g = g_of(S * b @ a)
        h, k = torch.linalg.inv(b.T @ b + 1e-8 * torch.eye(b.shape[1])), torch.linalg.inv(a @ a.T + 1e-8 * torch.eye(a.shape[0]))
        p = b @ h @ b.T
        off = torch.eye(b.shape[0]) - p
        g_a, g_b = S * b.T @ g, S * g @ a.T
        if variant == "adam":
            g = adam("g", S * b @ (h @ g_a / S**2) + S * (off @ g_b @ k / S**2) @ a, t)
            g_a, g_b = S * b.T @ g, S * g @ a.T
        c = -h @ g_a @ a.T / S**2
        x = torch.linalg.solve(
            torch.kron(b.T @ b, torch.eye(a.shape[0], dtype=a.dtype)) + torch.kron(torch.eye(a.shape[0], dtype=a.dtype), a @ a.T),
            c.reshape(-1),
        ).reshape(c.shape)
        a, b = a - lr * (h @ g_a / S**2 + x @ a), b - lr * (off @ g_b @ k / S**2 - b @ x)
    return a, b


@pytest.mark.parametrize("variant", ["adam", "sgd"])
def test_the_optimiser_runs_the_published_algorithm(variant):
    target = tensor(9, 7, key=5)
    params = pair("s", 9, 7, 3, s=S)
    a0, b0 = (p.tensor.detach().clone() for p in params)
    opt = make("lora_pro", params, 0.01, {"variant": variant})
    for _ in range(5):
        a, b = (p.tensor.detach() for p in params)
        g = S * b @ a - target
        params[0].tensor.grad, params[1].tensor.grad = S * b.T @ g, S * g @ a.T
        opt.step()
    want = naive(a0, b0, lambda w: w - target, variant, 0.01, 5)
    for p, w in zip(params, want):
        torch.testing.assert_close(p.tensor.detach(), w, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("variant", ["adam", "light"])
def test_from_zero_it_falls_at_once_and_without_a_spike(variant):
    """The start every LoRA has, B = 0, where a badly placed normalisation makes dA explode."""
    params = pair("s", 32, 24, 4)
    params[1].tensor.data.zero_()
    target, x = tensor(32, 6, key=1) @ tensor(6, 24, key=2), tensor(64, 24, key=3)
    opt, losses = make("lora_pro", params, 1e-3, {"variant": variant}), []
    for _ in range(60):
        opt.zero_grad()
        loss = (x @ (2.0 * params[1].tensor @ params[0].tensor - target).T).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert max(losses) <= losses[0] and losses[-1] < 0.97 * losses[0]


def test_light_is_adam_on_the_steps_of_the_raw_gradients():
    params, ref = pair("s", 9, 7, 3), pair("s", 9, 7, 3)
    opt, plain = make("lora_pro", params, options={"variant": "light", "damping": 0.0}), make("adamw", ref)
    for t in range(1, 4):
        walk(opt, params, t, t)
        solver = PairSolver(*(p.tensor for p in ref), 2.0)
        for p, d in zip(ref, solver.steps(*(q.tensor.grad for q in params))):
            p.tensor.grad = d
        plain.step()
    for p, q in zip(params, ref):
        torch.testing.assert_close(p.tensor, q.tensor, rtol=1e-9, atol=1e-10)


def test_the_stack_is_its_experts():
    stack = pair("e", 6, 9, 3, experts=2)
    opt = make("lora_pro", stack)
    singles = [[param(f"{i}.{p.role}", p.tensor.detach()[i], p.role, site=str(i), scale=2.0) for p in stack] for i in range(2)]
    others = [make("lora_pro", s) for s in singles]
    for t in range(1, 5):
        walk(opt, stack, t, t)
        for i, (s, o) in enumerate(zip(singles, others)):
            for p, q in zip(s, stack):
                p.tensor.grad = q.tensor.grad[i].clone()
            o.step()
    for i, s in enumerate(singles):
        for p, q in zip(s, stack):
            torch.testing.assert_close(p.tensor, q.tensor[i], rtol=1e-10, atol=1e-11)


def test_state_elements_and_the_rest_takes_adamw():
    params, plain = world(), world()
    opt = make("lora_pro", params)
    walk(opt, params, 1, 2)
    walk(make("adamw", plain), plain, 1, 2)
    got = opt.state_elements()
    assert got["l0.q.A"] == 2 * 7 * 5 and got["l1.up.A"] == 2 * 2 * 6 * 9 and "l0.q.B" not in got
    assert all(torch.equal(p.tensor, q.tensor) == (p.role not in "AB") for p, q in zip(params, plain))
    light = make("lora_pro", params, options={"variant": "light"})
    walk(light, params, 3, 3)
    assert light.state_elements() == {p.name: 2 * p.tensor.numel() for p in params}
    raw = make("lora_pro", params, options={"variant": "sgd"})
    walk(raw, params, 3, 3)
    assert not {n for n in raw.state_elements() if n[-1] in "AB"}


def test_refusals():
    with pytest.raises(RecipeError, match="trains none"):
        make("lora_pro", [param("w", tensor(3, 3), "weight")])
    with pytest.raises(RecipeError, match="core"):
        make("lora_pro", [*pair("s", 4, 4, 2), param("s.M", tensor(2, 2), "core")])
    with pytest.raises(RecipeError, match="no partner"):
        make("lora_pro", [*pair("s", 4, 4, 2), pair("t", 4, 4, 2)[0]])
    with pytest.raises(RecipeError, match="scale 0"):
        make("lora_pro", pair("s", 4, 4, 2, s=0.0))
    with pytest.raises(RecipeError, match="two factors A"):
        make("lora_pro", [*pair("s", 4, 4, 2), param("s.A2", tensor(2, 4), "A", site="s")])
    with pytest.raises(OptionError, match="variant"):
        catalogue.make("optimizer", "lora_pro", variant="fast")
    params = pair("s", 4, 4, 2)
    opt = make("lora_pro", params)
    with pytest.raises(TrainingError, match=r"only 's\.B'"):
        walk(opt, params, 1, 1, only={"s.B"})
