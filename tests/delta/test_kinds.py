"""Every kind of change against its dense form: apply, add, scale, lower, store, compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rankwise.delta import (
    KINDS,
    LINEAR,
    AdapterState,
    BlockAffine,
    Columns,
    Conv,
    Delta,
    Dense,
    Embedding,
    Entries,
    Gated,
    Hadamard,
    Kron,
    LowRank,
    Replace,
    Rows,
    Scale,
    Sum,
    Tile,
    rebuild,
)  # fmt: skip
from rankwise.errors import MergeError, OptionError

OUT, IN = 12, 8
D = torch.float64


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=D)


def samples() -> dict[str, Delta]:
    low = LowRank(rand(3, IN), rand(OUT, 3), 0.7)
    return {
        "lowrank": low,
        "lowrank, diagonal core": LowRank(rand(3, IN), rand(OUT, 3), 0.5, core=rand(3)),
        "lowrank, dense core": LowRank(rand(3, IN), rand(OUT, 3), 2.0, core=rand(3, 3)),
        "columns": Columns(torch.tensor([5, 1, 2]), rand(OUT, 3), IN),
        "rows": Rows(torch.tensor([0, 7]), rand(2, IN), OUT),
        "entries": Entries(torch.tensor([3, 50, 90]), rand(3), (OUT, IN)),
        "kron": Kron(rand(3, 2), rand(4, 4), 0.3),
        "hadamard": Hadamard(LowRank(rand(2, IN), rand(OUT, 2)), LowRank(rand(3, IN), rand(OUT, 3))),
        "tile": Tile(rand(3, OUT), IN),
        "dense": Dense(rand(OUT, IN)),
        "sum": Sum((low, Columns(torch.tensor([4]), rand(OUT, 1), IN))),
        "scale": Scale(rand(OUT), other=IN),
        "scale in": Scale(rand(IN), axis="in", other=OUT),
        "block_affine": BlockAffine(rand(3, 4, 4), IN),
        "replace": Replace(rand(OUT, IN)),
        "dora-like": Sum((Scale(rand(OUT), other=IN), low)),
    }


NAMES = list(samples())
WEIGHT = torch.randn(OUT, IN, dtype=D, generator=torch.Generator().manual_seed(1))


def dense(d: Delta) -> Tensor:
    return d.dense(WEIGHT) if d.needs_weight else d.dense()


def test_every_kind_is_sampled() -> None:
    assert {d.kind for d in samples().values()} | {"gated"} == set(KINDS)


@pytest.mark.parametrize("name", NAMES)
def test_apply_is_the_dense_product(name: str) -> None:
    d, x = samples()[name], rand(4, 5, IN)
    y = x @ WEIGHT.T
    assert d.shape == (OUT, IN)
    assert torch.allclose(d.apply(x, y, weight=WEIGHT), x @ dense(d).T, atol=1e-10)
    assert torch.allclose(d.apply(x, None, weight=WEIGHT), x @ dense(d).T, atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_scaled_negated_and_added(name: str) -> None:
    d, other = samples()[name], LowRank(rand(2, IN), rand(OUT, 2))
    assert torch.allclose(dense(d.scaled(0.3)), 0.3 * dense(d), atol=1e-12)
    assert torch.allclose(dense(d.scaled(torch.tensor(0.3, dtype=D))), 0.3 * dense(d), atol=1e-7)
    assert torch.allclose(dense(d + other), dense(d) + other.dense(), atol=1e-10)
    assert torch.allclose(dense(d - d), torch.zeros(OUT, IN, dtype=D), atol=1e-10)


@pytest.mark.parametrize("name", NAMES)
def test_lowering_reports_its_true_error(name: str) -> None:
    d = samples()[name]
    W = dense(d)
    if d.exact_rank is not None:
        low, error = d.to_lowrank()
        assert error == 0.0 and torch.allclose(low.dense(), W, atol=1e-10)
        assert int(torch.linalg.matrix_rank(W)) <= d.exact_rank
    else:
        with pytest.raises(OptionError, match="no exact low-rank"):
            d.to_lowrank(weight=WEIGHT)
    S = torch.linalg.svdvals(W)
    low, error = d.to_lowrank(rank=2, weight=WEIGHT)
    assert error == pytest.approx((S[2:].norm() / S.norm()).item(), abs=1e-8)
    assert (low.dense() - W).norm() / W.norm() == pytest.approx(error, abs=1e-8)
    low, error = d.to_lowrank(energy=0.9, weight=WEIGHT)
    assert error**2 <= 0.1 + 1e-12
    assert low.A.shape[0] == int((S.square().cumsum(0) < 0.9 * S.square().sum()).sum()) + 1


@pytest.mark.parametrize("name", NAMES)
def test_stored_and_rebuilt(name: str) -> None:
    d = samples()[name]
    assert torch.equal(dense(rebuild(d.kind, d.tensors(), d.meta())), dense(d))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_apply_are_those_of_the_dense_form(name: str) -> None:
    def grads(via: str) -> list[Tensor]:
        torch.manual_seed(0)
        d = samples()[name]
        d = d.map(lambda t: t.clone().requires_grad_(True))
        leaves = [t for n, t in d.tensors().items() if t.is_floating_point()]
        x = rand(5, IN).requires_grad_(True)
        y = d.apply(x, x @ WEIGHT.T, weight=WEIGHT) if via == "apply" else x @ dense(d).T
        return list(torch.autograd.grad((y * torch.arange(y.numel(), dtype=D).view_as(y)).sum(), [x, *leaves]))

    for a, b in zip(grads("apply"), grads("dense"), strict=True):
        assert torch.allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("name", [n for n in NAMES if not samples()[n].needs_weight])
def test_inner_norm_and_cosine(name: str) -> None:
    a, b = samples()[name], LowRank(rand(2, IN), rand(OUT, 2), 0.4)
    W, V = a.dense(), b.dense()
    assert a.inner(b) == pytest.approx((W * V).sum().item(), abs=1e-9)
    assert a.norm() == pytest.approx(W.norm().item(), abs=1e-9)
    assert a.cos(b) == pytest.approx(((W * V).sum() / W.norm() / V.norm()).item(), abs=1e-9)


def test_add_into_sums_wide_and_casts_once() -> None:
    low = LowRank(torch.randn(2, IN), torch.randn(OUT, 2))
    W = torch.randn(OUT, IN).bfloat16()
    before = W.clone()
    assert torch.equal(low.add_into(W), (W.float() + low.dense()).bfloat16())
    assert torch.equal(W, before)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "options", [{}, {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}, {"padding": (1, 1), "padding_mode": "circular"}]
)
def test_convolutions(options: dict[str, Any], groups: int) -> None:
    conv = torch.nn.Conv2d(4, 6, (3, 2), groups=groups, dtype=D, **options)
    op = Conv(conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups, conv.padding_mode, 2)
    x, inp = rand(2, 4, 7, 6), 4 // groups * 6
    for d in (LowRank(rand(3, inp), rand(6, 3), 0.5), Columns(torch.tensor([0, 5]), rand(6, 2), inp), Dense(rand(6, inp))):
        moved = torch.nn.Conv2d(4, 6, (3, 2), groups=groups, dtype=D, **options)
        with torch.no_grad():
            moved.weight.copy_(conv.weight + d.dense().view_as(conv.weight))
            moved.bias.copy_(conv.bias)
        assert torch.allclose(d.apply(x, op=op), moved(x) - conv(x), atol=1e-10)


def test_embedding_looks_up_columns() -> None:
    d, ids = LowRank(rand(2, 10), rand(OUT, 2), 0.5), torch.tensor([[1, 9], [0, 3]])
    assert torch.allclose(d.apply(ids, op=Embedding()), F.embedding(ids, d.dense().T), atol=1e-12)


def test_stacks_are_one_value() -> None:
    A, B = rand(3, 2, IN), rand(3, OUT, 2)
    d = LowRank(A, B, 0.5)
    assert torch.allclose(d.dense(), torch.stack([0.5 * B[e] @ A[e] for e in range(3)]))
    low, error = d.to_lowrank(rank=1)
    assert low.A.shape == (3, 1, IN)
    assert error == pytest.approx(((low.dense() - d.dense()).norm() / d.dense().norm()).item(), abs=1e-9)


def test_canonical_is_idempotent_and_blind_to_the_gauge() -> None:
    d = LowRank(rand(3, IN), rand(OUT, 3), 0.7)
    G = rand(3, 3)
    other = LowRank(G @ d.A, d.B @ torch.linalg.inv(G), 0.7)
    a, b = d.canonical(), other.canonical()
    assert torch.allclose(a.A, b.A, atol=1e-7) and torch.allclose(a.B, b.B, atol=1e-7)
    assert torch.allclose(a.canonical().A, a.A, atol=1e-9)
    assert torch.allclose(a.A @ a.A.T, a.B.T @ a.B, atol=1e-9), "√S is not on both sides"


def test_gated_needs_a_constant_decision_to_be_a_weight() -> None:
    class Decision:
        constant = True

        def gate(self) -> Tensor:
            return torch.tensor([1.0, 0.0, 2.0], dtype=D)

    low = LowRank(rand(3, IN), rand(OUT, 3))
    with pytest.raises(MergeError, match="collapse"):
        Gated(low).dense()
    d = Gated(low, Decision())
    want = low.B @ torch.diag(Decision().gate()) @ low.A
    assert torch.allclose(d.dense(), want) and torch.allclose(d.apply(rand(4, IN) * 0 + 1), torch.ones(4, IN, dtype=D) @ want.T)
    z = rand(100, 3)
    low_c, _ = Gated(low).collapse(z.T @ z, (z * Decision().gate()).T @ z)
    assert torch.allclose(low_c.dense(), want, atol=1e-8), "a constant gate collapses exactly"


def test_states_add_flatten_and_lower() -> None:
    a = AdapterState({"x": LowRank(rand(2, IN), rand(OUT, 2)), "w": Dense(rand(OUT, IN))})
    b = AdapterState({"x": LowRank(rand(1, IN), rand(OUT, 1))})
    total = a + b
    assert torch.allclose(total.sites["x"].dense(), a.sites["x"].dense() + b.sites["x"].dense())
    assert torch.allclose(a.unflatten(a.flatten()).sites["x"].dense().double(), a.sites["x"].dense(), atol=1e-6)
    low, errors = a.truncate(rank=2)
    assert errors["x"] < 1e-12 < errors["w"] and low.sites["w"].exact_rank == 2
    assert a.cos(a) == pytest.approx(1.0)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LowRank(rand(3, IN), rand(OUT, 2)),
        lambda: Columns(torch.tensor([1]), rand(OUT, 2), IN),
        lambda: samples()["dense"] + Dense(rand(3, 3)),
    ],
)
def test_wrong_shapes_are_refused_in_a_sentence(make: Any) -> None:
    with pytest.raises(OptionError, match=r"\."):
        make()


def test_lowrank_never_forms_the_matrix() -> None:
    """2¹⁶ × 2¹⁶ would be 16 GiB in fp32: apply, +, inner, truncate and norm stay in r-wide products."""
    n = 1 << 16
    d = LowRank(torch.randn(2, n), torch.randn(n, 2))
    both = d + d.scaled(-0.5)
    assert both.truncate(rank=2)[1] < 1e-6
    assert both.cos(d) == pytest.approx(1.0, abs=1e-6)
    assert d.apply(torch.randn(3, n), op=LINEAR).shape == (3, n)
