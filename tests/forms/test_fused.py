"""The fused LoRA product against torch's own operators: values, every gradient, and what it keeps for backward."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from rankwise.forms import fused, input_group
from rankwise.forms import packed as pk
from rankwise.forms.fused import composite, lora_linear
from rankwise.forms.input_group import InputGroup, shared_down

IN, OUT = 12, 10
TOL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}


def naive(x: Tensor, W: Tensor, b: Tensor | None, factors: Sequence[fused.Factor]) -> Tensor:
    y = x @ W.t()
    y = y if b is None else y + b
    for A, B, s in factors:
        y = y + s * ((x @ A.t()) @ B.t())
    return y


def setup(
    dtype: torch.dtype = torch.float64,
    lead: tuple[int, ...] = (2, 3),
    ranks: Sequence[int] = (3, 2),
    master: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[fused.Factor]]:
    g = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) / shape[-1] ** 0.5

    x = draw(*lead, IN).to(dtype).requires_grad_()
    W, b = draw(OUT, IN).to(dtype), draw(OUT).to(dtype)
    m = master or dtype
    factors = [(draw(r, IN).to(m).requires_grad_(), draw(OUT, r).to(m).requires_grad_(), 0.5 + i) for i, r in enumerate(ranks)]
    return x, W, b, factors


def leaves(x: Tensor, factors: Sequence[fused.Factor]) -> list[Tensor]:
    return [x, *(t for A, B, _ in factors for t in (A, B))]


def gap(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def grads(y: Tensor, wrt: Sequence[Tensor]) -> tuple[Tensor, ...]:
    w = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape).to(y.dtype)
    return torch.autograd.grad((y * w).sum(), wrt)


def same(y: Tensor, x: Tensor, W: Tensor, b: Tensor | None, factors: Sequence[fused.Factor], tol: float) -> None:
    """``y`` and its gradients equal those of the naive sum in fp64."""
    wide = [(A.detach().double().requires_grad_(), B.detach().double().requires_grad_(), s) for A, B, s in factors]
    xw = x.detach().double().requires_grad_()
    ref = naive(xw, W.double(), None if b is None else b.double(), wide)
    assert y.shape == ref.shape
    assert gap(y, ref) < tol
    for got, want, leaf in zip(grads(y, leaves(x, factors)), grads(ref, leaves(xw, wide)), leaves(x, factors)):
        assert got.dtype == leaf.dtype
        assert gap(got, want) < 2 * tol


# --- values and gradients -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", TOL)
@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (2, 1, 2, 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_naive_sum(dtype: torch.dtype, lead: tuple[int, ...], bias: bool) -> None:
    x, W, b, factors = setup(dtype, lead)
    y = lora_linear(x, W, b if bias else None, factors)
    assert y.dtype == dtype
    same(y, x, W, b if bias else None, factors, TOL[dtype])


def test_gradcheck() -> None:
    x, W, b, factors = setup()
    b.requires_grad_()
    scales = [s for *_, s in factors]

    def f(x: Tensor, b: Tensor, *ab: Tensor) -> Tensor:
        return lora_linear(x, W, b, list(zip(ab[::2], ab[1::2], scales)))

    assert torch.autograd.gradcheck(f, (x, b, *leaves(x, factors)[1:]))

    def g(x: Tensor, *A: Tensor) -> tuple[Tensor, ...]:
        return tuple(shared_down(x, A))

    assert torch.autograd.gradcheck(g, (x, *(A for A, _, _ in factors)))


def test_zero_rows_give_zero_gradients() -> None:
    x, W, b, factors = setup(torch.float32, (2, 0))
    y = lora_linear(x, W, b, factors)
    assert y.shape == (2, 0, OUT)
    for g, leaf in zip(torch.autograd.grad(y.sum(), leaves(x, factors)), leaves(x, factors)):
        assert g.shape == leaf.shape
        assert not g.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_input_and_expanded_gradient(dtype: torch.dtype) -> None:
    x, W, b, factors = setup(dtype, (4, 6))
    xt = x.detach().transpose(0, 1)[::2].requires_grad_()
    assert not xt.is_contiguous()
    same(lora_linear(xt, W, b, factors), xt, W, b, factors, TOL[dtype])
    got = torch.autograd.grad(lora_linear(xt, W, b, factors).sum(), xt)[0]  # dy is one expanded number
    want = torch.autograd.grad(naive(xt, W, b, factors).sum(), xt)[0]
    assert gap(got, want) < 2 * TOL[dtype]


def test_only_what_is_asked_for_gets_a_gradient() -> None:
    x, W, b, factors = setup()
    (A0, B0, s0), (A1, B1, s1) = factors
    start = [(A0, B0, s0), (A1.detach(), B1.detach(), -s1)]  # a frozen start beside the trained pair
    y = lora_linear(x.detach(), W, b, start)
    y.sum().backward()
    assert A0.grad is not None
    assert B0.grad is not None
    assert x.grad is None
    assert not lora_linear(x.detach(), W, b, [(A1.detach(), B1.detach(), 1.0)]).requires_grad
    y = lora_linear(x, W, b, [(A0, B0.detach(), s0)])
    dx, dA = torch.autograd.grad(y.sum(), (x, A0))
    rx, rA = torch.autograd.grad(naive(x, W, b, [(A0, B0, s0)]).sum(), (x, A0))
    assert gap(dx, rx) < 1e-12
    assert gap(dA, rA) < 1e-12


@pytest.mark.parametrize("widen", [False, True])
def test_fp32_masters_on_a_bf16_base(widen: bool) -> None:
    x, W, b, factors = setup(torch.bfloat16, master=torch.float32)
    y = lora_linear(x, W, b, factors, widen=widen)
    assert y.dtype == torch.bfloat16
    same(y, x, W, b, factors, 2e-2)


def test_widening_rounds_once() -> None:
    x, W, b, factors = setup(torch.bfloat16, (64,), master=torch.float32)
    ref = naive(x.double(), W.double(), b.double(), [(A.double(), B.double(), s) for A, B, s in factors])
    wide, narrow = (gap(lora_linear(x, W, b, factors, widen=w), ref) for w in (True, False))
    assert wide < 2.5e-3  # half a unit in the last place of bf16, at most 2⁻⁹ = 1.95e-3 a number
    assert wide <= narrow


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widen", [False, True])
def test_autocast(x_dtype: torch.dtype, widen: bool) -> None:
    x, W, b, factors = setup(torch.float32)
    x = x.detach().to(x_dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.fusable(x, W)
        y = lora_linear(x, W, b, factors, widen=widen)
        assert y.dtype == nn.functional.linear(x, W, b).dtype == torch.bfloat16
    same(y, x, W, b, factors, 2e-2)
    assert fused.fusable(x, W) == (x_dtype == torch.float32)


def test_a_strength_may_be_a_tensor() -> None:
    x, W, b, factors = setup()
    tensors = [(A, B, torch.tensor(s)) for A, B, s in factors]  # fp32, 0-d
    same(lora_linear(x, W, b, tensors), x, W, b, factors, 1e-12)
    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)  # one that is trained is differentiated too
    A, B, _ = factors[0]
    got = torch.autograd.grad(lora_linear(x, W, b, [(A, B, s)]).sum(), s)[0]
    assert gap(got, ((x @ A.t()) @ B.t()).sum()) < 1e-12


# --- what is kept, and other ways to differentiate ---------------------------------------------------------


def kept(run: object, *own: Tensor) -> int:
    """Bytes that autograd keeps for ``run()``, each storage once, without those of ``own``."""
    sizes: dict[int, int] = {}
    hold = []
    mine = {t.untyped_storage().data_ptr() for t in own}

    def pack(t: Tensor) -> Tensor:
        hold.append(t)
        s = t.untyped_storage()
        if s.data_ptr() not in mine:
            sizes[s.data_ptr()] = s.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()  # type: ignore[operator]
    del y
    return sum(sizes.values())


@pytest.mark.parametrize("widen", [False, True])
def test_keeps_x_and_the_r_wide_product_only(widen: bool) -> None:
    x, W, b, factors = setup(torch.bfloat16, (40,), master=torch.float32)
    own = [W, *(t for A, B, _ in factors for t in (A, B))]
    R = sum(A.shape[0] for A, _, _ in factors)
    size = 4 if widen else 2
    assert kept(lambda: lora_linear(x, W, b, factors, widen=widen), *own) == 40 * IN * 2 + 40 * R * size
    group = InputGroup()
    sites = [[A] for A, _, _ in factors]

    def shared() -> list[Tensor]:
        hs = [group.down(x, own_A, lambda: sites, widen=widen) for own_A in sites]
        return [lora_linear(x, W, b, [f], h=h, widen=widen) for f, h in zip(factors, hs)]

    assert kept(shared, *own) == 40 * IN * 2 + 40 * R * size  # x and h once for the whole group
    assert kept(lambda: shared_down(x, [A.detach() for A, _, _ in factors]), *own) == 0
    frozen = [(A.detach(), B.detach(), s) for A, B, s in factors]
    assert kept(lambda: lora_linear(x, W, b, frozen, widen=widen), W, *(t for A, B, _ in frozen for t in (A, B))) == 0


def test_checkpoint_recomputes_the_same() -> None:
    x, W, b, factors = setup()
    group = InputGroup()
    sites = [[A] for A, _, _ in factors]

    def block(x: Tensor) -> Tensor:
        z = x * 1.5
        return sum(lora_linear(z, W, b, [f], h=group.down(z, s, lambda: sites)) for f, s in zip(factors, sites))  # type: ignore[return-value]

    want = grads(block(x), leaves(x, factors))
    got = grads(checkpoint(block, x, use_reentrant=False), leaves(x, factors))
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_second_derivatives_need_the_composite_path() -> None:
    x, W, b, factors = setup()
    y = lora_linear(x, W, b, factors)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()
    with composite():
        y = lora_linear(x, W, b, factors)
    (dx,) = torch.autograd.grad((y**2).sum(), x, create_graph=True)
    (got,) = torch.autograd.grad(dx.sum(), factors[0][0])
    (rx,) = torch.autograd.grad((naive(x, W, b, factors) ** 2).sum(), x, create_graph=True)
    (want,) = torch.autograd.grad(rx.sum(), factors[0][0])
    assert gap(got, want) < 1e-12


def test_torch_func_and_forward_mode() -> None:
    x, W, b, factors = setup()
    f = [(A.detach(), B.detach(), s) for A, B, s in factors]
    v = torch.ones_like(x)
    _, dy = torch.func.jvp(lambda x: lora_linear(x, W, b, f), (x.detach(),), (v,))
    assert gap(dy, naive(v, W, None, f)) < 1e-12
    with forward_ad.dual_level():
        y = lora_linear(forward_ad.make_dual(x.detach(), v), W, b, factors)
        assert gap(forward_ad.unpack_dual(y).tangent, naive(v, W, None, f)) < 1e-12
    per_row = torch.func.vmap(torch.func.grad(lambda r: lora_linear(r, W, b, f).sum()))(x.detach().reshape(-1, IN))
    assert gap(per_row, torch.autograd.grad(naive(x, W, b, f).sum(), x)[0].reshape(-1, IN)) < 1e-12


def test_compiles_in_one_graph() -> None:
    x, W, b, factors = setup(torch.float32)
    group = InputGroup()
    count = 0

    def backend(gm: torch.fx.GraphModule, _: object) -> object:
        nonlocal count
        count += 1
        return gm.forward

    def f(x: Tensor, s: Tensor) -> Tensor:
        (A, B, _), _ = factors
        return lora_linear(x, W, b, [(A, B, s)], h=group.down(x, [A], lambda: [[A]]))

    compiled = torch.compile(f, backend=backend, fullgraph=True)
    for s in (0.5, 0.25):  # a new strength is the same graph
        y = compiled(x, torch.tensor(s))
        same(y, x, W, b, [(*factors[0][:2], s)], 1e-5)
    assert count == 1


# --- sites that one tensor feeds -----------------------------------------------------------------------------


class Counted:
    """Counts the down-projections made."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.widths: list[int] = []
        real = input_group._down

        def down(compute: torch.dtype, x: Tensor, A: Sequence[Tensor]) -> tuple[Tensor, ...]:
            self.widths.append(sum(a.shape[0] for a in A))
            return real(compute, x, A)

        monkeypatch.setattr(input_group, "_down", down)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return Counted(monkeypatch).widths


