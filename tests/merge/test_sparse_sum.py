"""Composition of sparse fine-tunings as a merge: any kind of change, exact, commutative, from folders of LT-SFT runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import rankwise as rw
from rankwise.delta import AdapterState, Dense, Entries, LowRank
from rankwise.errors import MergeError
from rankwise.merge import attach_state, merge_states, read_state
from tests.budgets.tools import run
from tests.models import batch_for, llama, logits, move

SFT = {"form": "full", "targets": "all-linear", "budget": {"name": "lt_sft", "k": 200}}


def entries(seed: int, k: int = 5) -> Entries:
    g = torch.Generator().manual_seed(seed)
    return Entries(torch.randperm(80, generator=g)[:k].sort().values, torch.randn(k, generator=g), (10, 8))


def test_values_of_any_kind_add_up_exactly_in_any_order() -> None:
    g = torch.Generator().manual_seed(9)
    low, full = LowRank(torch.randn(2, 8, generator=g), torch.randn(10, 2, generator=g)), Dense(torch.randn(10, 8, generator=g))
    sources = [AdapterState({"x": d}) for d in (entries(0), entries(1, 30), low, full)]
    got = merge_states(sources, None, "sparse_sum")
    want = sum(s.sites["x"].dense().double() for s in sources)
    assert torch.allclose(got.sites["x"].dense().double(), want, atol=1e-6) and got.meta["weights"] == [1.0] * 4
    back = merge_states(sources[::-1], None, "sparse_sum")
    assert torch.allclose(back.sites["x"].dense(), got.sites["x"].dense(), atol=1e-6)
    weighed = merge_states(sources[:2], [0.5, -2.0], "sparse_sum").sites["x"]
    assert isinstance(weighed, Entries) and torch.allclose(
        weighed.dense(), 0.5 * entries(0).dense() - 2 * entries(1, 30).dense(), atol=1e-6
    )
    two = [AdapterState({"x": entries(0)}), AdapterState({"x": entries(1, 30), "y": entries(2)})]
    a, b = merge_states(two, None, "sparse_sum"), merge_states(two[::-1], None, "sparse_sum")
    assert torch.equal(a.sites["x"].values, b.sites["x"].values) and torch.equal(a.sites["x"].index, b.sites["x"].index)
    common = set(entries(0).index.tolist()) & set(entries(1, 30).index.tolist())
    assert a.meta["shared"] == {"x": len(common), "y": 0} and common
    assert len(a.sites["x"].index) == 35 - len(common) and torch.equal(a.sites["y"].dense(), entries(2).dense())


def test_folders_of_sparse_runs_compose_on_their_base(tmp_path: Path) -> None:
    folders, states = [], []
    for i, lr in enumerate((1e-2, 3e-2)):
        adapter, _ = run(SFT, 4, lr=lr)
        adapter.save(tmp_path / str(i))
        folders.append(tmp_path / str(i))
        states.append({n: p.detach().clone() for n, p in adapter.model.named_parameters() if not n.startswith("rankwise.")})
    model = llama()
    bits, batch = {k: v.clone() for k, v in model.state_dict().items()}, batch_for(llama())
    found = [read_state(model, f, as_is=True) for f in folders]
    assert all(isinstance(d, Entries) for s in found for d in s.sites.values())
    merged = merge_states(found, None, "sparse_sum")
    adapter = attach_state(model, merged)
    by_hand = llama()
    with torch.no_grad():
        for n, p in by_hand.named_parameters():
            p.add_(sum(s[n] - bits[n] for s in states))
    assert torch.allclose(logits(model, batch), logits(by_hand, batch), atol=1e-5)
    assert sum(merged.meta["shared"].values()) > 0
    adapter.detach()
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())


def test_what_reads_the_weight_is_refused(tmp_path: Path) -> None:
    model = llama()
    adapter = rw.attach(model, {"form": "dora", "r": 2})
    move(adapter)
    adapter.save(tmp_path / "dora")
    adapter.detach()
    with pytest.raises(MergeError, match="depends on W or x"):
        read_state(model, tmp_path / "dora", as_is=True)
    assert "rankwise" not in model._modules or not rw.adapters(model)
