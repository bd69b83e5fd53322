"""EVA: rows are the top directions of the input, and ranks sum to the budget."""

from __future__ import annotations

import torch

import rankwise as rw
from tests.contract.test_laws import calibration
from tests.models import llama


def test_eva_rows_are_top_directions_and_ranks_sum_to_the_budget() -> None:
    model = llama()
    adapter = rw.attach(model, {"init": "eva", "r": 3}, calibration=calibration())
    ranks = {n: d.A.shape[0] for n, d in adapter.sites.items()}
    assert sum(ranks.values()) == 3 * 14 and len(set(ranks.values())) > 1
    for d in adapter.sites.values():
        assert torch.allclose(d.A @ d.A.T, torch.eye(len(d.A)), atol=1e-4) and not d.B.any()
        assert d.scale == 1.0
    q, k = (adapter.sites[f"model.layers.0.self_attn.{n}_proj"] for n in "qk")
    n = min(len(q.A), len(k.A))
    assert torch.equal(q.A[:n], k.A[:n]), "sites fed by one tensor share their leading rows"


def test_eva_ignores_masked_tokens() -> None:
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 64, (4, 24), generator=g)
    noisy = ids.clone()
    noisy[:, 16:] = torch.randint(3, 64, (4, 8), generator=g)
    labels = ids.clone()
    labels[:, 16:] = -100
    got = [
        next(
            iter(
                rw.attach(
                    llama(),
                    {"init": "eva", "r": 2, "targets": ["q"], "layers": [0]},
                    calibration=[{"input_ids": x, "labels": labels}],
                ).sites.values()
            )
        ).A
        for x in (ids, noisy)
    ]
    assert torch.allclose(*got, atol=1e-5)
