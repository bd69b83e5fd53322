"""ALLoRA: c_i against the formed product; what is gated and what is not."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError
from rankwise.optim.allora import RowGate
from tests.optim.tools import by_name, make, pair, param, same, tensor, walk, world


def gate(params, **options):
    method = catalogue.make("optimizer", "allora", **options)
    return RowGate(method, {"s.B": "s.A"}).compute("s.B", by_name(params))


@pytest.mark.parametrize("experts", [0, 3])
def test_c_equals_the_formula_on_the_formed_product(experts):
    params = pair("s", 6, 9, 2, experts=experts)
    a, b = (p.tensor.detach() for p in params)
    torch.testing.assert_close(gate(params), 1 / ((b @ a).norm(dim=-1) + 0.25).sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(gate(params, norm_of="B", eta=3.0), 1 / (b.norm(dim=-1) + 1 / 9).sqrt())


def test_c_is_eta_at_zero_and_falls_as_rows_grow():
    params = pair("s", 6, 9, 2)
    seen = []
    for size in (0.0, 0.1, 1.0, 10.0):
        params[1].tensor.data = size * tensor(6, 2, key=4)
        seen.append(gate(params))
    torch.testing.assert_close(seen[0], torch.full((6,), 2.0, dtype=torch.float64))
    assert all((late < early).all() for early, late in pairwise(seen))


@pytest.mark.parametrize("experts", [0, 2])
def test_the_update_of_b_is_gated_and_nothing_else(experts):
    params, plain = pair("s", 6, 9, 2, experts=experts), pair("s", 6, 9, 2, experts=experts)
    start = pair("s", 6, 9, 2, experts=experts)
    c = gate(params)
    walk(make("allora", params), params, 1, 1)
    walk(make("adamw", plain), plain, 1, 1)
    assert torch.equal(params[0].tensor, plain[0].tensor)
    moved, want = params[1].tensor - start[1].tensor, plain[1].tensor - start[1].tensor
    torch.testing.assert_close(moved, c[..., None] * want, rtol=1e-9, atol=1e-12)


def test_gating_the_gradient_hardly_shows_under_adam():
    params, plain, start = pair("s", 6, 9, 2), pair("s", 6, 9, 2), pair("s", 6, 9, 2)
    walk(make("allora", params, options={"apply_to": "gradient"}), params, 1, 1)
    walk(make("adamw", plain), plain, 1, 1)
    torch.testing.assert_close(params[1].tensor - start[1].tensor, plain[1].tensor - start[1].tensor, rtol=1e-5, atol=1e-9)
    opt = make("allora", params, options={"apply_to": "gradient"})
    c = gate(params)
    walk(opt, params, 2, 2)
    mu = opt.tree["/gated"]["/link1"]["s.B"]["mu"]
    torch.testing.assert_close(mu, 0.1 * c[:, None] * params[1].tensor.grad)  # g_B^new = diag(c)·g_B exactly


def test_decay_is_not_gated():
    params, start = pair("s", 6, 9, 2), pair("s", 6, 9, 2)
    opt = make("allora", params, lr=0.1, weight_decay=0.5)
    for p in params:
        p.tensor.grad = torch.zeros_like(p.tensor)
    opt.step()
    torch.testing.assert_close(params[1].tensor.detach(), 0.95 * start[1].tensor.detach())


def test_every_keeps_c_between_computations():
    params = pair("s", 6, 9, 2)
    opt = make("allora", params, lr=0.5, options={"every": 3})
    seen = []
    opt.after.append(lambda ctx: seen.append(opt.tree["/gated"]["/link1"]["s.B"]["rows"]))
    walk(opt, params, 1, 6)
    assert seen[0] is seen[2] and seen[3] is seen[5] and not torch.equal(seen[0], seen[3])
    assert opt.state_elements()["s.B"] == 2 * 12 + 6


def test_factor_gates_both_by_their_own_rows():
    params, plain, start = pair("s", 6, 9, 2), pair("s", 6, 9, 2), pair("s", 6, 9, 2)
    walk(make("allora", params, options={"norm_of": "factor"}), params, 1, 1)
    walk(make("adamw", plain), plain, 1, 1)
    for p, q, s in zip(params, plain, start):
        c = 1 / (s.tensor.norm(dim=-1) + 0.25).sqrt()
        torch.testing.assert_close(p.tensor - s.tensor, c[:, None] * (q.tensor - s.tensor), rtol=1e-9, atol=1e-12)


def test_small_eta_with_lr_eta_fixed_is_lora():
    tiny, plain = world(), world()
    walk(make("allora", tiny, lr=1e-2, options={"eta": 1e-5}), tiny, 1, 1)
    walk(make("adamw", plain, lr=1e-2), plain, 1, 1)
    start = world()
    for p, q, s in zip(tiny, plain, start):
        want = (q.tensor - s.tensor) * (1e-5 if p.role == "B" else 1.0)
        torch.testing.assert_close(p.tensor - s.tensor, want, rtol=1e-6, atol=1e-14)


def test_without_pairs_it_is_refused_and_others_take_adamw():
    with pytest.raises(RecipeError, match="none is trained"):
        make("allora", [param("w", tensor(3, 3), "weight")])
    with pytest.raises(OptionError, match="eta"):
        catalogue.make("optimizer", "allora", eta=0.0)
    params, plain = world(), world()
    walk(make("allora", params), params, 1, 3)
    walk(make("adamw", plain), plain, 1, 3)
    assert same([p for p in params if p.role != "B"], [p for p in plain if p.role != "B"])
