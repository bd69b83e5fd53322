"""The knob between a quality and a diversity fine-tune, and the distilled guidance it starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import rankwise as rw
from rankwise.errors import DataError, OptionError
from rankwise.losses.cfg_distillation import CFGDistillation, divergence, guided, unconditional
from rankwise.merge import merge_states
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.methods.quality_diversity import frontier, knob
from tests.merge.tools import dense, source
from tests.models import batch_for, llama, move


def asked(rows: int = 3, prompt: int = 4) -> dict[str, torch.Tensor]:
    batch = batch_for(llama(), rows=rows)
    batch["labels"][:, :prompt] = -100
    return batch


def penalty(model: Any, adapter: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    session = rw.Session(model, adapter, lr=1e-2, total_steps=10)
    out = model(**batch)
    return session.penalty(out, batch)


def recipe(**options: Any) -> rw.Recipe:
    return rw.Recipe(form="lora", r=4, losses=[{"name": "cfg_distillation", **options}])


def test_the_knob_is_exact_at_its_ends_and_between() -> None:
    q, d = source(0), source(1)
    assert torch.allclose(dense(knob(q, d, 0.0)), dense(q), atol=1e-6)
    assert torch.allclose(dense(knob(q, d, 1.0)), dense(d), atol=1e-6)
    assert torch.allclose(dense(knob(q, d, 0.25)), 0.75 * dense(q) + 0.25 * dense(d), atol=1e-5)
    with pytest.raises(OptionError, match="from 0"):
        knob(q, d, 1.2)


def test_the_frontier_scores_both_splits_along_the_knob() -> None:
    net = torch.nn.ModuleDict({"x": torch.nn.Linear(8, 10), "y": torch.nn.Linear(8, 10)})
    size = lambda site: lambda m: (m[site](torch.eye(8)) - m[site].bias).norm().item()
    got = frontier(Evaluator(net, {"quality": size("x"), "diversity": size("y")}), source(0), source(1), (0.0, 0.5, 1.0))
    for p in got:
        D = dense(knob(source(0), source(1), p.lam), "y") + net["y"].weight
        assert p.scores["diversity"] == pytest.approx(D.norm().item(), rel=1e-4)
    assert [p.lam for p in got] == [0.0, 0.5, 1.0] and len({p.scores["quality"] for p in got}) == 3


def test_guidance_and_divergence_against_their_definitions() -> None:
    c, u, s = torch.randn(6, 5), torch.randn(6, 5), torch.randn(6, 5)
    assert (
        torch.equal(guided(c, u, 0.0), u)
        and torch.allclose(guided(c, u, 1.0), c)
        and torch.allclose(guided(c, u, 3.0), 3 * c - 2 * u, atol=1e-5)
    )
    p, q = s.softmax(-1), c.softmax(-1)
    assert divergence(s, c) == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    assert divergence(s[:0], c[:0]) == 0


def test_gamma_one_is_nothing_to_learn_at_the_start_and_pulls_back_later() -> None:
    model, batch = llama(), asked()
    adapter = rw.attach(model, recipe(gamma=1.0))
    assert penalty(model, adapter, batch).item() == pytest.approx(0.0, abs=1e-7)
    move(adapter)
    assert penalty(model, adapter, batch).item() > 1e-3


def test_the_target_without_the_prompt_is_the_model_that_never_read_it() -> None:
    """Masking a prompt but its last token is the same as a row that begins there, at the same positions."""
    model, batch = llama(), asked(prompt=4)
    bare = unconditional(batch)
    assert "labels" not in bare and bare["attention_mask"].tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 1, 1]] * 3
    with torch.no_grad():
        got = model(**bare).logits[:, 3:]
        places = torch.arange(3, 10)[None].expand(3, -1)
        want = model(input_ids=batch["input_ids"][:, 3:], position_ids=places).logits
    assert torch.isfinite(got).all() and torch.allclose(got, want, atol=1e-5)


def test_the_loss_against_the_formula() -> None:
    model, batch = llama(), asked()
    adapter = rw.attach(model, recipe(gamma=2.5, weight=0.5))
    move(adapter)
    model.train()
    got = penalty(model, adapter, batch).item()
    assert model.training
    with torch.no_grad():
        student = model(**batch).logits[:, 3:-1]
        base = llama()
        c, u = base(input_ids=batch["input_ids"]).logits[:, 3:-1], base(**unconditional(batch)).logits[:, 3:-1]
    target = F.log_softmax(u + 2.5 * (c - u), -1)
    p = F.log_softmax(student, -1)
    assert got == pytest.approx(0.5 * (p.exp() * (p - target)).sum(-1).mean().item(), rel=1e-4) and got > 1e-3


def test_distilling_makes_one_forward_do_the_work_of_two() -> None:
    model, batch = llama(), asked()
    with torch.no_grad():
        model.lm_head.weight.mul_(4)  # a random model hardly heeds its prompt: make what difference there is matter
    adapter = rw.attach(model, recipe(gamma=3.0))
    session = rw.Session(model, adapter, lr=2e-2, total_steps=40, schedule="constant")
    found = []
    for _ in range(40):
        session.step_begin()
        loss = session.penalty(model(**batch), batch)  # the term alone, without the task's loss
        loss.backward()
        session.step()
        found.append(loss.item())
    assert found[0] > 1e-2 and found[-1] < 0.25 * found[0]


def test_what_cannot_be_guided_is_refused() -> None:
    model = llama()
    with pytest.raises(OptionError, match="gamma ≥ 0"):
        CFGDistillation(gamma=-1.0)
    adapter = rw.attach(model, recipe(gamma=2.0))
    with pytest.raises(DataError, match="no row has one"):
        penalty(model, adapter, batch_for(model))
    with pytest.raises(DataError, match="packed"):
        penalty(model, adapter, {**asked(), "position_ids": torch.arange(10)[None].expand(3, -1)})


def test_the_row_is_the_knob_also_on_whole_models(tmp_path: Path) -> None:
    from rankwise.merge.checkpoints import merge_checkpoints
    from tests.merge.test_checkpoints import folder, whole

    q, d = source(0), source(1)
    got = merge_states([q, d], None, "quality_diversity", lam=0.3)
    assert torch.equal(dense(got), dense(knob(q, d, 0.3))) and torch.allclose(
        dense(got), 0.7 * dense(q) + 0.3 * dense(d), atol=1e-6
    )
    for lam, end in ((0.0, q), (1.0, d)):
        assert torch.allclose(dense(merge_states([q, d], None, "quality_diversity", lam=lam)), dense(end), atol=1e-6)
    a, b = folder(tmp_path / "a", 1), folder(tmp_path / "b", 2)
    merge_checkpoints([a, b], tmp_path / "out", "quality_diversity", lam=0.3)
    assert all(torch.allclose(t, 0.7 * whole(a)[n] + 0.3 * whole(b)[n], atol=1e-6) for n, t in whole(tmp_path / "out").items())
    with pytest.raises(OptionError, match="uses no weights"):
        merge_states([q, d], [0.5, 0.5], "quality_diversity")
