from __future__ import annotations

from collections import Counter

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError
from tests.models import llama


def build(**options: object) -> tuple[object, object]:
    model = llama(layers=4)
    return model, rw.attach(model, {"r": options.pop("r", 4), "form": {"name": "mos", **options}})  # type: ignore[arg-type]


def test_parameters_are_those_of_lora_at_the_budget_rank() -> None:
    _, mos = build(budget_rank=2, shards=2, private=1)
    lora = rw.attach(llama(layers=4), {"r": 2})
    assert mos.numel() == lora.numel()  # type: ignore[attr-defined]


def test_private_full_budget_with_one_shard_is_lora() -> None:
    _, mos = build(r=2, budget_rank=2, shards=1, private=2)
    for d in mos.sites.values():  # type: ignore[attr-defined]
        assert sorted(d.index_a.tolist()) == list(range(d.index_a.min(), d.index_a.max() + 1))
    used = Counter(i for d in mos.sites.values() if d.site.spec.role == "q" for i in d.index_a.tolist())  # type: ignore[attr-defined]
    assert set(used.values()) == {1} and len(used) == 8, "no shard is shared"


def test_indices_do_not_repeat_within_a_layer_and_dissociate() -> None:
    _, mos = build(budget_rank=2, shards=2, private=1)
    for d in mos.sites.values():  # type: ignore[attr-defined]
        assert len(set(d.index_a.tolist())) == len(d.index_a) == 4 * 2
    assert any(not torch.equal(d.index_a, d.index_b) for d in mos.sites.values())  # type: ignore[attr-defined]
    _, paired = build(budget_rank=2, shards=2, private=1, dissociate=False)
    assert all(torch.equal(d.index_a, d.index_b) for d in paired.sites.values())  # type: ignore[attr-defined]


def test_a_public_shards_gradient_sums_over_its_uses() -> None:
    model, mos = build(budget_rank=2, shards=1, private=1)
    with torch.no_grad():
        for p in mos.trainable_parameters():  # type: ignore[attr-defined]
            p.normal_(std=0.1)
    deltas = [d for d in mos.sites.values() if d.site.spec.role == "up"]  # type: ignore[attr-defined]
    bank = deltas[0].bank
    assert all(d.bank is bank for d in deltas)
    grads = []
    for d in deltas:
        d.delta().dense().sum().backward()
        grads.append(bank.PA.grad.clone())
        bank.PA.grad = None
    sum(d.delta().dense().sum() for d in deltas).backward()
    assert torch.allclose(bank.PA.grad, sum(grads), atol=1e-5)
    private = deltas[1].index_a[-1]
    assert sum(bool(g[private].any()) for g in grads) == 1


@pytest.mark.parametrize("options", [{"shards": 5}, {"private": 3}, {"r": 12, "budget_rank": 2, "private": 1}, {"budget_rank": 0}])
def test_impossible_pools_are_refused(options: dict) -> None:
    with pytest.raises(OptionError, match="'mos'"):
        build(**options)
