"""Properties of every kind on drawn shapes, values and geometries (fp64): apply is the dense product, whatever the place."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rankwise.delta import (
    KINDS,
    LINEAR,
    BlockAffine,
    Columns,
    ConstantGate,
    Conv,
    Delta,
    Dense,
    Embedding,
    Entries,
    Gated,
    Geometry,
    Hadamard,
    Kron,
    LowRank,
    Replace,
    Rows,
    Scale,
    Sum,
    Tile,
    rebuild,
)

F64 = torch.float64
quick = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10_000)


class Draw:
    """Numbers from one seed; ``lead`` are the stack's axes."""

    def __init__(self, seed: int, out: int, inp: int, lead: tuple[int, ...] = ()) -> None:
        self.gen = torch.Generator().manual_seed(seed)
        self.out, self.inp, self.lead = out, inp, lead

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*self.lead, *shape, generator=self.gen, dtype=F64)

    def some(self, n: int, k: int) -> Tensor:
        return torch.randperm(n, generator=self.gen)[:k]

    def pair(self, r: int = 2) -> LowRank:
        return LowRank(self(r, self.inp), self(self.out, r), 0.7)


def entries(d: Draw) -> Entries:
    shape = (*d.lead, d.out, d.inp)
    index = d.some(torch.Size(shape).numel(), 5)
    return Entries(index, torch.randn(len(index), generator=d.gen, dtype=F64), shape)


def columns(d: Draw, k: int = 2) -> Columns:
    return Columns(d.some(d.inp, k), d(d.out, k), d.inp)


