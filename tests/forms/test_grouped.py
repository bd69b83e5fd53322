"""Rows of one linear under different pairs: values and every gradient against torch's own operators, a slice at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import ViewError
from rankwise.forms import grouped
from rankwise.forms.fused import composite
from rankwise.forms.grouped import Group, grouped_linear
from rankwise.runtime import fast
from tests.models import batch_for, llama, move

IN, OUT = 12, 10
#: (rows, rank) of each group, and base rows after the groups: batched; unequal ranks; unequal rows; a base row; empty
CASES = {
    "alike": ([(4, 3), (4, 3), (4, 3)], 0),
    "ranks": ([(4, 1), (4, 3), (4, 2)], 0),
    "rows": ([(2, 2), (5, 2), (1, 2)], 0),
    "base rows": ([(4, 2), (4, 2)], 3),
    "no rows": ([(4, 2), (0, 2), (4, 2)], 1),
    "one": ([(6, 2)], 0),
}


def setup(case: str, dtype: torch.dtype = torch.float64, apart: float = 1.0) -> tuple[Tensor, Tensor, Tensor, list[Group]]:
    sizes, more = CASES[case]
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: (torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)
    groups: list[Group] = []
    at = 0
    for i, (n, r) in enumerate(sizes):
        groups.append((at, at + n, (draw(r, IN).requires_grad_(), draw(OUT, r).requires_grad_(), 0.5 + i * apart)))
        at += n
    return draw(at + more, IN).requires_grad_(), draw(OUT, IN), draw(OUT), groups


def naive(x: Tensor, W: Tensor, b: Tensor | None, groups: Sequence[Group]) -> Tensor:
    y = x @ W.t() if b is None else x @ W.t() + b
    for first, last, (A, B, s) in groups:
        change = s * (x[first:last] @ A.t()) @ B.t()
        y = torch.cat([y[:first], y[first:last] + change, y[last:]])
    return y


def grads(y: Tensor, x: Tensor, groups: Sequence[Group], *more: Tensor) -> list[Tensor]:
    w = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    return list(torch.autograd.grad((y * w).sum(), [x, *(t for *_, f in groups for t in f[:2]), *more]))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("apart", [0.0, 1.0], ids=["one scale", "scales"])
def test_equals_each_slice_alone(case: str, bias: bool, apart: float) -> None:
    x, W, b, groups = setup(case, apart=apart)
    b = b.requires_grad_() if bias else None  # type: ignore[assignment]
    more = [b] if bias else []
    got, want = grouped_linear(x, W, b, groups), naive(x, W, b, groups)
    assert got is not None and (got - want).abs().max() < 1e-12
    for g, h in zip(grads(got, x, groups, *more), grads(want, x, groups, *more), strict=True):
        assert g.shape == h.shape and (not g.numel() or (g - h).abs().max() < 1e-12)


@pytest.mark.parametrize("case", ["alike", "ranks"])
@pytest.mark.parametrize("apart", [0.0, 1.0], ids=["one scale", "scales"])
@pytest.mark.parametrize("weight", [torch.float32, torch.bfloat16])
def test_masters_stay_in_fp32(case: str, weight: torch.dtype, apart: float) -> None:
    x, W, b, groups = setup(case, torch.float32, apart)
    x = x.detach().to(weight).requires_grad_()
    got = grouped_linear(x, W.to(weight), b.to(weight), groups)
    want = naive(x.detach().double().requires_grad_(), W.to(weight).double(), b.to(weight).double(), _wide(groups))
    assert got is not None and got.dtype == weight
    loose = 1e-5 if weight == torch.float32 else 2e-2
    assert (got.double() - want).norm() / want.norm() < loose
    assert [g.dtype for g in grads(got, x, groups)] == [weight, *[torch.float32] * (2 * len(groups))]


def _wide(groups: Sequence[Group]) -> list[Group]:
    return [(a, b, (A.detach().double(), B.detach().double(), s)) for a, b, (A, B, s) in groups]


@pytest.mark.parametrize("case", ["alike", "ranks"])
def test_a_nan_in_one_groups_rows_stays_there(case: str) -> None:
    x, W, b, groups = setup(case)
    with torch.no_grad():
        x[5] = float("nan")  # a row of the second group
    got = grouped_linear(x, W, b, groups)
    assert got is not None
    dx, *rest = grads(got, x, groups)
    assert [bool(torch.isfinite(g).all()) for g in rest] == [True, True, False, False, True, True]  # the second pair alone
    assert bool(torch.isfinite(dx).all())
    assert [bool(torch.isfinite(got[a:b]).all()) for a, b, _ in groups] == [True, False, True]


def test_left_to_torch_where_only_that_will_do() -> None:
    x, W, b, groups = setup("alike")
    with composite():
        assert grouped_linear(x, W, b, groups) is None
    strength = torch.ones((), requires_grad=True)
    assert grouped_linear(x, W, b, [(a, e, (A, B, strength)) for a, e, (A, B, _) in groups]) is None


# --- in a model -----------------------------------------------------------------------------------------------
def mixed(model: Any, names: list[str], rows: Any) -> dict[str, Tensor]:
    """Logits and every gradient of a batch whose rows are under ``rows``."""
    batch = batch_for(model, rows=6)
    model.zero_grad()
    with rw.view(model, dict.fromkeys(names, 1.0), rows=rows):
        out = model(input_ids=batch["input_ids"]).logits
    out.square().mean().backward()
    found = {
        f"{n} {k}": p.grad.clone()
        for n, a in rw.adapters(model).items()
        for k, p in a.named_parameters().items()
        if p.grad is not None
    }
    return {"logits": out.detach(), **found}


@pytest.mark.parametrize("ranks", [(2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("rows", [["a", "a", "b", "b", "c", "c"], ["a", "b", "b", None, "c", "a"]])
def test_in_a_model_it_equals_the_reference(
    ranks: tuple[int, ...], rows: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = llama().double()
    for i, (n, r) in enumerate(zip("abc", ranks, strict=True)):
        move(
            rw.attach(model, {"r": r, "alpha": 3 + i, "targets": ["q", "v", "down"] if n == "b" else "all-linear"}, name=n), seed=i
        )
    model.double().train()
    calls: list[int] = []
    plain = grouped.grouped_linear
    monkeypatch.setattr(fast, "grouped_linear", lambda *a, **k: calls.append(1) or plain(*a, **k))
    got = mixed(model, list("abc"), rows)
    assert len(calls) == 2 * 7, "the fast path was taken at every linear"
    monkeypatch.setattr(fast, "grouped_linear", lambda *a, **k: None)
    want = mixed(model, list("abc"), rows)
    assert got.keys() == want.keys()
    for key in want:
        assert (got[key] - want[key]).abs().max() < 1e-12, key


def test_rows_that_are_no_runs_take_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama().double()
    for i, n in enumerate("ab"):
        move(rw.attach(model, {"r": 2}, name=n), seed=i)
    monkeypatch.setattr(fast, "grouped_linear", lambda *a, **k: pytest.fail("two adapters at one row, or half of one"))
    both = mixed(model, ["a", "b"], {"a": [1, 1, 1, 0, 0, 0], "b": [0, 0, 1, 1, 1, 1]})
    half = mixed(model, ["a", "b"], {"a": [1, 1, 0.5, 0, 0, 0], "b": [0, 0, 0, 1, 1, 1]})
    assert not torch.equal(both["logits"], half["logits"])


def test_no_mask_keeps_rows_from_a_weight_that_was_replaced() -> None:
    model = llama()
    rw.attach(model, {"r": 2, "init": {"name": "loftq", "codec": "nf4"}}, name="a")
    rw.attach(model, {"r": 2}, name="b")
    with pytest.raises(ViewError, match="'a' stands in the base weights"), rw.view(model, ["a", "b"], rows=["a", "b", "b"]):
        pass
    with rw.view(model, ["a", "b"], rows={"a": [1, 1, 1], "b": [0, 1, 1]}):
        assert torch.isfinite(model(**batch_for(model)).loss)