def three(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[Tensor], InputGroup]:
    x, _, _, factors = setup(dtype, ranks=(3, 2, 4))
    return x, [A for A, _, _ in factors], InputGroup()


def test_one_product_for_the_group(made: list[int]) -> None:
    x, As, group = three()
    hs = [group.down(x, [A], lambda: [[a] for a in As])[0] for A in As]
    assert made == [9]
    assert getattr(group._local, "entry", None) is None  # the last taker frees it
    for h, A in zip(hs, As):
        assert gap(h, x @ A.t()) < 1e-12
    got = grads(torch.cat(hs, -1), (x, *As))
    want = grads(torch.cat([x @ A.t() for A in As], -1), (x, *As))
    assert all(gap(a, b) < 1e-12 for a, b in zip(got, want))


def test_a_sibling_never_called_or_called_twice(made: list[int]) -> None:
    x, As, group = three()

    def take(i: int) -> Tensor:
        return group.down(x, [As[i]], lambda: [[a] for a in As])[0]

    first, again = take(0), take(0)
    assert made == [9, 3]
    assert gap(first, again) < 1e-12  # to rounding: the widths differ
    late = take(2)
    assert made == [9, 3]  # the second call of one did not cost the others theirs
    dA = torch.autograd.grad((late * 2).sum(), As, allow_unused=True)
    assert dA[0] is None or not dA[0].any()
    assert gap(dA[2], torch.autograd.grad((x @ As[2].t() * 2).sum(), As[2])[0]) < 1e-12


