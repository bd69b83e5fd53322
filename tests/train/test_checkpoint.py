"""Checkpoints: whole or absent under interruption, the best one brought back, and what a penalty weighs in accumulation."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

import rankwise as rw
from rankwise.errors import ArtefactError, TrainingError
from rankwise.store import atomic
from rankwise.store.native import load_native
from rankwise.train import checkpoint
from tests.models import batch_for, llama
from tests.train.tools import RECIPE, trainer


def numbers(folder: Path) -> list[int]:
    return sorted(int(p.name.rpartition("-")[2]) for p in folder.glob("checkpoint-*"))


class Killed(BaseException):
    """Stands for a kill: nothing may catch it."""


@pytest.mark.parametrize("where", ["_save_rng_state", "_finish_checkpoint", "publish"])
def test_death_while_saving_leaves_the_last_whole_checkpoint(where: str, tmp_path: Path, monkeypatch: Any) -> None:
    run = trainer(tmp_path, save_total_limit=1)

    def die(*args: Any, **kwargs: Any) -> None:
        if run.state.global_step == 3:
            raise Killed
        inner(*args, **kwargs)

    if where == "publish":
        import rankwise.train.trainer as module

        inner = module.publish
        monkeypatch.setattr(module, where, die)
    else:
        inner = getattr(run, where)
        monkeypatch.setattr(run, where, die)
    with pytest.raises(Killed):
        run.train()
    monkeypatch.undo()
    assert numbers(tmp_path) == [2], "step 3 is not there at all, and step 2 was not rotated away for it"
    again = trainer(tmp_path, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    whole = trainer(tmp_path / "whole")
    whole.train()
    for k, t in whole.adapter.tensors().items():
        assert torch.equal(again.adapter.tensors()[k], t), k
    assert numbers(tmp_path) == [4] and not (tmp_path / checkpoint.UNFINISHED).exists()


def test_the_best_checkpoint_is_kept_named_and_brought_back(tmp_path: Path) -> None:
    run = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        save_total_limit=1,
        learning_rate=0.3,
        max_steps=5,
    )
    run.train()
    best = Path(run.state.best_model_checkpoint)
    losses = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    assert best == tmp_path / f"checkpoint-{min(losses, key=losses.__getitem__)}" and best.is_dir()
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(best)
    assert run.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)
    kept, _ = load_native(best)
    for k, t in run.adapter.tensors().items():
        assert torch.equal(kept[k], t), k


def test_a_folder_that_cannot_be_renamed_is_said_and_harms_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    final = tmp_path / "checkpoint-1"
    final.mkdir()
    (final / "old").write_text("old")
    filled = checkpoint.begin(tmp_path) / "checkpoint-1"
    filled.mkdir()
    (filled / "new").write_text("new")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic, "_swap", full)
    with pytest.raises(ArtefactError, match="No space left"):
        checkpoint.publish(filled, final)
    monkeypatch.undo()
    assert [p.name for p in final.iterdir()] == ["old"]
    checkpoint.publish(filled, final)
    assert [p.name for p in final.iterdir()] == ["new"]


def test_an_adapter_that_does_not_come_back_stops_before_the_first_step(tmp_path: Path, monkeypatch: Any) -> None:
    run = trainer(tmp_path)
    before = {k: t.clone() for k, t in run.adapter.tensors().items()}
    monkeypatch.setattr(run.adapter, "save", lambda folder: _lossy(run.adapter, folder))
    with pytest.raises(ArtefactError, match="other bits"):
        run.train()
    assert all(torch.equal(t, before[k]) for k, t in run.adapter.tensors().items())


def _lossy(adapter: Any, folder: Any) -> None:
    from rankwise.runtime.write import header
    from rankwise.store.native import save_native

    save_native(
        folder, {k: t.detach().bfloat16().float() for k, t in adapter.tensors().items()}, header(adapter._record, adapter.model)
    )


@pytest.mark.parametrize("scaled", [None, True, False])
def test_a_penalty_weighs_the_same_whoever_divides_the_loss(scaled: bool | None, tmp_path: Path, monkeypatch: Any) -> None:
    """Its gradient over k micro-batches is that of one penalty, whether the Trainer divides by k or the loss is normalised."""
    from transformers import Trainer

    recipe = {"form": "svd", "r": 2, "losses": ["orthogonality"]}
    run = trainer(tmp_path, recipe, gradient_accumulation_steps=3, max_steps=1, save_strategy="no", max_grad_norm=0.0)
    run.loss_is_scaled_for_ga = scaled
    given: list[float] = []
    backward = run.accelerator.backward
    plain = Trainer.compute_loss

    def count(loss: Any, **kwargs: Any) -> None:
        given.append(loss.item())
        backward(loss, **kwargs)

    def zero(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss, out = plain(self, *args, **kwargs)
        return loss * 0 + loss * 1e-12, out

    monkeypatch.setattr(run.accelerator, "backward", count)
    monkeypatch.setattr(Trainer, "compute_loss", zero)
    monkeypatch.setattr(
        "rankwise.train.session.Session.penalty", lambda s, out, batch: s.adapter.trainable_parameters()[0].sum() * 0 + 6.0
    )
    monkeypatch.setattr("rankwise.train.trainer.check_first_backward", lambda *a: None)
    run.train()
    assert given == pytest.approx([2.0] * 3), "three micro-batches with a penalty of 6 each are one penalty of 6"


@pytest.mark.parametrize("seed", range(3))
def test_a_session_interrupted_at_random_steps_ends_in_the_same_bits(seed: int) -> None:
    """Dropout, accumulation, a schedule and AdamW; the batches are drawn from torch's own generator, which is saved too."""
    rng = random.Random(seed)
    total, accumulate = 7, rng.choice([1, 2])
    batch = batch_for(llama(), rows=6)

    def start() -> tuple[Any, Any, Any]:
        model = llama()
        adapter = rw.attach(model, {"r": 2, "dropout": 0.3})
        model.train()
        return model, adapter, rw.Session(
            model, adapter, lr=1e-2, total_steps=total, accumulate=accumulate, schedule="cosine", warmup=2, weight_decay=0.1, max_grad_norm=0.5
        )  # fmt: skip

    def go(model: Any, session: Any, until: int) -> None:
        while session.t < until:
            rows = torch.randint(6, (2,))
            session.step_begin()
            part = {k: v[rows] for k, v in batch.items()}
            out = model(**part)
            (out.loss / accumulate + session.penalty(out, part)).backward()
            session.step()

    torch.manual_seed(seed)
    model, whole, session = start()
    go(model, session, total)
    torch.manual_seed(seed)
    model, adapter, session = start()
    for stop in sorted(rng.sample(range(1, total), 3)):
        go(model, session, stop)
        file = io.BytesIO()
        torch.save({"run": session.state_dict(), "adapter": adapter.tensors()}, file)
        torch.manual_seed(999)
        model, adapter, session = start()
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        with torch.no_grad():
            for k, t in adapter.tensors().items():
                t.copy_(saved["adapter"][k])
        session.load_state_dict(saved["run"])
    go(model, session, total)
    for k, t in whole.tensors().items():
        assert torch.equal(adapter.tensors()[k], t), k


def test_state_between_micro_batches_is_refused() -> None:
    model = llama()
    session = rw.Session(model, rw.attach(model, RECIPE), lr=1e-2, total_steps=2, accumulate=2)
    model.train()
    batch = batch_for(model)
    session.step_begin()
    model(**batch).loss.backward()
    assert not session.step()
    with pytest.raises(TrainingError, match="1 of 2 micro-batches"):
        session.state_dict()