# out and inp are even, so that blocks of 2×2 fit
MAKE: dict[str, Callable[[Draw], Delta]] = {
    "lowrank": lambda d: d.pair(),
    "lowrank, diagonal core": lambda d: LowRank(d(3, d.inp), d(d.out, 3), -0.5, core=d(3)),
    "lowrank, full core": lambda d: LowRank(d(3, d.inp), d(d.out, 3), 2.0, core=d(3, 3)),
    "columns": columns,
    "rows": lambda d: Rows(d.some(d.out, 2), d(2, d.inp), d.out),
    "entries": entries,
    "kron": lambda d: Kron(d(d.out // 2, 2), d(2, d.inp // 2), 0.3),
    "hadamard": lambda d: Hadamard(d.pair(1), LowRank(d(2, d.inp), d(d.out, 2), core=d(2))),
    "tile": lambda d: Tile(d(3, d.out), d.inp),
    "dense": lambda d: Dense(d(d.out, d.inp)),
    "scale": lambda d: Scale(d(d.out), other=d.inp),
    "scale in": lambda d: Scale(d(d.inp), axis="in", other=d.out),
    "block_affine": lambda d: BlockAffine(d(d.out // 2, 2, 2), d.inp),
    "replace": lambda d: Replace(d(d.out, d.inp)),
    "sum": lambda d: Sum((d.pair(), columns(d))),
    "dora-like": lambda d: Sum((Scale(d(d.out), other=d.inp), d.pair())),
    "gated": lambda d: Gated(LowRank(d(3, d.inp), d(d.out, 3), 0.7), ConstantGate(d(3))),
}
NAMES = list(MAKE)
each = pytest.mark.parametrize("name", NAMES)

CONVS: dict[str, tuple[int, dict[str, Any]]] = {
    "1d": (1, {"kernel_size": 3, "stride": 2, "padding": 1}),
    "1d grouped": (1, {"kernel_size": 2, "dilation": 2, "groups": 2}),
    "2d": (2, {"kernel_size": (3, 2), "stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}),
    "2d grouped": (2, {"kernel_size": (1, 3), "padding": (0, 1), "groups": 2}),
    "2d reflected": (2, {"kernel_size": (3, 3), "padding": (1, 2), "padding_mode": "reflect"}),
    "2d same": (2, {"kernel_size": (2, 3), "padding": "same", "padding_mode": "circular"}),
    "2d same, zeros": (2, {"kernel_size": (3, 3), "padding": "same", "dilation": 2}),
}


def test_every_kind_is_drawn() -> None:
    assert {make(Draw(0, 6, 8)).kind for make in MAKE.values()} == set(KINDS)


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-10, rtol=1e-10)


def dense(d: Delta, W: Tensor) -> Tensor:
    return d.dense(W if d.needs_weight else None)


def gradients(d: Delta, x: Tensor, run: Callable[[Delta, Tensor], Tensor]) -> list[Tensor]:
    """Of a fixed weighting of ``run``'s result, with regard to x (where it has a gradient) and every tensor of the value."""
    live = d.map(lambda t: t.detach().clone().requires_grad_(True))
    leaves = [t for t in live.tensors().values() if t.requires_grad]
    if x.is_floating_point():
        x = x.detach().clone().requires_grad_(True)
        leaves.append(x)
    y = run(live, x)
    g = torch.linspace(-1, 2, y.numel(), dtype=F64).view_as(y)
    return list(torch.autograd.grad((y * g).sum(), leaves))


def check_acts_as_dense(d: Delta, x: Tensor, op: Geometry, W: Tensor) -> None:
    weight = W if d.needs_weight else None
    want = op.linear(x, dense(d, W))
    for y in (None, op.linear(x, W)):
        assert close(d.apply(x, y, op=op, weight=weight), want)
    fast = gradients(d, x, lambda v, z: v.apply(z, op.linear(z, W), op=op, weight=weight))
    slow = gradients(d, x, lambda v, z: op.linear(z, dense(v, W)))
    assert all(close(a, b) for a, b in zip(fast, slow, strict=True))


@each
@quick
@given(seed=seeds, half_out=st.integers(2, 5), half_in=st.integers(2, 6), rows=st.sampled_from([(3,), (2, 3), (0,)]))
def test_apply_and_its_gradients_are_those_of_the_dense_weight(
    name: str, seed: int, half_out: int, half_in: int, rows: tuple[int, ...]
) -> None:
    draw = Draw(seed, 2 * half_out, 2 * half_in)
    d, W = MAKE[name](draw), draw(draw.out, draw.inp)
    assert d.shape == W.shape
    check_acts_as_dense(d, draw(*rows, draw.inp), LINEAR, W)


@each
@pytest.mark.parametrize("where", CONVS)
def test_convolutions(name: str, where: str) -> None:
    nd, options = CONVS[where]
    groups = options.get("groups", 1)
    conv = (torch.nn.Conv1d, torch.nn.Conv2d)[nd - 1](4, 6, dtype=F64, **options)
    op = Conv(conv.kernel_size, conv.stride, conv.padding, conv.dilation, groups, conv.padding_mode, nd)
    draw = Draw(7, 6, conv.weight[0].numel())
    if draw.inp % 2:
        pytest.skip("blocks of two do not divide an odd kernel")
    W, x = conv.weight.detach().reshape(6, -1), draw(2, 4, *(7, 6)[:nd])
    d = MAKE[name](draw)
    check_acts_as_dense(d, x, op, W)
    conv.weight.data = (W + dense(d, W)).view_as(conv.weight)  # and the geometry is the module's own
    stripped = op.strip_bias(conv(x), conv.bias)
    assert close(op.linear(x, W) + d.apply(x, op.linear(x, W), op=op, weight=W), stripped)
    assert close(op.add_bias(stripped, conv.bias), conv(x))


@each
def test_embeddings(name: str) -> None:
    draw = Draw(3, 6, 10)
    check_acts_as_dense(MAKE[name](draw), torch.tensor([[1, 9], [0, 1]]), Embedding(), draw(6, 10))


@each
def test_a_stack_is_its_members(name: str) -> None:
    draw = Draw(11, 6, 8, lead=(3,))
    d, W, x = MAKE[name](draw), draw(6, 8), draw(5, 8)
    whole = dense(d, W)
    assert d.shape == whole.shape == (3, 6, 8)
    got = d.apply(x, x @ W.mT, weight=W if d.needs_weight else None)
    assert close(got, torch.stack([x[e] @ whole[e].T for e in range(3)]))
    if d.exact_rank is not None:
        assert close(d.to_lowrank()[0].dense(), whole)
    low, error = d.to_lowrank(rank=1, weight=W)
    assert low.A.shape == (3, 1, 8)
    best = torch.linalg.svdvals(whole)[:, 1:].square().sum().sqrt() / whole.norm()
    assert error == pytest.approx(best.item(), abs=1e-10)
    assert error == pytest.approx(((low.dense() - whole).norm() / whole.norm()).item(), abs=1e-10)


@each
@quick
@given(seed=seeds, c=st.floats(-3, 3, allow_subnormal=False))
def test_the_values_form_a_vector_space(name: str, seed: int, c: float) -> None:
    draw = Draw(seed, 6, 8)
    d, W = MAKE[name](draw), draw(6, 8)
    for other in [d, *(make(draw) for make in MAKE.values())]:
        assert close(dense(d + other, W), dense(d, W) + dense(other, W))
        assert close(dense(d - other, W), dense(d, W) - dense(other, W))
    for factor in (c, torch.tensor(c, dtype=F64)):
        assert close(dense(d.scaled(factor), W), c * dense(d, W))
    assert close(dense(-d, W), -dense(d, W))


@each
@quick
@given(seed=seeds, rank=st.integers(1, 6), energy=st.floats(0.05, 1.0))
def test_lowering_is_the_best_and_tells_its_error(name: str, seed: int, rank: int, energy: float) -> None:
    draw = Draw(seed, 6, 8)
    d, W = MAKE[name](draw), draw(6, 8)
    whole = dense(d, W)
    S = torch.linalg.svdvals(whole)
    if d.exact_rank is not None:
        low, error = d.to_lowrank()
        assert error == 0.0 and low.r == d.exact_rank and close(low.dense(), whole)
    low, error = d.to_lowrank(rank=rank, weight=W)
    assert error == pytest.approx((S[rank:].norm() / S.norm()).item(), abs=1e-9)
    assert error == pytest.approx(((low.dense() - whole).norm() / S.norm()).item(), abs=1e-9)
    low, error = d.to_lowrank(energy=energy, weight=W)
    assert error**2 <= 1 - energy + 1e-9
    assert low.r == 1 or S[: low.r - 1].square().sum() < energy * S.square().sum(), "a smaller rank would have done"


@each
@quick
@given(seed=seeds)
def test_inner_products_norms_and_cosines(name: str, seed: int) -> None:
    draw = Draw(seed, 6, 8)
    d, W = MAKE[name](draw), draw(6, 8)
    a = dense(d, W)
    assert d.norm(W).item() == pytest.approx(a.norm().item(), abs=1e-9)
    for other in [d, *(make(draw) for make in MAKE.values())]:
        b = dense(other, W)
        assert d.inner(other, W).dtype == F64
        assert d.inner(other, W).item() == pytest.approx((a * b).sum().item(), abs=1e-9)
        assert d.cos(other, W).item() == pytest.approx(((a * b).sum() / a.norm() / b.norm()).item(), abs=1e-9)


@each
def test_stored_moved_and_counted(name: str) -> None:
    draw = Draw(2, 6, 8)
    W = draw(6, 8)
    for d in (MAKE[name](draw), MAKE[name](draw).scaled(torch.tensor(0.5, dtype=F64))):
        meta = json.loads(json.dumps(d.meta()))
        assert torch.equal(dense(rebuild(d.kind, d.tensors(), meta), W), dense(d, W))
        numbers = [t.numel() for t in d.tensors().values() if t.is_floating_point()]
        places = [t.numel() for t in d.tensors().values() if not t.is_floating_point()]
        assert (d.numel(), d.numel(indices=True)) == (sum(numbers), sum(places))
    assert d.to(torch.float32).dtype == torch.float32 and d.dtype == F64 and d.device.type == "cpu"
    live = d.map(lambda t: t.clone().requires_grad_(True))
    assert live.clone().dense(W).requires_grad and not live.detach().dense(W).requires_grad


@each
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
def test_add_into_rounds_once(name: str, dtype: torch.dtype) -> None:
    """Factors and weight of 16 bits: the sum is the one of wide arithmetic, rounded at the end."""
    draw = Draw(5, 6, 8)
    W = draw(6, 8).to(dtype)
    low = torch.bfloat16 if dtype == torch.bfloat16 else dtype
    d, before = MAKE[name](draw).to(low), W.clone()
    wide = F64 if dtype == F64 else torch.float32
    want = W.to(wide) + dense(d.to(wide), W.to(wide))
    got = d.add_into(W)
    assert got.dtype == dtype and torch.equal(W, before)
    assert torch.equal(got, want.to(dtype)) or torch.allclose(got.to(wide), want, atol=1e-6 if wide != F64 else 1e-14)


def test_the_pair_is_used_where_it_is_cheaper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kinds with factors act without the matrix: dense() is out of reach."""
    draw = Draw(0, 60, 80)
    x, values = draw(3, 80), {n: MAKE[n](draw) for n in ("lowrank", "columns", "rows", "kron", "hadamard", "tile", "sum", "gated")}
    want = {n: F.linear(x, d.dense()) for n, d in values.items()}

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("an out×in matrix was formed")

    for kind in KINDS.values():
        monkeypatch.setattr(kind, "dense", refuse)
    for n, d in values.items():
        assert close(d.apply(x), want[n])
        for other in values.values():
            d.cos(other)
    sparse = entries(draw)
    assert all(torch.isfinite(sparse.inner(d)) and torch.isfinite(d.inner(sparse)) for d in values.values())
    sparse.norm()
