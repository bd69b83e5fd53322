"""One suite for every delta operator: what the serving kernels must hold, against an oracle that reads the factors."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
import torch

from rankwise.errors import OptionError
from rankwise.serve.batch import BASE
from rankwise.serve.ops.base import LoraPages
from rankwise.serve.ops.build import compiler
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import DEVICE, GROUPS, OPS, Case, adapter, evaluator, gap, inputs, make_case, plan_of, rounded, run

QKV, O, MLP = GROUPS
RANKS = (1, 3, 8, 9, 64)
NO_FP64 = ("native", "triton")

no_compiler = pytest.mark.skipif(compiler() is None, reason="no C compiler builds the native operator")
every_op = pytest.mark.parametrize("name", [pytest.param(n, marks=no_compiler if n == "native" else ()) for n in OPS])
every_group = pytest.mark.parametrize("group", GROUPS, ids=lambda g: g.name)


def holds(name: str, case: Case, dtype: torch.dtype = torch.float32, bound: float = 1e-5) -> None:
    for group in GROUPS:
        x, ys = inputs(case, group, dtype)
        want = evaluator(case, group, x, ys)
        for whole in (True, False):
            assert gap(run(name, case, group, x, ys, whole=whole), want, ys) < bound, (group.name, whole)


@every_op
def test_nothing_to_do(name: str) -> None:
    """An empty step, and one of base tokens only: no output changes by a bit, no page is read."""
    for rows in ([], [BASE] * 5):
        case = make_case({0: 8}, rows)
        for group in GROUPS:
            x, ys = inputs(case, group, torch.float32)
            assert all(torch.equal(a, y) for a, y in zip(run(name, case, group, x, ys), ys, strict=True))


@every_op
@pytest.mark.parametrize("rank", RANKS)
def test_one_token_of_each_rank(name: str, rank: int) -> None:
    holds(name, make_case({4: rank}, [4]))


@every_op
def test_all_same_and_all_distinct(name: str) -> None:
    holds(name, make_case({2: 8}, [2] * 7))
    holds(name, make_case(dict.fromkeys(range(7), 8), list(range(7))))


@every_op
def test_mixed_ranks_between_base_tokens(name: str) -> None:
    """Long and short segments, a slot that comes twice, base tokens before, between and after."""
    rows = [BASE, 0, 0, 0, BASE, 1, 2, 2, *[3] * 19, BASE, 4, 0, 0, BASE]
    holds(name, make_case(dict(enumerate(RANKS)), rows))


@every_op
def test_base_tokens_keep_their_bits(name: str) -> None:
    case = make_case({0: 8, 1: 20}, [BASE, 0, BASE, BASE, 1, 1, BASE])
    x, ys = inputs(case, QKV, torch.float32)
    base = [t for t, slot in enumerate(case.rows) if slot == BASE]
    for a, y in zip(run(name, case, QKV, x, ys), ys, strict=True):
        assert torch.equal(a[base], y[base])
        assert not torch.equal(a, y)


@every_op
def test_inputs_and_outputs_that_are_slices(name: str) -> None:
    case = make_case({0: 8, 1: 9}, [0, 1, 1, BASE, 1])
    x, ys = inputs(case, QKV, torch.float32)
    want = evaluator(case, QKV, x, ys)
    wide = torch.cat([x, x + 1], 1)[:, : QKV.inp]
    crossed = x.t().contiguous().t()
    for given_x in (wide, crossed):
        assert not given_x.is_contiguous()
        joint = torch.cat(ys, 1)
        slices = list(joint.split(QKV.outs, 1))
        op = make_op(name, case.pages)
        op.begin(case.plan, case.slots)
        op.apply(QKV, given_x, slices)
        assert gap(slices, want, ys) < 1e-5
        assert gap(joint.split(QKV.outs, 1), want, ys) < 1e-5
    turned = [y.t().contiguous().t() for y in ys]
    op.apply(QKV, x, turned)
    assert gap(turned, want, ys) < 1e-5


@every_op
def test_an_adapter_adds_nothing_where_it_has_nothing(name: str) -> None:
    """Groups and modules it leaves alone, beside another that has them; and alone, where the bits must stay."""
    case = make_case({0: 9, 1: 8}, [0, 0, 1, BASE, 0], s0=("o", "k"))
    holds(name, case)
    alone = make_case({0: 9}, [0, 0, BASE], s0=("o",))
    x, ys = inputs(alone, O, torch.float32)
    assert torch.equal(run(name, alone, O, x, ys)[0], ys[0])


@every_op
def test_permutation(name: str) -> None:
    """Tokens and their slots reordered together: outputs reordered alike."""
    case = make_case({0: 8, 1: 3, 2: 9}, [0, 0, 1, 2, 2, 2, BASE, BASE])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    other = Case(case.pages, case.slots, case.adapters, [case.rows[i] for i in order])
    x, ys = inputs(case, MLP, torch.float32)
    straight = run(name, case, MLP, x, ys)
    turned = run(name, other, MLP, x[order], [y[order] for y in ys])
    assert gap(turned, [y[order].cpu().double() for y in straight], [y[order] for y in ys]) < 1e-5


@every_op
def test_linear_in_the_scale(name: str) -> None:
    """The scale is in A: doubling it doubles the change, exactly, for a power of two moves no rounding."""
    case = make_case({0: 9}, [0, 0, BASE, 0])
    x, ys = inputs(case, QKV, torch.float32)
    zeros = [torch.zeros_like(y) for y in ys]
    once = run(name, case, QKV, x, zeros)
    case.pages.write(case.slots[0], {g: [p and (2 * p[0], p[1]) for p in pairs] for g, pairs in case.adapters[0].items()})
    twice = run(name, case, QKV, x, zeros)
    assert all(torch.equal(2 * a, b) for a, b in zip(once, twice, strict=True))


@every_op
def test_moved_and_rewritten_pages(name: str) -> None:
    """An operator keeps indices by composition: other pages or other contents under one composition must show."""
    case = make_case({0: 9, 1: 8}, [0, 0, 1])
    x, ys = inputs(case, QKV, torch.float32)
    op = make_op(name, case.pages)
    free = [c for c in range(case.pages.count) if all(c not in held for held in case.slots.values())]
    for change in ("none", "moved", "rewritten", "emptied"):
        if change == "moved":
            case.slots[0] = free[:2]
            case.pages.write(case.slots[0], case.adapters[0])
        if change == "rewritten":
            case.adapters[0] = rounded(adapter(16, 77), torch.float32)
            case.pages.write(case.slots[0], case.adapters[0])
        if change == "emptied":
            case.adapters[0] = {}
            case.pages.write(case.slots[0], {})
        op.begin(case.plan, case.slots)
        out = [y.clone() for y in ys]
        op.apply(QKV, x, out)
        assert gap(out, evaluator(case, QKV, x, ys), ys) < 1e-5, change


@every_op
def test_pages_that_were_empty_and_are_filled(name: str) -> None:
    """What is skipped as zero is looked at again after a write, under the same composition and pages."""
    case = make_case({0: 8}, [0, BASE, 0])
    x, ys = inputs(case, O, torch.float32)
    op, full = make_op(name, case.pages), case.adapters[0]
    for content in ({}, full):
        case.adapters[0] = content
        case.pages.write(case.slots[0], content)
        op.begin(case.plan, case.slots)
        out = [y.clone() for y in ys]
        op.apply(O, x, out)
        assert gap(out, evaluator(case, O, x, ys), ys) < 1e-5


def test_relocation_gives_the_same_bits() -> None:
    here, there = make_case({0: 20}, [0, 0, BASE, 0]), make_case({0: 20}, [0, 0, BASE, 0])
    there.slots[0] = [c for c in range(there.pages.count) if c not in there.slots[0]][:3]
    there.pages.write(there.slots[0], there.adapters[0])
    for group in GROUPS:
        x, ys = inputs(here, group, torch.float32)
        a, b = run("reference", here, group, x, ys), run("reference", there, group, x, ys)
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


@every_op
def test_fp64(name: str) -> None:
    if name in NO_FP64:
        with pytest.raises(OptionError, match="float64"):
            make_op(name, LoraPages(GROUPS, 1, torch.float64, DEVICE))
        return
    rows = [BASE, 0, 1, 2, 2, *[3] * 17, BASE, 4, 0]
    holds(name, make_case(dict(enumerate(RANKS)), rows, torch.float64), torch.float64, 1e-10)


@every_op
def test_bf16(name: str) -> None:
    """bf16 rows over fp32 pages, and, where the operator takes them, bf16 pages."""
    rows = [0, 1, 1, *[2] * 17, BASE, 0]
    holds(name, make_case({0: 3, 1: 16, 2: 8}, rows), torch.bfloat16, 2e-2)
    if name != "native":
        holds(name, make_case({0: 3, 1: 16, 2: 8}, rows, torch.bfloat16), torch.bfloat16, 2e-2)


@every_op
@hypothesis.settings(max_examples=5 if OPS == ["triton"] else 25, deadline=None, derandomize=True)
@hypothesis.given(data=st.data())
def test_random_plans(name: str, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(1, 20), min_size=1, max_size=5))
    lengths = st.tuples(st.integers(BASE, len(ranks) - 1), st.sampled_from([1, 1, 1, 2, 5, 9, 17]))
    rows = [slot for slot, n in data.draw(st.lists(lengths, max_size=6)) for _ in range(n)]
    case = make_case(dict(enumerate(ranks)), rows, seed=data.draw(st.integers(0, 99)), s1=("o",), s2=("v", "mlp"))
    group = data.draw(st.sampled_from(GROUPS))
    x, ys = inputs(case, group, torch.float32)
    assert gap(run(name, case, group, x, ys), evaluator(case, group, x, ys), ys) < 1e-5


@every_op
def test_a_slot_without_an_adapter_is_refused(name: str) -> None:
    op = make_op(name, make_case({0: 8}, [0]).pages)
    with pytest.raises(OptionError, match="slot 3"):
        op.begin(plan_of([3]), {0: [0]})
