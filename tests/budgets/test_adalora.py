"""AdaLoRA: its schedule, its scores, its masks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import OptionError, RecipeError
from tests.budgets.tools import run

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
