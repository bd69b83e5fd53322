"""LISA: one draw of blocks every K steps, the others frozen and without moments."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rankwise.allocation import sample
from rankwise.errors import OptionError
from rankwise.seeds import generator
from tests.budgets.tools import run

LISA = {"form": "full", "targets": "all", "budget": {"name": "lisa", "blocks": 1, "every": 4}}


def test_lisa_trains_one_block_and_frees_the_others_moments() -> None:
    picked: list[frozenset[int]] = []

    def each(session: Any, event: str) -> None:
        params = session.adapter.named_parameters()
        layer = session.budget._layer
        if event == "backward":
            live = {layer[n] for n, p in params.items() if p.grad is not None}
            picked.append(frozenset(x for x in live if x >= 0))
            assert -1 in live and len(picked[-1]) == 1
            each.before = {n: p.detach().clone() for n, p in session.budget._params.items()}  # type: ignore[attr-defined]
        else:
            live_names = set(session.budget.allocation.trainable)
            for n, p in session.budget._params.items():
                if n not in live_names:
                    assert torch.equal(p, each.before[n]), n  # type: ignore[attr-defined]
            held = session.optimizer.state_elements()
            assert set(held) == live_names, "moments of frozen tensors are freed"
            assert sum(held.values()) == 2 * sum(session.budget._params[n].numel() for n in live_names)

    run(LISA, 16, each, layers=4, weight_decay=0.1)
    assert len(picked) == 16 and all(len(set(picked[i : i + 4])) == 1 for i in range(0, 16, 4)), "one draw every 4 steps"
    assert len(set(picked)) > 1, "blocks change"


def test_lisa_draws_uniformly() -> None:
    names = [str(i) for i in range(6)]
    hits = sum(
        (torch.tensor([n in sample(names, 2, generator(0, "lisa", str(t))) for n in names]).float() for t in range(600)),
        torch.zeros(6),
    )
    assert (hits / 600 - 2 / 6).abs().max() < 4 * (1 / 3 * 2 / 3 / 600) ** 0.5


def test_lisa_with_all_blocks_is_full_tuning() -> None:
    plain, _ = run({"form": "full", "targets": "all"}, 5)
    lisa, session = run({**LISA, "budget": {"name": "lisa", "blocks": 2, "every": 2}}, 5)
    session.close()
    assert all(torch.equal(t, lisa.tensors()[k]) for k, t in plain.tensors().items())


def test_lisa_leaves_nothing_frozen_and_refuses_too_many_blocks() -> None:
    adapter, session = run(LISA, 3)
    session.close()
    assert all(p.requires_grad for p in session.budget._params.values())
    with pytest.raises(OptionError, match="blocks = 9"):
        run({**LISA, "budget": {"name": "lisa", "blocks": 9}}, 2)
