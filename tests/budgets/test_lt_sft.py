from __future__ import annotations

import io
import itertools
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.budgets.lt_sft import largest, originals, overlap, sparse
from rankwise.delta import AdapterState, Dense, Entries
from rankwise.errors import MergeError, OptionError
from rankwise.merge import attach_state
from tests.budgets.tools import run
from tests.models import batch_for, llama, logits

ALL = {"form": "full", "targets": "all-linear"}
SFT = {**ALL, "budget": {"name": "lt_sft", "k": 200}}
NOW = {"lr": 1e-2, "weight_decay": 0.1, "schedule": "constant"}


def moved(adapter: Any) -> dict[str, torch.Tensor]:
    """Where a weight's bits are not θ_0's."""
    params = adapter.named_parameters()
    return {n: params[n] != o for n, o in originals(adapter).items()}


def count(adapter: Any) -> int:
    return sum(int(m.sum()) for m in moved(adapter).values())


def test_keeps_exactly_k_of_the_largest_moves_and_the_rest_are_the_bases_bits() -> None:
    dense, _ = run(ALL, 4, **NOW)
    moves = {n: (dense.named_parameters()[n] - o).abs() for n, o in originals(dense).items()}
    edge = torch.cat([m.flatten() for m in moves.values()]).sort(descending=True).values[199]

    rewound: list[int] = []

    def each(session: Any, event: str) -> None:
        if event == "backward":
            rewound.append(count(session.adapter))
        elif session.t > 4:
            assert count(session.adapter) <= 200, "weight decay or momentum moved a masked entry"

    adapter, session = run(SFT, 8, each, **NOW)
    assert rewound[3] > 10_000 and rewound[4] == 0, "rewound to θ_0 at the change of phase"
    for n, m in moved(adapter).items():
        assert torch.equal(m, m & (moves[n] >= edge)), "an entry outside the 200 largest moves trained"
    assert count(adapter) == 200 == sum(len(i) for i in session.budget._kept.values())
    assert session.logs["entries"] == 200


def test_the_second_phase_is_masked_adam_from_the_start() -> None:
    """Entry by entry Adam: the masked run equals a fresh one whose gradients and updates are masked by hand."""
    adapter, session = run(SFT, 6, lr=1e-2, schedule="constant")
    masks = session.budget._masks
    model = llama()
    plain = rw.attach(model, ALL)
    by_hand = plain.named_parameters()
    start = {n: p.detach().clone() for n, p in by_hand.items()}
    adam = torch.optim.Adam(by_hand.values(), lr=1e-2)
    batch = batch_for(model, rows=4)
    model.train()
    for _ in range(3):
        adam.zero_grad()
        model(**batch).loss.backward()
        adam.step()
        with torch.no_grad():
            for n, p in by_hand.items():
                p.copy_(torch.where(masks[n], p, start[n]))
    for n, p in adapter.named_parameters().items():
        assert torch.allclose(p, by_hand[n], atol=1e-6), n


def test_ties_still_give_exactly_k() -> None:
    assert largest(torch.tensor([1.0, 2.0, 1.0, 1.0, 0.0]), 3).tolist() == [0, 1, 2]
    g = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 5, (1000,), generator=g).float()
    got = largest(coarse, 357)
    assert len(got) == 357 and coarse[got].sum() == coarse.sort(descending=True).values[:357].sum()


def test_rounds_add_new_entries_to_the_old() -> None:
    kept: list[dict[str, set[int]]] = []

    def each(session: Any, event: str) -> None:
        if event == "step" and session.t in (4, 8, 12):
            kept.append({n: set(i.tolist()) for n, i in session.budget._kept.items()})

    adapter, _ = run({**ALL, "budget": {"name": "lt_sft", "k": 100, "rounds": 3}}, 12, each, **NOW)
    assert [sum(map(len, k.values())) for k in kept] == [33, 66, 100]
    for before, after in itertools.pairwise(kept):
        assert all(before[n] <= after[n] for n in before)
    assert count(adapter) == 100


