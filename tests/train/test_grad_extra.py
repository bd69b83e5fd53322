"""What a loss adds to gradients itself: once a step, after the last backward, before the clip; in a loop and in the Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import rankwise as rw
from rankwise.catalogue import MethodInfo
from rankwise.errors import TrainingError
from rankwise.losses.base import LossTerm
from tests.models import batch_for, llama
from tests.train.tools import trainer

SGD = {"r": 2, "optimizer": "sgd", "dropout": 0.0}
LR = 0.1


@dataclasses.dataclass(kw_only=True)
class Nuclear(LossTerm):
    """λ‖A‖_* of every factor A by its subgradient λ·U Vᵀ (TRP's way); the scalar term itself is zero."""

    info: ClassVar[MethodInfo] = MethodInfo("nuclear", "loss", "nuclear norm")
    weight: float = 0.05
    calls: list[int] = dataclasses.field(default_factory=list)

    def term(self, *args: Any) -> dict[str, Tensor]:
        return {}

    def grad_extra(self, adapter: Any, step: int) -> Mapping[str, Tensor]:
        self.calls.append(step)
        out = {}
        for name, p in adapter.named_parameters().items():
            if name.endswith("::A"):
                U, _, Vh = torch.linalg.svd(p, full_matrices=False)
                out[name] = self.weight * U @ Vh
        return out


def start(*losses: LossTerm, **options: Any) -> tuple[Any, Any, Any]:
    model = llama()
    adapter = rw.attach(model, options.pop("recipe", SGD))
    session = rw.Session(model, adapter, lr=LR, total_steps=4, schedule="constant", **options)
    session.losses += losses
    model.train()
    return model, adapter, session


def step(model: Any, session: Any, micro: int = 1) -> dict[str, Tensor]:
    """The task's gradients, as they were before ``step``."""
    batch = batch_for(model)
    for _ in range(micro):
        session.step_begin()
        out = model(**batch)
        (out.loss / micro + session.penalty(out, batch)).backward()
        if session._micro == micro - 1:
            grads = {n: p.grad.clone() for n, p in session.adapter.named_parameters().items()}
        session.step()
    return grads


@pytest.mark.parametrize("micro", [1, 3])
def test_it_is_added_once_a_step_whatever_the_micro_batches(micro: int) -> None:
    term = Nuclear()
    model, adapter, session = start(term, accumulate=micro)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    extra = term.grad_extra(adapter, 0)
    grads = step(model, session, micro)
    for n, p in adapter.named_parameters().items():
        want = before[n] - LR * (grads[n] + extra.get(n, torch.zeros_like(p)))
        assert torch.allclose(p, want, atol=1e-7), n
    step(model, session, micro)
    assert term.calls == [0, 1, 2]


def test_it_counts_in_the_clipped_norm() -> None:
    term = Nuclear(weight=3.0)
    model, adapter, session = start(term, max_grad_norm=1.0)
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    extra = term.grad_extra(adapter, 0)
    grads = step(model, session)
    total = {n: g + extra.get(n, 0) for n, g in grads.items()}
    norm = torch.stack([g.norm() for g in total.values()]).norm().item()
    assert session.logs["grad_norm"] == pytest.approx(norm, rel=1e-5) and norm > 5
    moved = torch.stack([(p - before[n]).norm() for n, p in adapter.named_parameters().items()]).norm().item()
    assert moved == pytest.approx(LR, rel=1e-3), "a step of norm 1, extra included"


def test_frozen_tensors_get_none() -> None:
    model, adapter, session = start(Nuclear(), recipe={**SGD, "budget": {"name": "lisa", "blocks": 1, "every": 4}})
    session.step_begin()
    every = dict(session.budget._params)
    before = {n: p.detach().clone() for n, p in every.items()}
    session.losses[0].grad_extra = lambda a, t: {n: torch.ones_like(p) for n, p in every.items()}
    step(model, session)
    moved = {n for n, p in every.items() if not torch.equal(p, before[n])}
    assert moved == set(session.budget.allocation.trainable) and len(moved) < len(every)


@pytest.mark.parametrize("wrong", ["name", "shape", "nan"])
def test_what_fits_no_parameter_stops_before_the_step(wrong: str) -> None:
    model, adapter, session = start(Nuclear())
    name = "model.layers.0.mlp.up_proj::A"
    good = torch.ones(2, 32)
    given = {"name": {"nowhere::A": good}, "shape": {name: good[:1]}, "nan": {name: good * float("nan")}}[wrong]
    session.losses[0].grad_extra = lambda a, t: given
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    with pytest.raises(TrainingError, match=r"'nuclear' adds .* expected finite values"):
        step(model, session)
    assert session.t == 0 and all(torch.equal(p, before[n]) for n, p in adapter.named_parameters().items())
    assert all(p.grad is None for p in adapter.trainable_parameters())


class Add(TrainerCallback):
    """Give a run a loss that is not in the catalogue."""

    def __init__(self, run: Any, term: LossTerm):
        self.run, self.term = run, term

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.run.session.losses.append(self.term)


@pytest.mark.parametrize("scale", [None, 64.0])
def test_the_trainer_adds_it_after_the_last_backward_at_the_loss_scale(scale: float | None, tmp_path: Path) -> None:
    runs = []
    for weight in (0.0, 0.05):
        run = trainer(
            tmp_path / str(weight), SGD, max_steps=1, gradient_accumulation_steps=3, learning_rate=LR, save_strategy="no",
            max_grad_norm=1e9, lr_scheduler_type="constant",
        )  # fmt: skip
        if scale is not None:
            run.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            run.accelerator.native_amp = True
        term = Nuclear(weight=weight)
        run.add_callback(Add(run, term))
        start = {n: p.detach().clone() for n, p in run.adapter.named_parameters().items()}
        extra = Nuclear().grad_extra(run.adapter, 1)
        run.train()
        assert term.calls == [1], "three micro-batches, one call"
        runs.append({n: p.detach() for n, p in run.adapter.named_parameters().items()})
    assert any(not torch.equal(runs[0][n], start[n]) for n in start)
    for n in start:
        want = runs[0][n] - LR * extra[n] if n in extra else runs[0][n]
        assert torch.allclose(runs[1][n], want, atol=1e-6), n
