"""The laws of docs/design.md §6, each over every registered method it applies to."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from rankwise.errors import RankwiseError
from tests.contract.cases import example, ids, mergeable, methods
from tests.models import batch_for, llama, logits, move

PLACED = methods("form", "init", "router")  # what stands in the model
TRAINED = methods("form", "init", "router", "budget", "optimizer", "loss")  # what takes part in a run


def calibration() -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(5)
    out = []
    for _ in range(3):
        x = torch.randint(3, 64, (4, 24), generator=g)
        out.append({"input_ids": x, "labels": x.clone()})
    return out


def attached(recipe: dict[str, Any], **more: Any) -> tuple[Any, Any]:
    model = llama()
    return model, rw.attach(model, recipe, calibration=calibration(), **more)


def train(model: Any, adapter: Any, steps: int = 10, lr: float = 1e-2, after: Any = None, **options: Any) -> list[float]:
    """``steps`` optimiser steps on one batch; the task's loss before each.  ``after`` is called once a step."""
    batch = batch_for(model, rows=4, tokens=16)
    session = rw.Session(model, adapter, lr=lr, total_steps=steps, schedule="constant", **options)
    model.train()
    losses = []
    for _ in range(steps):
        session.step_begin()
        out = model(**batch)
        losses.append(out.loss.item())
        (out.loss + session.penalty(out, batch)).backward()
        session.step()
        if after is not None:
            after()
    session.close()
    model.eval()
    return losses


# --- 1 start ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_first_output_is_the_bases(info: Any) -> None:
    model = llama()
    batch = batch_for(model)
    before = logits(model, batch)
    rw.attach(model, example(info), calibration=calibration())
    gap = (logits(model, batch) - before).abs().max().item()
    assert gap <= getattr(info.cls, "start_gap", 2e-5), f"{info.name} starts {gap:.1e} away from the base"


@pytest.mark.parametrize("info", TRAINED, ids=ids(TRAINED))
def test_every_trainable_tensor_moves_within_ten_steps(info: Any) -> None:
    model, adapter = attached(example(info))
    before = {n: p.detach().clone() for n, p in adapter.named_parameters().items()}
    still = set(before)

    def look() -> None:  # a budget may put a tensor back later; once is enough
        still.difference_update(
            [n for n, p in adapter.tensors(buffers=False).items() if n in still and not torch.equal(p, before[n])]
        )

    losses = train(model, adapter, lr=getattr(info.cls, "example_lr", 1e-2), after=look)
    assert not still, f"dead start: {sorted(still)[:3]} never moved"
    assert losses[-1] < losses[0], f"loss did not fall: {losses[0]:.4f} → {losses[-1]:.4f}"


# --- 2 forward = weight -------------------------------------------------------------------------------------
@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_forward_equals_weight_merge_and_detach(info: Any) -> None:
    model = llama()
    bits = {k: v.clone() for k, v in model.state_dict().items()}
    batch = batch_for(model)
    base = logits(model, batch)
    recipe = example(info)
    adapter = rw.attach(model, recipe, calibration=calibration())
    move(adapter)
    moved = logits(model, batch)
    assert (moved - base).abs().max() > 1e-3, "the adapter does not act, so nothing here is tested"
    with rw.view(model, {}):
        assert torch.equal(logits(model, batch), base), "the empty view is not the base"
    if mergeable(recipe):
        for name, delta in list(adapter.sites.items())[:7]:
            site = delta.site
            if site.spec.kind != "linear":
                continue
            x = torch.randn(5, site.spec.inp)
            weight = site.read()
            change = adapter.delta(name).dense(weight)
            y = site.base_out(x)
            assert torch.allclose(delta(x, y + (site.bias if site.bias is not None else 0)), x @ change.T, atol=2e-5), name
        report = adapter.merge()
        assert report.logit_gap is not None and report.logit_gap < 1e-4
        assert torch.allclose(logits(model, batch), moved, atol=1e-4)
    else:
        with pytest.raises(RankwiseError):
            adapter.merge()
    adapter.detach()
    assert list(model.state_dict()) == list(bits)
    assert all(torch.equal(v, bits[k]) for k, v in model.state_dict().items()), "detach did not give the bits back"
    assert not hasattr(model, "rankwise")


@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_order_of_adapters_changes_nothing(info: Any) -> None:
    if "weight" in getattr(info.cls, "provides", ()) or example(info).get("form") == "full":
        pytest.skip("one a model by definition")
    batch = batch_for(llama())
    outputs = []
    for order in (("a", "b"), ("b", "a")):
        model = llama()
        for name in order:
            adapter = rw.attach(
                model, example(info) if name == "a" else {"form": "lora", "r": 2}, calibration=calibration(), name=name
            )
            move(adapter, seed={"a": 3, "b": 4}[name])
        rw.activate(model, ["a", "b"])
        outputs.append(logits(model, batch))
    assert torch.allclose(*outputs, atol=1e-5)


# --- 3 files ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_save_and_load_give_the_same_bits(info: Any, tmp_path: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter)
    batch = batch_for(model)
    want = logits(model, batch)
    adapter.save(tmp_path / "a")
    again = rw.load(llama(), tmp_path / "a")
    assert torch.equal(logits(again.model, batch), want)
    again.save(tmp_path / "b")
    assert (tmp_path / "a/rankwise.safetensors").read_bytes() == (tmp_path / "b/rankwise.safetensors").read_bytes()