def test_sparse_values_compose_attach_and_come_off() -> None:
    first, _ = run(SFT, 6, **NOW)
    second, _ = run({**SFT, "budget": {"name": "lt_sft", "k": 300}}, 6, lr=3e-2)
    a, b = sparse(first), sparse(second)
    assert sum(len(d.index) for d in a.sites.values()) <= 200 and all(isinstance(d, Entries) for d in a.sites.values())
    batch = batch_for(llama())
    model = llama()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    base = logits(model, batch)
    adapter = attach_state(model, a, name="task")
    assert torch.allclose(logits(model, batch), logits(first.model, batch), atol=1e-5)
    assert (logits(model, batch) - base).abs().max() > 1e-3
    adapter.detach()
    assert torch.equal(logits(model, batch), base) and all(torch.equal(v, bits[k]) for k, v in model.state_dict().items())

    both, other = a + b, b + a
    assert all(torch.equal(both.sites[n].dense(), other.sites[n].dense()) for n in both.sites)
    shared = overlap([a, b])
    sizes = {n: [len(s.sites[n].index) if n in s.sites else 0 for s in (a, b)] for n in shared}
    assert sum(shared.values()) > 0
    for n, d in both.sites.items():
        assert len(d.index) == sum(sizes[n]) - shared[n]
        want = sum((s.sites[n].dense() for s in (a, b) if n in s.sites), torch.zeros(d.shape))
        assert torch.equal(d.dense(), want)
    with pytest.raises(MergeError, match="dense"):
        overlap([AdapterState({"x": Dense(torch.zeros(2, 2))})])


def test_small_moves_are_dropped_and_other_forms_refused() -> None:
    model = llama()
    adapter = rw.attach(model, {"form": "full", "targets": ["q_proj.weight"]})
    p = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        p[0, 0], p[1, 1] = p[0, 0] + 0.5, 0.0
    small = float((p.detach() - originals(adapter)["model.layers.0.self_attn.q_proj::weight"])[1, 1].abs())
    state = sparse(adapter)
    assert state.sites["model.layers.0.self_attn.q_proj"].index.tolist() == [0, 33]
    assert len(sparse(adapter, tolerance=small * 2).sites["model.layers.0.self_attn.q_proj"].index) == 1
    with pytest.raises(MergeError, match="another form"):
        sparse(rw.attach(llama(), {"form": "lora", "r": 2}))


def test_a_part_that_is_not_masked_rewinds_and_trains() -> None:
    recipe = {**SFT, "modules_to_save": ["model.norm"]}
    at: list[torch.Tensor] = []

    def each(session: Any, event: str) -> None:
        if event == "backward":
            at.append(session.adapter.named_parameters()["model.norm.weight::D"].detach().clone())

    adapter, _ = run(recipe, 6, each, **NOW)
    assert at[2].any() and not at[3].any() and at[5].any()


def test_resumes_in_either_phase() -> None:
    for stop in (2, 4, 5):
        want, _ = run(SFT, 8, **NOW)
        model = llama()
        adapter = rw.attach(model, SFT)
        session = rw.Session(model, adapter, total_steps=8, **NOW)
        batch = batch_for(model, rows=4)
        model.train()

        def go(session: Any, steps: int, model: Any = model, batch: Any = batch) -> None:
            for _ in range(steps):
                session.step_begin()
                model(**batch).loss.backward()
                session.step()

        go(session, stop)
        buffer = io.BytesIO()
        torch.save(session.state_dict(), buffer)
        buffer.seek(0)
        again = rw.Session(model, adapter, total_steps=8, **NOW)
        again.load_state_dict(torch.load(buffer, weights_only=True))
        go(again, 8 - stop)
        got = adapter.named_parameters()
        assert all(torch.equal(got[n], p) for n, p in want.named_parameters().items()), stop


def test_the_preset_and_refusals() -> None:
    assert rw.Recipe(preset="lt_sft").budget == "lt_sft"
    for options, steps, why in (
        ({"k": 0}, 4, "share"),
        ({"k": 2.5}, 4, "whole number"),
        ({"k": 10**9}, 4, "entries"),
        ({"full": 1.0}, 4, "full"),
        ({"rounds": 3}, 4, "a step of each phase"),
    ):
        with pytest.raises(OptionError, match=why):
            run({**ALL, "budget": {"name": "lt_sft", **options}}, steps)
    with pytest.raises(OptionError, match="keep='copy'"):
        run({**SFT, "form": {"name": "full", "keep": "none"}}, 4)
    with pytest.raises(rw.RankwiseError, match="lora"):
        rw.Recipe(form="lora", budget="lt_sft")