def test_never_the_h_of_another_input(made: list[int]) -> None:
    x, As, group = three(torch.float32)
    x = x.detach()

    def take(i: int, t: Tensor) -> Tensor:
        return group.down(t, [As[i]], lambda: [[a] for a in As])[0]

    take(0, x)
    other = x.clone()
    assert gap(take(1, other + 1), (other + 1) @ As[1].t()) < 1e-5
    take(0, x)
    x.add_(1)  # the same tensor, other values
    assert gap(take(1, x), x @ As[1].t()) < 1e-5
    take(0, x)
    with torch.no_grad():
        As[2].mul_(3)  # an optimiser's step between two siblings
    assert gap(take(2, x), x @ As[2].t()) < 1e-5
    take(0, x)
    with torch.no_grad():
        assert not take(1, x).requires_grad
    with torch.autocast("cpu", torch.bfloat16):
        assert take(1, x).dtype == torch.bfloat16


def test_a_sibling_called_after_backward(made: list[int]) -> None:
    x, As, group = three()
    for A in As:  # the same x, one site at a time: the shared graph is spent by the first backward
        h = group.down(x, [A], lambda: [[a] for a in As])[0]
        got = torch.autograd.grad(h.sum(), A)[0]
        assert gap(got, torch.autograd.grad((x @ A.t()).sum(), A)[0]) < 1e-12
    assert made == [9, 2, 9]