EXPORTED = [m for m in methods("form", "init") if m.kind == "init" or m.exports_to_peft]


@pytest.mark.parametrize("info", EXPORTED, ids=ids(EXPORTED))
def test_peft_loads_what_we_export(info: Any, tmp_path: Any) -> None:
    peft = pytest.importorskip("peft")
    recipe = example(info)
    if recipe.get("init") == "loftq":
        pytest.skip("the file belongs to the quantised base")
    model, adapter = attached(recipe)
    batch = batch_for(model)
    base = logits(model, batch)
    move(adapter)
    want = logits(model, batch)
    adapter.export(tmp_path / "peft")
    theirs = logits(peft.PeftModel.from_pretrained(llama(), tmp_path / "peft"), batch)
    assert (want - base).abs().max() > 1e-3
    assert torch.allclose(theirs, want, atol=1e-5)
    ours = rw.load(llama(), tmp_path / "peft")
    assert torch.allclose(logits(ours.model, batch), want, atol=1e-5)


# --- 4 lowering ---------------------------------------------------------------------------------------------
FORMS = [m for m in methods("form") if m.mergeable]


@pytest.mark.parametrize("info", FORMS, ids=ids(FORMS))
def test_lowering_is_exact_or_reports_its_true_error(info: Any) -> None:
    _, adapter = attached(example(info))
    move(adapter)
    name, delta = next((n, d) for n, d in adapter.sites.items() if d.site.spec.kind == "linear")
    weight = delta.site.read()
    value = adapter.delta(name)
    dense = value.dense(weight).double()
    if value.exact_rank is not None:
        low, error = value.to_lowrank()
        assert error == 0.0
        assert torch.allclose(low.dense().double(), dense, atol=1e-5)
    low, error = value.to_lowrank(rank=2, weight=weight)
    true = (low.dense().double() - dense).norm() / dense.norm()
    assert error == pytest.approx(true.item(), abs=1e-5)
    tail = torch.linalg.svdvals(dense)[2:].square().sum().sqrt() / dense.norm()
    assert error == pytest.approx(tail.item(), abs=1e-5), "not the best of its rank"


# --- 6 determinism ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("info", TRAINED, ids=ids(TRAINED))
def test_same_seed_same_bits_and_resume_equals_not_stopping(info: Any) -> None:
    batch = batch_for(llama(), rows=4, tokens=16)

    def start() -> tuple[Any, Any, Any]:
        model, adapter = attached(example(info))
        model.train()
        return model, adapter, rw.Session(model, adapter, lr=1e-2, total_steps=6)

    def go(model: Any, session: Any, steps: int) -> None:
        for _ in range(steps):
            session.step_begin()
            out = model(**batch)
            (out.loss + session.penalty(out, batch)).backward()
            session.step()

    model, adapter, session = start()
    go(model, session, 6)
    want = {n: t.detach().clone() for n, t in adapter.tensors().items()}

    model, adapter, session = start()
    go(model, session, 3)
    buffer = io.BytesIO()
    torch.save({"session": session.state_dict(), "adapter": {n: t.detach().clone() for n, t in adapter.tensors().items()}}, buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    model, adapter, session = start()
    with torch.no_grad():
        for n, t in adapter.tensors().items():
            t.copy_(state["adapter"][n])
    session.load_state_dict(state["session"])
    go(model, session, 3)
    for n, t in adapter.tensors().items():
        assert torch.equal(t, want[n]), f"{n} differs after a resume"


# --- 8 frozen means frozen ----------------------------------------------------------------------------------
@pytest.mark.parametrize("info", TRAINED, ids=ids(TRAINED))
def test_frozen_tensors_keep_their_bits_under_weight_decay(info: Any) -> None:
    model, adapter = attached(example(info))
    live = {id(p) for p in adapter.trainable_parameters()}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in live}
    train(model, adapter, steps=5, weight_decay=0.1)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[n], v) for n, v in frozen.items())


# --- 9 citizenship ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_deepcopy_and_pickle_keep_the_adapter(info: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter)
    batch = batch_for(model)
    want = logits(model, batch)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, batch), want)
    move(rw.adapters(twin)["default"], seed=9)
    assert torch.equal(logits(model, batch), want), "the copy shares tensors with the original"
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(logits(torch.load(buffer, weights_only=False), batch), want)


@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_gradient_checkpointing_changes_no_gradient(info: Any) -> None:
    batch = batch_for(llama(), rows=2)
    grads = []
    for checkpointed in (False, True):
        model, adapter = attached(example(info))
        move(adapter)
        model.train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        with rw.view(model, {"default": 1.0}):
            loss = model(**batch).loss
        rw.activate(model, None) if "weight" not in getattr(info.cls, "provides", ()) else None
        loss.backward()  # outside the view, and with another default
        grads.append({n: p.grad.clone() for n, p in adapter.named_parameters().items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for n in grads[0]:
        assert torch.allclose(grads[0][n], grads[1][n], atol=1e-6), n


@pytest.mark.parametrize("info", PLACED, ids=ids(PLACED))
def test_generate_with_a_cache_equals_without(info: Any) -> None:
    model, adapter = attached(example(info))
    move(adapter, std=0.3)
    ids_ = batch_for(model, rows=2, tokens=5)["input_ids"]
    options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(model.generate(ids_, use_cache=True, **options), model.generate(ids_, use_cache=False, **options))
