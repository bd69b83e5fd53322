"""An adapter as one value: vectors and back, order, gated changes, refusals."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise.delta import (
    LINEAR,
    AdapterState,
    BlockAffine,
    Columns,
    ConstantGate,
    Conv,
    Dense,
    Embedding,
    Entries,
    Gated,
    Kron,
    LowRank,
    Rows,
    Scale,
    Sum,
    rebuild,
)
from rankwise.errors import MergeError, OptionError

F64 = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64)


def pair(out: int = 6, inp: int = 8, r: int = 2) -> LowRank:
    return LowRank(rand(r, inp), rand(out, r), 0.5)


def state() -> AdapterState:
    mixed = Sum((pair(), Columns(torch.tensor([4, 1]), rand(6, 2), 8)))
    return AdapterState({"b": mixed, "a": pair()}, full={"z": rand(3), "head": rand(2, 2)})


def test_a_vector_holds_the_numbers_and_never_the_indices() -> None:
    s = state()
    v = s.flatten(s.spec())
    assert v.dtype == F64 and v.numel() == s.spec().numel == s.numel() == 28 + 28 + 12 + 3 + 4
    back = s.unflatten(2 * v, s.spec())
    assert torch.equal(back.sites["b"].parts[1].index, torch.tensor([4, 1]))  # type: ignore[attr-defined]
    assert torch.equal(back.flatten(), 2 * v) and torch.equal(back.full["head"], 2 * s.full["head"])
    assert torch.equal(s.unflatten(v).sites["a"].dense(), s.sites["a"].dense())


def test_names_are_in_order_however_they_come() -> None:
    s = state()
    again = AdapterState(dict(reversed(s.sites.items())), dict(reversed(s.full.items())))
    assert list(s.sites) == ["a", "b"] and list(s.full) == ["head", "z"]
    assert s.spec() == again.spec() and torch.equal(s.flatten(), again.flatten())


def test_gradients_reach_what_made_the_vector() -> None:
    s = state()
    v = s.flatten().requires_grad_(True)
    s.unflatten(v).sites["b"].apply(rand(3, 8)).square().sum().backward()
    assert v.grad is not None and (v.grad[:28] == 0).all() and (v.grad[28:68] != 0).all()


def test_whole_tensors_move_with_the_changes() -> None:
    s = state().to(torch.float32)
    assert {t.dtype for t in s.full.values()} | {d.dtype for d in s.sites.values()} == {torch.float32}
    assert s.detach().clone().numel() == s.numel()


def test_truncation_reports_each_site() -> None:
    s = AdapterState({"w": Dense(rand(6, 8)), "x": pair()})
    low, errors = s.truncate(energy=0.8)
    for n, d in s.sites.items():
        W = d.dense()
        assert errors[n] == pytest.approx(((low.sites[n].dense() - W).norm() / W.norm()).item(), abs=1e-9)
    assert s.norm().item() == pytest.approx(sum(d.dense().square().sum() for d in s.sites.values()).sqrt().item())


def test_a_sum_joins_parts_of_one_kind() -> None:
    both = Sum((pair(), Columns(torch.tensor([1]), rand(6, 1), 8))) + pair() + Columns(torch.tensor([1, 2]), rand(6, 2), 8)
    assert [p.kind for p in both.parts] == ["lowrank", "columns"] and both.exact_rank == 6  # type: ignore[attr-defined]


def test_a_gain_learns_the_size_it_does_not_know() -> None:
    W, gain, low = rand(6, 8), rand(6), pair()
    assert torch.allclose((Scale(gain) + low).dense(W), (gain - 1)[:, None] * W + low.dense())
    assert torch.allclose(Scale(gain).add_into(W), gain[:, None] * W)


def test_what_x_decides_is_no_weight_until_it_is_collapsed() -> None:
    low, g = LowRank(rand(3, 8), rand(6, 3), 0.5), torch.rand(500, 3, dtype=F64)
    d = Gated(low)
    for refused in (
        d.dense,
        lambda: d.add_into(rand(6, 8)),
        d.to_lowrank,
        lambda: d.to_lowrank(rank=1),
        lambda: (d + pair()).dense(),
    ):
        with pytest.raises(MergeError, match=re.escape("collapse()")):
            refused()
    x = rand(500, 8)
    z = x @ low.A.T
    u = g * z
    best, residual = d.collapse(z.T @ z / 500, u.T @ z / 500, u.T @ u / 500)
    gap = (Gated(low, type("Rows", (), {"constant": False, "dense": lambda self, n, u: g})()).apply(x) - best.apply(x)).square()
    assert residual is not None and residual.item() == pytest.approx(gap.sum(-1).mean().item(), rel=1e-9)
    worse = LowRank(low.A, best.B + 1e-3 * rand(6, 3))
    assert (0.5 * u @ low.B.T - worse.apply(x)).square().sum(-1).mean() > residual
    constant = Gated(low, ConstantGate(rand(3)))
    v = z * constant.decision.gate()
    exact, nothing = constant.collapse(z.T @ z, v.T @ z, v.T @ v)
    assert torch.allclose(exact.dense(), constant.dense(), atol=1e-9) and nothing is not None and nothing < 1e-6
    assert rebuild("gated", d.tensors(), d.meta()).exact_rank is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LowRank(rand(3, 8), rand(6, 2)), "do not fit"),
        (lambda: LowRank(rand(3, 8), rand(6, 3), core=rand(2)), "core of"),
        (lambda: Kron(rand(2, 2, 2), rand(2, 2)), "leading axes"),
        (lambda: BlockAffine(rand(3, 2, 4), 8), "square"),
        (lambda: BlockAffine(rand(3, 3, 3), 8), "do not divide"),
        (lambda: Columns(torch.tensor([1]), rand(6, 2), 8), "column indices"),
        (lambda: Rows(torch.tensor([1]), rand(2, 8), 6), "row indices"),
        (lambda: Entries(torch.tensor([1]), rand(2), (6, 8)), "entry indices"),
        (lambda: rebuild("columns", {"index": torch.tensor([1, 1]), "values": rand(6, 2)}, {"in_features": 8}), "distinct"),
        (lambda: rebuild("rows", {"index": torch.tensor([6]), "values": rand(1, 8)}, {"out_features": 6}), "0…5"),
        (lambda: rebuild("entries", {"index": torch.tensor([-1]), "values": rand(1)}, {"size": [6, 8]}), "0…47"),
        (lambda: pair(6, 8) + pair(6, 4), "cannot be added"),
        (lambda: pair(6, 8) - pair(8, 8), "cannot be added"),
        (lambda: pair().inner(LowRank(rand(3, 2, 8), rand(3, 6, 2))), "cannot be compared"),
        (lambda: pair().add_into(rand(1, 8)), "does not fit"),
        (lambda: Sum((pair(), pair(6, 4))), "one shape"),
        (lambda: Scale(rand(6), other=8).norm(), "give weight=W"),
        (lambda: Dense(rand(6, 8)).to_lowrank(), "no exact low-rank"),
        (lambda: Dense(rand(2, 6, 8)).apply(torch.tensor([1]), op=Embedding()), "stack"),
        (lambda: Dense(rand(2, 6, 4)).apply(rand(1, 4, 5), op=Conv((1,), (1,), (0,), (1,), nd=1)), "stack"),
        (lambda: state() + state(), "whole tensors"),
        (lambda: state().unflatten(rand(3)), "3 numbers"),
        (lambda: state().flatten(AdapterState({"a": pair(r=1)}).spec()), "not this state's"),
    ],
)
def test_refusals_are_one_clear_sentence(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        make()
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)


def test_a_shared_input_meets_every_member() -> None:
    d, x = LowRank(rand(3, 2, 8), rand(3, 6, 2)), rand(4, 8)
    assert torch.allclose(d.apply(x, op=LINEAR), torch.stack([x @ d.dense()[e].T for e in range(3)]))
