"""The functional forward and the evaluator: gradients to what made the tensors, nothing written, everything as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.delta import AdapterState, LowRank
from rankwise.errors import MergeError, OptionError, UnknownName, ViewError
from rankwise.merge import attach_state, merge_states
from rankwise.merge.judge.evaluator import Evaluator
from rankwise.merge.judge.functional import call
from rankwise.merge.judge.state_values import digest, plain
from tests.merge.models import SITES, copy_with, value
from tests.models import batch_for, llama, move


@pytest.fixture
def model() -> Any:
    return llama()


def bits(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize("form", ["lora", "dora", "lora_xs"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_call_with_made_tensors_is_the_adapter_moved_there(model: Any, form: str, checkpointing: bool) -> None:
    """Value and gradients against the same numbers written into a copy's own tensors; one knob made all of them."""
    adapter = rw.attach(model, rw.Recipe(form=form, r=4, targets="all-linear"))
    move(adapter)
    own = {k: p.detach().clone() for k, p in adapter.named_parameters().items()}
    g = torch.Generator().manual_seed(7)
    push = {k: 0.1 * torch.randn(p.shape, generator=g) for k, p in own.items()}
    batch = batch_for(model)
    model.train(checkpointing)
    if checkpointing:
        model.gradient_checkpointing_enable()
    knob = torch.tensor(0.7, requires_grad=True)
    loss = call(model, {k: own[k] + knob * push[k] for k in own}, batch).loss
    assert all(torch.equal(p, own[k]) for k, p in adapter.named_parameters().items())
    with rw.view(model, {}):  # the backward does not depend on what acts by then
        (got,) = torch.autograd.grad(loss, knob)
    assert all(p.grad is None for p in model.parameters())
    for k, p in adapter.named_parameters().items():
        p.data.add_(0.7 * push[k])
    plain = model(**batch).loss
    plain.backward()
    want = sum((p.grad * push[k]).sum() for k, p in adapter.named_parameters().items())
    assert torch.allclose(loss, plain, atol=1e-6) and torch.allclose(got, want, rtol=1e-4)
    assert abs(float(want)) > 1e-4


def test_checkpointing_is_given_back_as_it_was(model: Any) -> None:
    rw.attach(model, "lora")
    model.train()
    model.gradient_checkpointing_enable()
    model(**batch_for(model))  # the roster wraps the functions once
    layers = model.model.layers
    before = [layer._gradient_checkpointing_func for layer in layers]
    call(model, {}, batch_for(model))
    assert [layer._gradient_checkpointing_func for layer in layers] == before


def test_what_cannot_be_called_is_refused(model: Any) -> None:
    adapter = rw.attach(model, rw.Recipe(form="lora", r=4), name="a")
    key, batch = next(iter(adapter.tensors())), batch_for(model)
    with pytest.raises(UnknownName, match="tensor of adapter 'a'"):
        call(model, {key + "x": torch.zeros(1)}, batch)
    with pytest.raises(OptionError, match="holds"):
        call(model, {key: torch.zeros(1, 2)}, batch)
    rw.attach(model, "lora", name="b")
    rw.activate(model, ["a", "b"])
    with pytest.raises(ViewError, match="2 adapters act here"):
        call(model, {}, batch)
    call(model, {}, batch, name="a")
    rw.adapters(model)["b"].detach()
    move(adapter)
    adapter.merge()
    with pytest.raises(ViewError, match="merged into the weights"):
        call(model, {}, batch, name="a")


def test_a_score_is_of_the_value_alone_and_leaves_no_trace(model: Any) -> None:
    other = rw.attach(model, "lora", name="other")
    move(other)
    before, batch = bits(model), batch_for(model)
    model.train()
    seen: list[bool] = []

    def held_out(m: Any) -> float:
        seen.append(m.training)
        return float(m(**batch).loss)

    evaluator = Evaluator(model, held_out)
    state = value(1)
    got = evaluator.score(state)
    assert got == pytest.approx(copy_with(state)(**batch).loss.item(), abs=1e-5)  # W + ΔW, without 'other'
    assert evaluator.score(AdapterState({})) == pytest.approx(llama()(**batch).loss.item(), abs=1e-6)
    assert seen == [False, False] and model.training and list(rw.adapters(model)) == ["other"]
    assert all(torch.equal(t, before[n]) for n, t in model.named_parameters())
    with_other = model.eval()(**batch).loss.item()
    assert with_other != pytest.approx(got, abs=1e-3)  # 'other' acts by default again


def test_a_bare_model_is_bare_again(model: Any) -> None:
    before, classes = bits(model), [type(m) for m in model.modules()]
    evaluator = Evaluator(model, lambda m: float(m(**batch_for(m)).loss))
    evaluator.score(value(1))
    evaluator.loss(value(2), batch_for(model))
    assert "rankwise" not in model._modules and [type(m) for m in model.modules()] == classes
    assert all(torch.equal(t, before[n]) and t.requires_grad for n, t in model.named_parameters())
    with pytest.raises(ZeroDivisionError):
        Evaluator(model, lambda m: 1 / 0).score(value(1))
    assert "rankwise" not in model._modules


