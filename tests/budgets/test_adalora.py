"""AdaLoRA: its schedule, its scores, its masks, and what leaves."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankwise as rw
from rankwise.errors import OptionError, RecipeError
from tests.budgets.tools import run
from tests.models import batch_for, llama, logits

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


def test_masked_triplets_leave_as_smaller_ranks_that_peft_loads(tmp_path: Any) -> None:
    """λ folded into one factor: a plain LoRA whose rank at each place is the number of λ that stand, with the same logits."""
    adapter, _ = run(ADALORA, 24)
    model, batch = adapter.model, batch_for(adapter.model)
    want = logits(model, batch)
    adapter.export(tmp_path)
    stand = {n: int((d.core != 0).sum()) for n, d in adapter.sites.items()}
    assert sum(stand.values()) == 28 and len(set(stand.values())) > 1, "the mask must leave uneven ranks, or nothing is shown"
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        held = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    for name, rank in stand.items():
        key = f"base_model.model.{name}.lora_A.weight"
        assert (held[key].shape[0] if rank else key in held) == rank, name
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(llama(), tmp_path)
    assert torch.allclose(logits(theirs, batch), want, atol=1e-5)
    assert (want - logits(llama(), batch)).abs().max() > 1e-2
    assert torch.allclose(logits(rw.load(llama(), tmp_path).model, batch), want, atol=1e-5)


def test_the_budget_gathers_where_the_task_is() -> None:
    """Four matrices, one of which carries the task: the triplets that stand are its own, and a uniform rank does worse."""
    torch.manual_seed(0)
    inputs = torch.randn(4, 64, 12)
    change = torch.randn(12, 6) @ torch.randn(6, 12) / 4

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(1)
            self.lin = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([m(v) for m, v in zip(self.lin, x, strict=True)])

    def trained(recipe: dict[str, Any]) -> tuple[Any, float]:
        model = Four()
        want = model(inputs).detach()
        want[2] += inputs[2] @ change.T
        want += 0.1 * torch.randn(want.shape, generator=torch.Generator().manual_seed(2))  # the others have noise alone to learn
        adapter = rw.attach(model, {"targets": "all-linear", **recipe})
        session = rw.Session(model, adapter, lr=3e-2, total_steps=200, schedule="constant")
        for _ in range(200):
            session.step_begin()
            loss = (model(inputs) - want).square().mean()
            (loss + session.penalty(None, {})).backward()
            session.step()
        return adapter, (model(inputs) - want).square().mean().item()

    budget = {"name": "adalora", "target_r": 2, "every": 5, "warmup": 20, "final": 60}
    adapter, gathered = trained({"form": "svd", "r": 6, "budget": budget, "losses": ["orthogonality"]})
    stand = [int((d.core != 0).sum()) for _, d in sorted(adapter.sites.items())]
    assert stand[2] >= 5 and sum(stand) == 8, "the published score finds the triplets of the one matrix that has a task"
    _, uniform = trained({"form": "svd", "r": 2, "losses": ["orthogonality"]})
    assert gathered < uniform / 2
