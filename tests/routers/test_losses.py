"""Balance losses: the formulas, and padding has no say."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.routers.base import RoutingRecord, collect_losses, recording, routers_in
from rankwise.routers.decision import Decision
from rankwise.routers.losses import switch, z_loss
from tests.models import llama


def test_switch_loss_is_k_at_uniform_and_trains_the_router() -> None:
    n = 4000
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(n)])
    d = Decision(torch.full((n, 2), 0.5), 4, index=index, probs=torch.full((n, 4), 0.25), logits=torch.zeros(n, 4))
    assert switch([RoutingRecord(d)], per="row").item() == pytest.approx(2.0, abs=1e-3)
    assert switch([RoutingRecord(d)]).item() == pytest.approx(1.0, abs=1e-3)
    assert z_loss([RoutingRecord(d)]).item() == pytest.approx(torch.log(torch.tensor(4.0)).item() ** 2, rel=1e-5)


def test_padding_changes_neither_losses_nor_other_rows() -> None:
    g = torch.Generator().manual_seed(0)
    probs = torch.rand(10, 4, generator=g).softmax(-1)
    index = probs.topk(2).indices
    mask = torch.tensor([True] * 6 + [False] * 4)
    whole = Decision(torch.ones(10, 2), 4, index=index, probs=probs, logits=probs.log())
    part = Decision(torch.ones(6, 2), 4, index=index[:6], probs=probs[:6], logits=probs[:6].log())
    assert torch.allclose(switch([RoutingRecord(whole, mask)]), switch([RoutingRecord(part)]))
    assert torch.allclose(z_loss([RoutingRecord(whole, mask)]), z_loss([RoutingRecord(part)]))


@pytest.mark.parametrize("attention", ["mask", "varlen"])
def test_a_routers_records_know_the_padding_of_packed_rows(attention: str) -> None:
    from rankwise.train.data.collate import Collator
    from rankwise.train.data.packing import Packed

    rows = [Packed([5, 6, 7, 8, 9], [5, 6, 7, 8, 9], [3, 2]), Packed([5, 6, 7], [5, 6, 7], [3])]
    batch = Collator(0, attention)(rows)
    model = llama()
    adapter = rw.attach(model, {"r": 2, "router": {"name": "mixlora", "experts": 2}})
    model.train()
    with recording(adapter.module):
        model(**batch)
    records = [r for router in routers_in(adapter.module) for r in router.records]
    assert len(records) == 2
    for record in records:
        assert record.mask is not None and record.mask.view(2, 5).tolist() == [[True] * 5, [True] * 3 + [False] * 2]


def test_a_pool_of_routers_has_one_loss_over_all_its_rows() -> None:
    """Two blocks that lean to opposite experts are balanced together, as the public code counts them, and not one by one."""
    n = 50
    sides = [torch.tensor([[0.9, 0.1]]).expand(n, 2), torch.tensor([[0.1, 0.9]]).expand(n, 2)]
    records = [
        RoutingRecord(Decision(torch.ones(n, 1), 2, index=p.argmax(-1, keepdim=True), probs=p, logits=p.log())) for p in sides
    ]
    assert switch(records[:1]).item() == pytest.approx(2 * 0.9) and switch(records).item() == pytest.approx(1.0)
    model = llama()
    adapter = rw.attach(model, {"r": 2, "router": {"name": "mixlora", "experts": 2, "k": 1, "balance": 1.0}})
    first, second = (r for r in routers_in(adapter.module) if getattr(r, "pool", None) is not None)
    for router, record in zip((first, second), records, strict=True):
        router.records.append(record)
    assert collect_losses(adapter.module)["switch"].item() == pytest.approx(1.0)
    first.pool = None  # a router by itself
    for router in (first, second):
        router._read = 0
    assert collect_losses(adapter.module)["switch"].item() == pytest.approx(3.6)
