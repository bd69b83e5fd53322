"""Groups, adapters and plans to hold the operators to, and the oracle: each token on its own, in fp64, from the factors."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankwise.serve.batch import BASE, Segment, TokenPlan
from rankwise.serve.ops.base import WIDTH, Group, LoraPages
from rankwise.serve.ops.registry import make_op

#: set by test_triton.py, which runs this very suite under the interpreter, or on a device where there is one
OPS = os.environ.get("RANKWISE_TEST_OPS", "reference,bags,grouped,cat,native,auto").split(",")
DEVICE = os.environ.get("RANKWISE_TEST_DEVICE", "cpu")

#: one, two and three modules; outputs that a chunk divides and one that it does not
GROUPS = (
    Group("qkv", ("q", "k", "v"), 40, (64, 128, 64)),
    Group("o", ("o",), 33, (40,)),
    Group("mlp", ("gate", "up"), 24, (100, 80)),
)

#: group → per module (A, B) or None
Adapter = Mapping[str, Sequence[tuple[Tensor, Tensor] | None]]


@dataclasses.dataclass
class Case:
    """Adapters in pages, a plan that uses them, and inputs: what one step needs."""

    pages: LoraPages
    slots: dict[int, list[int]]
    adapters: dict[int, Adapter]
    rows: list[int]

    @property
    def plan(self) -> TokenPlan:
        return plan_of(self.rows)


def adapter(rank: int, seed: int = 0, leave: Sequence[str] = (), groups: Sequence[Group] = GROUPS) -> Adapter:
    """A random adapter; ``leave`` names groups and modules it has nothing at."""
    g = torch.Generator().manual_seed(seed)

    def pair(group: Group, module: str, out: int) -> tuple[Tensor, Tensor] | None:
        A = torch.randn(rank, group.inp, generator=g, dtype=torch.float64)
        B = torch.randn(out, rank, generator=g, dtype=torch.float64)
        return None if module in leave else (A, B)

    return {
        group.name: [pair(group, m, out) for m, out in zip(group.modules, group.outs, strict=True)]
        for group in groups
        if group.name not in leave
    }


def make_case(
    ranks: Mapping[int, int], rows: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0, **left: Sequence[str]
) -> Case:
    """One adapter a slot, in pages that are neither in order nor side by side; every other page is NaN.

    ``left["s3"]`` names what the adapter of slot 3 leaves alone.
    """
    total = sum(-(-r // WIDTH) for r in ranks.values())
    pages = LoraPages(GROUPS, 2 * total + 3, dtype, DEVICE)
    for t in (*pages.shrink.values(), *pages.packed.values()):
        t.fill_(float("nan"))
    free = torch.randperm(pages.count, generator=torch.Generator().manual_seed(seed)).tolist()
    slots, adapters = {}, {}
    for slot, rank in ranks.items():
        slots[slot] = [free.pop() for _ in range(-(-rank // WIDTH))]
        adapters[slot] = rounded(adapter(rank, seed + slot, left.get(f"s{slot}", ())), dtype)
        pages.write(slots[slot], adapters[slot])
    return Case(pages, slots, adapters, list(rows))


def rounded(one: Adapter, dtype: torch.dtype) -> Adapter:
    """The adapter as the pages can hold it."""
    return {
        name: [None if p is None else (p[0].to(dtype).double(), p[1].to(dtype).double()) for p in pairs]
        for name, pairs in one.items()
    }


def plan_of(rows: Sequence[int]) -> TokenPlan:
    """A step whose token t belongs to slot rows[t], in any order; only what operators read is filled."""
    segments: list[Segment] = []
    for t, slot in enumerate(rows):
        if slot != BASE and segments and segments[-1].slot == slot and segments[-1].end == t:
            segments[-1] = Segment(slot, segments[-1].start, t + 1)
        elif slot != BASE:
            segments.append(Segment(slot, t, t + 1))
    none = torch.empty(0, dtype=torch.int64)
    return TokenPlan((), 16, none, none, none, (0, len(rows)), tuple(segments), none, tuple(segments))


def inputs(case: Case, group: Group, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, list[Tensor]]:
    """x and the base's outputs of one group."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(case.rows), group.inp, generator=g, dtype=torch.float64)
    ys = [torch.randn(len(case.rows), out, generator=g, dtype=torch.float64) for out in group.outs]
    return x.to(DEVICE, dtype), [y.to(DEVICE, dtype) for y in ys]


def evaluator(case: Case, group: Group, x: Tensor, ys: Sequence[Tensor]) -> list[Tensor]:
    """fp64, token by token, never through the pages."""
    out = [y.cpu().double().clone() for y in ys]
    for t, slot in enumerate(case.rows):
        pairs = case.adapters.get(slot, {}).get(group.name, [None] * len(ys))
        for j, pair in enumerate(pairs):
            if pair is not None:
                out[j][t] += pair[1] @ (pair[0] @ x[t].cpu().double())
    return out


def run(name: str, case: Case, group: Group, x: Tensor, ys: Sequence[Tensor], *, whole: bool = True) -> list[Tensor]:
    """What operator ``name`` makes of copies of ``ys``, by apply or by shrink and expand."""
    op = make_op(name, case.pages)
    op.begin(case.plan, case.slots)
    out = [y.clone() for y in ys]
    if whole:
        op.apply(group, x, out)
    else:
        v = op.shrink(group, x)
        for j, y in enumerate(out):
            op.expand(group, j, v, y)
    return out


def gap(got: Sequence[Tensor], want: Sequence[Tensor], ys: Sequence[Tensor]) -> float:
    """The largest error over the size of the change (NaN counts as infinite)."""
    size = max([float((w - y.cpu().double()).abs().max()) for w, y in zip(want, ys, strict=True) if w.numel()] + [1.0])
    errors = [float((a.cpu().double() - w).abs().max()) for a, w in zip(got, want, strict=True) if w.numel()]
    worst = max([*errors, 0.0])
    return float("inf") if any(e != e for e in errors) else worst / size
