"""Many jobs trained at once: gradients, trajectories and ends as if each had been alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import OptionError, RecipeError
from rankwise.recipe import Recipe
from rankwise.train.data import Collator, Example, pack
from rankwise.train.together import AdapterJob, Running, _inputs, step, train_together, why_alone
from tests.models import VOCAB, llama, move

RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    "rank, scale": {"r": 2, "alpha": 8},
    "dora": {"form": "dora", "r": 2},
    "adalora": {"preset": "adalora", "r": 4},
    "block": {"form": "bottleneck", "r": 4},
    "has_frozen_start": {"r": 2, "init": "pissa"},
    "losses": {"r": 2, "losses": ["ba_lora", "orthogonality"]},
    "embedding": {"r": 2, "targets": ["embed_tokens", "q_proj"]},
    "calibrated": {"r": 2, "init": "lora_ga", "optimizer": "lora_pro"},
    "dropout": {"r": 2, "dropout": 0.3},
    "dropout of rows": {"r": 2, "dropout": 0.3, "targets": ["embed_tokens", "q_proj"]},
    "dropout within": {"form": "dora", "r": 2, "dropout": 0.3},
    "frozen blocks": {"r": 2, "budget": {"name": "lisa", "blocks": 1, "every": 2}},
}


def rows(n: int = 12, seed: int = 0) -> list[Example]:
    g = torch.Generator().manual_seed(seed)
    made = [torch.randint(3, VOCAB, (int(torch.randint(5, 14, (1,), generator=g)),), generator=g).tolist() for _ in range(n)]
    return [Example(ids, list(ids)) for ids in made]


def job(name: str, recipe: Any = None, **more: Any) -> AdapterJob:
    given: dict[str, Any] = {"rows": rows(seed=len(name)), "lr": 1e-2, "steps": 6, "batch": 2, **more}
    return AdapterJob(name=name, recipe=Recipe(**(recipe or {"r": 2})), **given)


def run(jobs: list[AdapterJob], together: int, model: Any = None) -> dict[str, Running]:
    model = llama() if model is None else model
    before = {k: t.clone() for k, t in model.state_dict().items()}
    out: dict[str, Any] = {}

    def finished(r: Running) -> None:
        out[r.job.name] = r
        r.kept = {k: t.detach().clone() for k, t in r.adapter.tensors().items()}  # type: ignore[attr-defined]

    train_together(model, jobs, Collator.for_model(model, 0), together=together, finished=finished)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), "the base keeps its bits"
    assert not model.training
    return out


def moved(jobs: list[AdapterJob], model: Any) -> list[Running]:
    """Jobs in the middle of a run: adapters away from their start."""
    running = [Running(model, j, Collator.for_model(model, 0)) for j in jobs]
    for i, r in enumerate(running):
        move(r.adapter, seed=i)
    model.double().train()
    return running


def test_gradients_equal_those_of_separate_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Running, "update", lambda self, loss: self.losses.append(loss))  # look at the gradients, take no step
    jobs = [job("a"), job("bb", {"r": 4, "alpha": 3}, batch=1), job("ccc", {"form": "dora", "r": 2}, batch=3)]

    def gradients(chosen: list[AdapterJob]) -> dict[str, Tensor]:
        model = llama().double()
        everyone = {r.job.name: r for r in moved(jobs, model)}
        step(model, [everyone[j.name] for j in chosen], Collator.for_model(model, 0))
        return {
            f"{j.name} {k}": p.grad
            for j in chosen
            for k, p in everyone[j.name].adapter.named_parameters().items()
            if p.grad is not None
        }

    joint = gradients(jobs)
    alone = {k: g for j in jobs for k, g in gradients([j]).items()}
    assert joint.keys() == alone.keys() and len(joint) == 3 * 14 * 2 + 14
    for k, g in alone.items():
        assert g.abs().max() > 0 and (joint[k] - g).abs().max() < 1e-12, k


def test_trajectories_equal_those_of_separate_runs() -> None:
    jobs = [job(n, r, steps=8 + len(n) % 3, batch=1 + i % 2, lr=10 ** -(2 + i % 2)) for i, (n, r) in enumerate(RECIPES.items())]
    joint = run(jobs, together=4)  # so they join as others end
    for j in jobs:
        alone = run([j], together=1)[j.name]
        assert len(joint[j.name].losses) == j.steps and joint[j.name].error is None
        assert joint[j.name].losses == pytest.approx(alone.losses, abs=1e-5), j.name
        for k, t in alone.kept.items():  # type: ignore[attr-defined]
            assert torch.allclose(joint[j.name].kept[k], t, atol=2e-4), (j.name, k)  # type: ignore[attr-defined]


@pytest.mark.parametrize("packed", [True, False])
def test_a_mask_is_left_out_only_where_it_says_nothing(packed: bool) -> None:
    model = llama()
    ids = [Example(r.input_ids[:5], r.labels[:5]) for r in rows(4)]
    whole, parted = (pack(ids, 5), pack(ids, 10)) if packed else (ids, [*ids, Example([5, 6], [5, 6])])
    for given, kept in ((whole, False), (parted, True)):
        batch = Collator.for_model(model, 0)(given)
        inputs = _inputs(batch)
        assert ("attention_mask" in inputs) == kept and ("position_ids" in inputs) == (kept and packed) and "labels" not in inputs
        full = {k: v for k, v in batch.items() if k != "labels"}
        with torch.no_grad():
            got, want = model(**inputs).logits, model(**full).logits
        assert torch.allclose(got, want, atol=1e-5)


def test_dropout_drops_its_share_anew_at_each_step_and_place() -> None:
    model = llama()
    r = Running(model, job("a", {"r": 2, "dropout": 0.25}), Collator.for_model(model, 0))
    x = torch.ones(3, 400, 5)
    mask = r._keeps("q", x, 0.25)
    assert mask.unique().tolist() == pytest.approx([0, 4 / 3]) and mask.mean() == pytest.approx(1, abs=0.05)
    assert torch.equal(r._keeps("q", x[:, :100], 0.25), mask[:, :100]), "padding changes nothing"
    assert not torch.equal(r._keeps("k", x, 0.25), mask)
    r.losses.append(1.0)
    assert not torch.equal(r._keeps("q", x, 0.25), mask)
    plain = llama()
    dry = Running(plain, job("a", {"r": 2}), Collator.for_model(plain, 0))
    for running in (r, dry):
        move(running.adapter)
        running.model.train()
    step(model, [r], Collator.for_model(model, 0))
    step(plain, [dry], Collator.for_model(plain, 0))
    assert r.losses[-1] != dry.losses[-1]


def test_packed_rows_too() -> None:
    jobs = [job(n, rows=pack(rows(seed=i), 32), steps=3) for i, n in enumerate("ab")]
    joint = run(jobs, together=2)
    for j in jobs:
        assert joint[j.name].losses == pytest.approx(run([j], together=1)[j.name].losses, abs=1e-5)


def test_a_job_that_diverges_is_stopped_by_name_and_the_others_do_not_notice() -> None:
    bad = job("bad", steps=6, lr=1e30, max_grad_norm=None, schedule="constant", warmup=0)
    good = job("good")
    joint = run([bad, good], together=2)
    assert joint["bad"].error is not None and "the loss is" in joint["bad"].error and len(joint["bad"].losses) < 6
    assert joint["good"].error is None
    alone = run([good], together=1)["good"]
    assert joint["good"].losses == pytest.approx(alone.losses, abs=1e-5) and all(map(math.isfinite, alone.losses))


ALONE: dict[str, dict[str, Any]] = {
    "form 'full' moves the base weights": {"form": "full", "targets": "q_proj"},
    "router 'smora' balances": {"r": 4, "router": {"name": "smora", "k": 2}},
    "init 'loftq' puts another weight": {"r": 2, "init": "loftq"},
    "reads the weight": {"form": "dense", "targets": "norm"},
}


@pytest.mark.parametrize("says", ALONE)
def test_what_cannot_share_a_batch_is_refused_by_name_and_trains_alone(says: str) -> None:
    odd = job("odd", ALONE[says], steps=2)
    reason = why_alone(llama(), odd.recipe)
    assert reason is not None and says in reason
    with pytest.raises(RecipeError, match=r"'odd' cannot share a batch: .*together=1"):
        run([job("plain"), odd], together=2)
    assert run([odd, job("plain", steps=2)], together=1)["odd"].error is None


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        ([job("a"), job("a")], "Two jobs are called 'a'"),
        ([], "0 jobs"),
    ],
)
def test_what_could_not_be_trained_is_refused(jobs: list[AdapterJob], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        run(jobs, together=2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"lr": 0.0}, "The job 'a': lr = 0.0; .* nothing would be learnt"),
        ({"steps": 0}, "The job 'a': steps = 0"),
        ({"batch": 0}, "'a' has steps of 0 of"),
        ({"rows": []}, "of 0 rows"),
        ({"warmup": 99}, "The job 'a': warmup = 99; it lies within the run of 6 steps"),
        ({"schedule": "stairs"}, "The job 'a': schedule = 'stairs'"),
    ],
)
def test_a_job_that_could_not_be_trained_is_not_made(given: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        job("a", **given)


def test_epochs_are_steps_over_the_rows() -> None:
    made = job("a", steps=None, epochs=2.5, batch=3)
    assert made.total_steps == math.ceil(2.5 * len(made.rows) / 3)
    assert job("a", steps=4, epochs=9).total_steps == 4


def test_a_recipe_that_does_not_fit_does_not_take_the_others_along() -> None:
    wide = job("wide", {"r": 1000})
    with pytest.raises(OptionError, match="The job 'wide': r = 1000"):
        run([wide], together=1)
    model, told = llama(), []
    done: list[str] = []
    train_together(
        model, [wide, job("fits", steps=1)], Collator.for_model(model, 0),
        finished=lambda r: done.append(r.job.name), refused=lambda j, e: told.append((j.name, str(e))),
    )  # fmt: skip
    assert done == ["fits"] and told[0][0] == "wide" and "rankwise" not in model._modules


def test_a_model_in_which_rows_meet_is_refused() -> None:
    model = llama()
    model.model.extra = torch.nn.BatchNorm1d(4)
    assert "batch normalisation" in (why_alone(model, Recipe()) or "")
    assert "rankwise" not in model._modules
    assert rw.attach(model, "lora").numel() > 0