def test_freed_with_x_and_one_cache_a_thread(made: list[int]) -> None:
    x, As, group = three(torch.float32)
    As = [A.detach() for A in As]
    z = x.detach() * 2
    h = group.down(z, [As[0]], lambda: [[a] for a in As])
    entry = group._local.entry
    assert len(entry.left) == 2
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(getattr(group._local, "entry", None) is None))
    thread.start()
    thread.join()
    assert seen == [True]
    del z, h
    gc.collect()
    assert not entry.left
    assert isinstance(copy.deepcopy(group), InputGroup)
    assert isinstance(pickle.loads(pickle.dumps(group)), InputGroup)


# --- how the frozen product runs -----------------------------------------------------------------------------

packs = pytest.mark.skipif(not pk.packable(torch.zeros(2, 2)), reason="this torch has no packed oneDNN products")


@packs
@pytest.mark.parametrize("rows", [0, 1, 7, 64, 129])
def test_packed_equals_plain(rows: int) -> None:
    x, W, b, factors = setup(torch.float32, (rows,))
    p = pk.PackedWeight(W, rows=64)
    y = lora_linear(x, W, b, factors, packed=p)
    if rows:
        same(y, x, W, b, factors, 1e-5)
        assert p.nbytes() == 2 * 4 * W.numel()
        p.release(backward_only=True)
        assert p.nbytes() == 4 * W.numel()
        got = torch.autograd.grad(lora_linear(x, W, b, factors, packed=p).sum(), x)[0]  # dy is one expanded number
        assert gap(got, torch.autograd.grad(naive(x, W, b, factors).sum(), x)[0]) < 1e-5
    else:
        assert y.shape == (0, OUT)


