"""AdaLoRA and LISA: the identities of their cards, through a Session."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.allocation import Allocation, by_energy, cubic, knapsack, sample, top_k
from rankwise.errors import OptionError, RecipeError
from rankwise.seeds import generator
from tests.models import batch_for, llama


def run(recipe: dict[str, Any], steps: int, each: Any = None, layers: int = 2, lr: float = 1e-2, **options: Any) -> tuple[Any, Any]:
    model = llama(layers=layers)
    adapter = rw.attach(model, recipe)
    session = rw.Session(model, adapter, lr=lr, total_steps=steps, **options)
    batch = batch_for(model, rows=4)
    model.train()
    for _ in range(steps):
        session.step_begin()
        out = model(**batch)
        (out.loss + session.penalty(out, batch)).backward()
        if each is not None:
            each(session, "backward")
        session.step()
        if each is not None:
            each(session, "step")
    return adapter, session


ADALORA = {
    "form": "svd",
    "r": 6,
    "budget": {"name": "adalora", "target_r": 2, "every": 3, "warmup": 4, "final": 6},
    "losses": ["orthogonality"],
}


def test_adalora_follows_its_budget_and_masks_exactly() -> None:
    counts: list[int] = []

    def each(session: Any, event: str) -> None:
        if event == "step":
            counts.append(sum(int((d.core != 0).sum()) for d in session.adapter.sites.values()))
            if session.t > 4 and (session.t % 3 == 0 or session.t >= 18):
                assert counts[-1] == session.budget.budget(session.t)

    adapter, session = run(ADALORA, 24, each)
    budget = session.budget
    b = [budget.budget(t) for t in range(25)]
    assert b[0] == 6 * 14 and b[-1] == 2 * 14 and all(x >= y for x, y in itertools.pairwise(b))
    assert counts[3] == 84, "nothing is masked in the warm-up"
    assert set(counts[-6:]) == {28}, "the final phase holds the set at every step"
    low, error = adapter.delta("model.layers.0.mlp.up_proj").to_lowrank()
    assert error == 0.0


def test_adalora_scores_are_the_formula_and_stop_in_the_final_phase() -> None:
    mean: dict[str, torch.Tensor] = {}
    spread: dict[str, torch.Tensor] = {}

    def each(session: Any, event: str) -> None:
        if event != "backward" or session.t + 1 > 18:
            return
        for n, p in session.adapter.named_parameters().items():
            s = (p * p.grad).abs().detach()
            mean[n] = 0.85 * mean.get(n, torch.zeros_like(s)) + 0.15 * s
            spread[n] = 0.85 * spread.get(n, torch.zeros_like(s)) + 0.15 * (s - mean[n]).abs()

    _, session = run(ADALORA, 24, each)
    for n in mean:
        assert torch.allclose(session.budget._mean[n], mean[n], atol=1e-9), n
        assert torch.allclose(session.budget._spread[n], spread[n], atol=1e-9), n
    site = "model.layers.1.mlp.down_proj"
    part = {t: mean[f"{site}::{t}"] * spread[f"{site}::{t}"] for t in ("A", "B", "core")}
    want = part["core"] + part["A"].mean(1) + part["B"].mean(0)
    got = [v for (s, _), v in sorted(session.budget.scores(session.run).items()) if s == site]
    assert torch.allclose(torch.tensor(got), want, atol=1e-12)


def test_constant_budget_without_penalty_is_a_trained_diagonal() -> None:
    recipe = {"form": "svd", "r": 4}
    plain, _ = run(recipe, 8)
    held, _ = run({**recipe, "budget": {"name": "adalora", "target_r": 4, "every": 1, "warmup": 1, "final": 2}}, 8)
    for k, t in plain.tensors().items():
        assert torch.equal(t, held.tensors()[k]), k


def test_adalora_refuses() -> None:
    with pytest.raises(RecipeError, match="core:diag"):
        rw.Recipe(form="lora", budget="adalora")
    with pytest.raises(OptionError, match="target_r = 9"):
        rw.Recipe(form="svd", r=8, budget={"name": "adalora", "target_r": 9})
    with pytest.raises(OptionError, match="warms up for 4 steps"):
        run(ADALORA, 8)


def test_preset_is_the_three_parts() -> None:
    r = rw.Recipe(preset="adalora", r=6)
    assert (r.form, r.budget, r.losses) == ("svd", "adalora", ["orthogonality"])


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


def test_allocators() -> None:
    assert top_k({"a": 1.0, "b": 1.0, "c": 2.0}, 2) == ["c", "a"]
    assert cubic(5, 10, 2, 0, 0, 10) == pytest.approx(2 + 8 * 0.5**3)
    assert by_energy([2.0, 1.0, 1.0], 0.5) == 1 and by_energy([2.0, 1.0, 1.0], 0.7) == 2
    g = torch.Generator().manual_seed(0)
    for _ in range(20):  # exact against brute force
        v, c = torch.rand(7, generator=g).tolist(), torch.randint(1, 6, (7,), generator=g).tolist()
        picked = knapsack(v, c, 10)
        sets = [[i for i in range(7) if m >> i & 1] for m in range(128)]
        best = max(sum(v[i] for i in s) for s in sets if sum(c[i] for i in s) <= 10)
        assert sum(c[i] for i in picked) <= 10 and sum(v[i] for i in picked) == pytest.approx(best)
    a = Allocation(masks={"x": (True, False)}, ranks={"x": 1}, trainable=("x",))
    assert Allocation.from_json(a.to_json()) == a