def test_scores_are_kept_by_content_and_split(model: Any) -> None:
    calls: list[str] = []
    splits = {n: (lambda m, n=n: calls.append(n) or float(len(calls))) for n in ("id", "ood")}  # type: ignore[func-returns-value]
    evaluator = Evaluator(model, splits, higher_is_better=True)
    state = value(1)
    assert evaluator.score(state) == evaluator.score(state.clone()) == 1.0 and calls == ["id"] and evaluator.evaluations == 1
    assert evaluator.score(state, "ood") == 2.0 and evaluator.cost(state, "ood") == -2.0
    assert evaluator.score(state.scaled(0.5)) == 3.0  # the same tensors at another scale
    d = state.sites[SITES[0]]
    assert isinstance(d, LowRank)
    other = AdapterState(
        {**state.sites, SITES[0]: LowRank(d.A, d.B.clone().index_put_((torch.tensor(0),) * 2, torch.tensor(9.0)), d.scale)}
    )
    assert digest(other) != digest(state) and evaluator.score(other) == 4.0


def test_a_value_wider_than_the_matrix_is_the_same_change(model: Any) -> None:
    """Nine sources of rank 2 at a 16-row site: 18 components, written in 16, for a score, a gradient and an adapter."""
    batch = batch_for(model)
    state = merge_states([value(s) for s in range(9)])
    assert state.sites[SITES[1]].exact_rank == 18 and min(state.sites[SITES[1]].shape) == 16
    want = copy_with(state)(**batch).loss.item()
    assert Evaluator(model, lambda m: m(**batch).loss.item()).score(state) == pytest.approx(want, abs=1e-5)
    c = torch.tensor(1.0, requires_grad=True)
    loss = Evaluator(model).loss(state.scaled(c), batch)
    assert loss.item() == pytest.approx(want, abs=1e-5) and torch.autograd.grad(loss, c)[0].abs() > 1e-3
    adapter = attach_state(model, state)
    assert adapter.delta(SITES[1]).exact_rank == 16 and model(**batch).loss.item() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (6, 4)])
def test_a_wide_value_is_narrowed_exactly_either_way(shape: tuple[int, int]) -> None:
    d = LowRank(torch.randn(9, shape[1]), torch.randn(shape[0], 9), 0.5)
    got = plain(AdapterState({"x": d})).sites["x"]
    assert got.exact_rank == 4 and torch.allclose(got.dense(), d.dense())


@pytest.mark.parametrize("held", [False, True])
def test_the_loss_of_a_value_and_its_gradient(model: Any, held: bool) -> None:
    state, batch = value(1), batch_for(model)
    evaluator = Evaluator(model)
    c = torch.tensor(0.6, requires_grad=True)
    made = state.scaled(c)
    if held:
        with evaluator.attached(state) as adapter:
            loss = evaluator.loss(made, batch)
            assert list(rw.adapters(model)) == [adapter.name]  # type: ignore[union-attr]
    else:
        loss = evaluator.loss(made, batch)
    (got,) = torch.autograd.grad(loss, c)
    at = lambda x: copy_with(state.scaled(x)).double()(**batch).loss.item()
    assert loss.item() == pytest.approx(at(0.6), abs=1e-5)
    assert float(got) == pytest.approx((at(0.61) - at(0.59)) / 0.02, rel=1e-2) and abs(float(got)) > 1e-2


def test_a_temperature_multiplies_the_logits(model: Any) -> None:
    batch = batch_for(model)
    batch["labels"][:, 3:5] = -100
    beta = torch.tensor(2.0, requires_grad=True)
    loss = Evaluator(model).loss(value(1), batch, temperature=beta)
    own = Evaluator(model, loss=lambda logits, b: model.loss_function(logits, b["labels"], 64)).loss(
        value(1), batch, temperature=2.0
    )
    assert torch.allclose(loss, own) and torch.autograd.grad(loss, beta)[0] != 0
    odd = llama()
    odd.loss_function = lambda *a, **k: torch.tensor(1.0)
    with pytest.raises(OptionError, match="not their cross-entropy"):
        Evaluator(odd).loss(value(1), batch, temperature=1.0)


def test_what_it_cannot_judge_is_refused(model: Any) -> None:
    with pytest.raises(OptionError, match="no score"):
        Evaluator(model).score(value(1))
    evaluator = Evaluator(model, {"id": lambda m: float("nan")})
    with pytest.raises(OptionError, match="scores on 'id'; it was asked for 'odd'"):
        evaluator.score(value(1), "odd")
    with pytest.raises(MergeError, match="not a number"):
        evaluator.score(value(1))
    with pytest.raises(MergeError, match="'head' whole"):
        evaluator.score(AdapterState(value(1).sites, {"head": torch.ones(1)}))
    with pytest.raises(OptionError, match="labels"):
        Evaluator(model).loss(value(1), {"input_ids": batch_for(model)["input_ids"]})