@packs
def test_a_changed_weight_is_not_answered_from_its_old_copy() -> None:
    x, W, b, factors = setup(torch.float32, (5,))
    p = pk.PackedWeight(W)
    lora_linear(x, W, b, factors, packed=p)
    other = torch.randn_like(W)
    same(lora_linear(x, other, b, factors, packed=p), x, other, b, factors, 1e-5)
    assert p.holds(W)
    assert not p.holds(W[:5])  # the same memory, another tensor
    W.mul_(2)
    assert not p.holds(W)
    same(lora_linear(x, W, b, factors, packed=p), x, W, b, factors, 1e-5)
    p.release()
    assert p.holds(W)
    same(lora_linear(x, W, b, factors, packed=p), x, W, b, factors, 1e-5)
    assert copy.deepcopy({"p": p}) == pickle.loads(pickle.dumps({"p": p})) == {"p": None}


@packs
def test_inference_never_packs_the_transpose() -> None:
    x, W, b, factors = setup(torch.float32, (5,))
    p = pk.PackedWeight(W)
    with torch.no_grad():
        lora_linear(x, W, b, factors, packed=p)
    assert p.nbytes() == 4 * W.numel()


def test_wide_weights_go_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b, factors = setup(torch.bfloat16, (6,), master=torch.float32)
    whole = lora_linear(x, W, b, factors, widen=True)
    monkeypatch.setattr(pk, "WIDEN_BLOCK", 3 * IN)
    blocks = lora_linear(x, W, b, factors, widen=True)
    assert gap(blocks, whole) < 1e-2
    same(blocks, x, W, b, factors, 2e-2)


def test_probe_decides_by_time_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pk, "_choices", {})
    monkeypatch.setattr(pk, "SMALL", 1)
    calls = []

    def ratio(value: float) -> None:
        monkeypatch.setattr(pk, "_ratio", lambda *_: calls.append(1) or value)
        pk._choices.clear()

    W = torch.zeros(32, 16, dtype=torch.bfloat16)
    ratio(0.5)
    product = pk.Product()
    assert product.how(W, W.dtype, 100, True) == (None, True)
    assert product.how(W, W.dtype, 90, True) == (None, True)
    assert len(calls) == 1  # the same class is not timed twice
    assert "widen takes 0.50" in next(iter(product.choices.values())).why
    ratio(0.95)
    assert pk.Product().how(W, W.dtype, 100, True) == (None, False)
    if pk.packable(W.float()):
        W = W.float()
        ratio(0.6)
        product = pk.Product()
        p, widen = product.how(W, W.dtype, 100, True)
        assert p is not None
        assert not widen
        assert product.how(W, W.dtype, 100, True)[0] is p
        W.add_(1)
        assert product.how(W, W.dtype, 100, True)[0] is not p
        product.release()
        assert product.nbytes() == 0
        ratio(0.95)
        assert pk.Product().how(W, W.dtype, 100, True) == (None, False)
    ratio(0.5)
    assert pk.choose(nn.Parameter(torch.zeros(8, 8)), torch.float32).kind == pk.PLAIN  # trained: it would change


def test_probe_times_the_real_thing() -> None:
    choice = pk.probe(64, 64, torch.float32, 16)
    assert choice.kind in (pk.PLAIN, pk.PACKED)
    assert choice is pk.probe(200, 100, torch.float32, 10)  # one size class
    assert choice.why
