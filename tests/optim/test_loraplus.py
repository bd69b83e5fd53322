"""LoRA+: only B is faster, by exactly the ratio, under any scheduler."""

from __future__ import annotations

import pytest
import torch

from rankwise import catalogue
from rankwise.errors import OptionError, RecipeError
from tests.optim.tools import make, param, same, tensor, walk, world


def test_ratio_one_is_adamw_step_for_step():
    plus, plain = world(), world()
    walk(make("loraplus", plus, options={"ratio": 1.0}, weight_decay=0.1), plus, 1, 6)
    walk(make("adamw", plain, weight_decay=0.1), plain, 1, 6)
    assert same(plus, plain)


def test_one_step_displaces_b_by_the_ratio_and_leaves_the_rest():
    start, plain, plus = world(), world(), world()
    walk(make("adamw", plain), plain, 1, 1)
    walk(make("loraplus", plus, options={"ratio": 7.0}), plus, 1, 1)
    for s, a, b in zip(start, plain, plus):
        want = 7.0 if a.role == "B" else 1.0
        torch.testing.assert_close(b.tensor - s.tensor, want * (a.tensor - s.tensor), rtol=1e-9, atol=1e-12)


def test_every_parameter_is_in_one_group_and_a_matrix_core_is_fast():
    params = [*world(), param("x.M", tensor(3, 3), "core"), param("y.M", tensor(3), "core")]
    opt = make("loraplus", params)
    names = [n for g in opt.param_groups for n in g["param_names"]]
    assert sorted(names) == sorted(p.name for p in params)
    fast = {n for g in opt.param_groups if g["multiplier"] == 16.0 for n in g["param_names"]}
    assert fast == {"l0.q.B", "l1.up.B", "x.M"}


def test_lambda_lr_keeps_the_ratio():
    params = world()
    opt = make("loraplus", params, lr=0.1)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda t: 1.0 / (1 + t))
    for t in range(1, 5):
        walk(opt, params, t, t)
        sched.step()
        rates = {g["multiplier"]: g["lr"] for g in opt.param_groups}
        assert rates[16.0] / rates[1.0] == pytest.approx(16.0) and rates[1.0] == pytest.approx(0.1 / (1 + t))


def test_refusals():
    with pytest.raises(RecipeError, match="trains no B"):
        make("loraplus", [param("w", tensor(3, 3), "weight")])
    with pytest.raises(OptionError, match="ratio"):
        catalogue.make("optimizer", "loraplus", ratio=0.5)
