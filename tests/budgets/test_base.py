"""A decision is rank 0's: two gloo processes whose scores and seeds differ prune, freeze and end alike."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

import rankwise as rw
from rankwise.allocation import Allocation
from rankwise.budgets.base import agreed
from tests.models import batch_for, llama

RECIPES: dict[str, dict[str, Any]] = {
    "adalora": {
        "form": "svd",
        "r": 4,
        "budget": {"name": "adalora", "target_r": 1, "every": 1, "warmup": 1, "final": 2},
        "losses": ["orthogonality"],
    },
    "lisa": {"r": 2, "budget": {"name": "lisa", "blocks": 1, "every": 1}},
}
STEPS = 6


def train(recipe: dict[str, Any], rank: int, ranks: int) -> tuple[Any, list[Any]]:
    """(adapter, the allocation of every step); rank 1 has its scores turned round and another seed for its draws."""
    model = llama(layers=4)
    adapter = rw.attach(model, recipe)
    net = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    session = rw.Session(net, adapter, lr=1e-2, total_steps=STEPS, ddp=ranks > 1, seed=rank, check=False)
    if rank and hasattr(session.budget, "scores"):
        scores = session.budget.scores  # type: ignore[union-attr]
        session.budget.scores = lambda run: {k: -v for k, v in scores(run).items()}  # type: ignore[union-attr]
    batch = {k: v[rank::ranks] for k, v in batch_for(model, rows=4).items()}
    net.train()
    decided = []
    for _ in range(STEPS):
        session.step_begin()
        out = net(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
        now = session.budget.allocation  # type: ignore[union-attr]
        decided.append(None if now is None else now.to_json())
    return adapter, decided


def _worker(rank: int, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    adapter, decided = train(RECIPES[name], rank, 2)
    torch.save({"tensors": {k: t.detach() for k, t in adapter.tensors().items()}, "decided": decided}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(RECIPES))
def test_two_ranks_decide_as_rank_0(name: str, tmp_path: Path) -> None:
    mp.spawn(_worker, (name, str(tmp_path)), nprocs=2)
    zero, one = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in (0, 1))
    alone = [train(RECIPES[name], r, 1) for r in (0, 1)]
    assert alone[0][1] != alone[1][1], "left to itself, rank 1 would decide otherwise"
    assert zero["decided"] == one["decided"] and zero["decided"][-1] is not None
    for k, t in zero["tensors"].items():
        assert torch.equal(t, one["tensors"][k]), k
    assert zero["decided"][-1] == alone[0][1][-1], "and it is what one process with rank 0's scores decides"
    for k, t in alone[0][0].tensors().items():
        assert torch.allclose(zero["tensors"][k], t, atol=1e-4), k


def test_one_process_keeps_its_own() -> None:
    mine = Allocation(trainable=("a",))
    assert agreed(SimpleNamespace(ddp=True), mine) is mine  # type: ignore[arg-type]
