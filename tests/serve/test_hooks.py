"""A hooked product: siblings laid together or alone, their changes added at once or one by one, give the same."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rankwise.serve.batch import BASE, planned
from rankwise.serve.model.linear_hooks import Acting, Bundle, Changes, Hook
from rankwise.serve.ops.base import LoraPages
from rankwise.serve.ops.registry import make_op
from tests.serve.ops.steps import GROUPS, make_case


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["reference", "bags"])
@pytest.mark.parametrize("non_lora_changes", [True, False])
def test_changes_of_siblings(name: str, pack: bool, non_lora_changes: bool) -> None:
    """Each module's output has its change once, also where it is called again, and a non-LoRA change sees the base's output."""
    case = make_case({0: 8, 1: 9}, [BASE, 0, 0, 1])
    group, op = GROUPS[0], make_op(name, case.pages)
    torch.manual_seed(0)
    modules = [nn.Linear(group.inp, out, bias=False).requires_grad_(False) for out in group.outs]
    bundle = Bundle(group, modules, pack=pack)
    assert bundle.together is pack
    op.begin(case.plan, case.slots)
    seen: list[torch.Tensor] = []
    segment = case.plan.segments[1]

    def watch(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        seen.append(y.clone())
        return torch.zeros_like(y)

    changes = Changes(op, frozenset([group.name]), non_lora_changes={"v": [(segment, (watch,))]} if non_lora_changes else {})
    hooks = [Hook(path, bundle, j, Acting(body=changes)) for j, path in enumerate(group.modules)]
    x = torch.randn(4, group.inp)
    with planned(case.plan):
        got = [hooks[j](x) for j in (0, 0, 1, 2)]
    base = [m(x) for m in modules]
    want = [b.clone() for b in base]
    for t, slot in enumerate(case.rows):
        for j, w in enumerate(want):
            if slot != BASE:
                A, B = case.adapters[slot][group.name][j]  # type: ignore[misc]
                w[t] += (B @ (A @ x[t].double())).float()
    for y, w in zip(got, [want[0], *want], strict=True):
        assert torch.allclose(y, w, atol=1e-3, rtol=1e-5)
    if non_lora_changes:
        assert torch.allclose(seen[0], base[2][segment.start : segment.end], atol=1e-5)


def test_a_group_that_nothing_touches() -> None:
    """A group that no acting adapter touches leaves the product's bits."""
    group, op = GROUPS[0], make_op("bags", LoraPages(GROUPS, 1))
    modules = [nn.Linear(group.inp, out, bias=False).requires_grad_(False) for out in group.outs]
    bundle = Bundle(group, modules, pack=True)
    case = make_case({0: 8}, [0, 0])
    hook = Hook("q", bundle, 0, Acting(body=Changes(op, frozenset(["o"]))))
    x = torch.randn(2, group.inp)
    with planned(case.plan):
        y = hook(x)
    assert torch.equal(y, Bundle(group, modules, pack=True).product(x, 0))
